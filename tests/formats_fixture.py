"""A small artifact for tests: 20 samples of 4 classes, latents and tokens, one class table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from formats.schema import ClassRow, Column
from formats.shards import Sample
from formats.writer import ArtifactWriter

COLUMNS = (Column("latent", "f2", (2, 4, 4, 4)), Column("tokens", "u1", (3, 5)))
FIELDS: dict[str, Any] = {
    "name": "tiny",
    "latent": {"codec": "vae", "moments": ["mean", "std"], "scale": 0.18215, "shift": 0.0},
    "encoders": {},
    "preprocess": {"crop": "adm-center-crop", "size": 32},
    "source": {"name": "made up"},
    "selection": {"method": "random"},
    "licence": {"spdx": "CC0-1.0"},
    "seeds": {"pack": 0},
    "tool": {"d2c": "0"},
}
CLASSES = 4


def make_samples(count: int = 20, columns: Sequence[Column] = COLUMNS) -> list[Sample]:
    return [
        Sample(
            f"{i:08d}",
            i % CLASSES,
            {
                c.name: (np.arange(1.5, math.prod(c.shape) + 1).reshape(c.shape) * (i + 3) % 97).astype(c.numpy)
                for c in columns
            },
            {"source_key": f"{i % CLASSES}/ö {i}.jpg", "score": i / 7, "selection_rank": i, "nothing": None},
        )
        for i in range(count)
    ]


def writer(out: Path, container: Any = "tar", shards: int = 2, columns: Sequence[Column] = COLUMNS) -> ArtifactWriter:
    return ArtifactWriter(out, container, columns, shards, "digest")


def finish(writer: ArtifactWriter, **fields: Any) -> Path:
    counts = np.bincount(writer.labels(), minlength=CLASSES).tolist()
    classes = [ClassRow(i, f"class {i}", f"n{i:08d}", f"a photo of {i}", counts[i]) for i in range(CLASSES)]
    table = np.arange(CLASSES * 6, dtype="f2").reshape(CLASSES, 2, 3)
    picks = [{"key": str(i), "rank": i} for i in range(3)]
    return writer.finish({**FIELDS, **fields}, classes, {"text_embeds": table}, picks)


def split(samples: Sequence[Sample], shards: int) -> list[Sequence[Sample]]:
    return [samples[len(samples) * i // shards : len(samples) * (i + 1) // shards] for i in range(shards)]


def write_artifact(
    out: Path,
    container: Any = "tar",
    shards: int = 2,
    samples: Sequence[Sample] | None = None,
    columns: Sequence[Column] = COLUMNS,
    **fields: Any,
) -> Path:
    samples = make_samples() if samples is None else samples
    with writer(out, container, shards, columns) as made:
        for shard, part in enumerate(split(samples, shards)):
            made.write(shard, part)
        return finish(made, **fields)


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
