"""Small pictures and trees of them, made on the spot."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image


def pixels(width: int, height: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """u1 [height, width, 3]: a gradient with noise, different in every corner."""
    rng = np.random.default_rng(seed)
    across = np.linspace(0, 200, width)[None, :, None] * np.array([1.0, 0.2, 0.5])
    down = np.linspace(0, 200, height)[:, None, None] * np.array([0.1, 1.0, 0.4])
    noise = rng.integers(0, 56, (height, width, 3))
    mixed: npt.NDArray[np.uint8] = np.clip(across / 2 + down / 2 + noise, 0, 255).astype(np.uint8)
    return mixed


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(pixels(width, height, seed))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes that saving ``image`` as ``kind`` gives."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int = 8, height: int = 8, seed: int = 0) -> bytes:
    return encoded(picture(width, height, seed))


def jpeg(width: int = 8, height: int = 8, seed: int = 0) -> bytes:
    return encoded(picture(width, height, seed), "JPEG")


def write_tree(root: Path, files: Mapping[str, bytes]) -> Path:
    """Write ``files`` (relative path -> bytes) under ``root``; a path that ends in "/" is an empty folder."""
    for name, data in files.items():
        target = root / name
        if name.endswith("/"):
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    return root


def two_classes(root: Path, each: int = 3, size: int = 8) -> Path:
    """``cat`` and ``dog`` with ``each`` PNGs."""
    names = [f"{label}/{i}.png" for label in ("cat", "dog") for i in range(each)]
    return write_tree(root, {name: png(size, size, seed) for seed, name in enumerate(names)})


def real_data(name: str) -> Path:
    """A file of real pictures, or skip: in ``$D2C_TEST_DATA``, else in ``../shared/data`` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("D2C_TEST_DATA", beside)) / name
    if not path.exists():
        pytest.skip(f"no {name}: set D2C_TEST_DATA to the folder that holds it")
    return path
