"""Vision tokens of the picks: as they wait in the workspace, and as a token codec stores them in the artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from d2c.latents import LatentSpec
from d2c.workspace import Stage
from formats import codecs
from formats.files import atomic
from formats.schema import INT4, INT8, LATENT, RAW, RESERVED, Column, View, view_column

PART = 256
"""Images in a part: 100 MB of tokens at 256 x 768 fp16."""

VIEWS: tuple[tuple[View, ...], ...] = (("orig",), ("orig", "hflip"))
"""What may be stored of each image."""

TokenCodec = Literal["fp16", "int8", "int4"]
CODECS: dict[TokenCodec, str] = {"fp16": RAW, "int8": INT8, "int4": INT4}
"""What users say -> the format's name."""


def save_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write an npy file, whole or not at all."""
    plain = np.ascontiguousarray(array)
    with atomic(path) as temporary, temporary.open("wb") as stream:
        # Not np.save: on a full disk its error does not say so.
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(plain))
        stream.write(plain.reshape(-1).view(np.uint8).data)


@dataclass(frozen=True)
class VisionTokens:
    """Finished vision tokens: row i belongs to the i-th pick in key order.

    A part is f2 [n, views, tokens, dim]; with ``class_token`` that one comes first.
    """

    files: tuple[Path, ...]
    class_token: bool

    @cached_property
    def parts(self) -> list[np.ndarray[Any, Any]]:
        """Memory-mapped."""
        return [np.load(path, mmap_mode="r", allow_pickle=False) for path in self.files]

    def __reduce__(self) -> tuple[Any, ...]:
        # To other processes go the names: pickled, a mapped array is as large as all of its tokens.
        return VisionTokens, (self.files, self.class_token)

    @staticmethod
    def open(stage: Stage) -> VisionTokens:
        record = stage.require("d2c attach")
        names = sorted(name for name in record.outputs if name.endswith(".npy"))
        return VisionTokens(tuple(map(stage.output, names)), bool(record.summary.get("class_token")))

    @property
    def views(self) -> int:
        """1, or 2 where the mirrored images were encoded too."""
        return int(self.parts[0].shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """[tokens, dim] of one image's patches."""
        return int(self.parts[0].shape[2]) - self.class_token, int(self.parts[0].shape[3])

    def patches(self, row: int, view: int = 0) -> np.ndarray[Any, Any]:
        """f2 [tokens, dim]."""
        return np.asarray(self.parts[row // PART][row % PART, view, int(self.class_token) :])

    def class_vector(self, row: int, view: int = 0) -> np.ndarray[Any, Any]:
        """The class token, f2 [dim]."""
        return np.asarray(self.parts[row // PART][row % PART, view, 0])

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def rms(self) -> np.ndarray[Any, Any]:
        """Root mean square of every channel of the patches over all picks and views, float32 [dim]."""
        return codecs.channel_rms(self.patches(row, view) for row in range(len(self)) for view in range(self.views))


def seen(pixels: np.ndarray[Any, Any], view: View) -> np.ndarray[Any, Any]:
    """Pixels [N, S, S, 3] as ``view`` shows them."""
    return pixels if view == "orig" else np.ascontiguousarray(pixels[:, :, ::-1])


def columns(
    latent: LatentSpec, views: Sequence[View], vision: tuple[str, str, tuple[int, int], bool] | None
) -> list[Column]:
    """An artifact's columns: ``vision`` is column, codec, [tokens, dim], and whether there is a class token."""
    found = []
    for view in views:
        shape = (len(latent.moments), latent.channels, latent.size, latent.size)
        found.append(Column(view_column(LATENT, view), latent.dtype, shape))
        if vision is not None:
            name, codec, tokens, class_token = vision
            found += codecs.columns(view_column(name, view), codec, tokens)
            if class_token:
                found.append(Column(view_column(f"{name}_cls", view), "f2", tokens[1:]))
    return found


def vision_facts(config: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of vision tokens: the encoder, their column, and what was asked of `attach`.

    ``config`` and ``summary`` are those of the attachment's record.
    """
    encoder = {name: summary[name] for name in summary if name != "spec"}
    asked = {**config, "vision": summary.get("spec")}
    return {**encoder, "column": _column_name(summary["name"]), "asked": asked}


def _column_name(encoder: str) -> str:
    name = "".join(c if c.isascii() and c.isalnum() else "_" for c in encoder.lower()).strip("_")
    # Twelve short of the format's 32: other columns are called this and "_hflip", "_scale" or "_cls".
    return f"vision_{name}"[:20] if name in ("", LATENT, *RESERVED) else name.removeprefix("timm_")[:20]
