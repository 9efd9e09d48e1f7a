"""Vision tokens of the picks: as they wait in the workspace, and as a token codec stores them in the artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from d2c.workspace import Stage
from formats import codecs
from formats.files import atomic
from formats.schema import INT4, INT8, LATENT, RAW, RESERVED

PART = 256
"""Images in a part: 100 MB of tokens at 256 x 768 fp16."""

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
    """Finished vision tokens, memory-mapped: row i belongs to the i-th pick in key order."""

    parts: list[np.ndarray[Any, Any]]

    @staticmethod
    def open(stage: Stage) -> VisionTokens:
        record = stage.require("d2c attach")
        names = sorted(name for name in record.outputs if name.endswith(".npy"))
        return VisionTokens([np.load(stage.output(name), mmap_mode="r", allow_pickle=False) for name in names])

    @property
    def shape(self) -> tuple[int, ...]:
        """[tokens, dim] of one image."""
        return tuple(self.parts[0].shape[1:])

    def __getitem__(self, row: int) -> np.ndarray[Any, Any]:
        return np.asarray(self.parts[row // PART][row % PART])

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def rms(self) -> np.ndarray[Any, Any]:
        """Root mean square of every channel over all picks, float32 [dim]."""
        return codecs.channel_rms(self[row] for row in range(len(self)))


def vision_facts(config: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of vision tokens: the encoder, their column, and what was asked of `attach`.

    ``config`` and ``summary`` are those of the attachment's record.
    """
    encoder = {name: summary[name] for name in summary if name != "spec"}
    asked = {**config, "vision": summary.get("spec")}
    return {**encoder, "column": _column_name(summary["name"]), "asked": asked}


def _column_name(encoder: str) -> str:
    name = "".join(c if c.isascii() and c.isalnum() else "_" for c in encoder.lower()).strip("_")
    # Six short of the format's 32: a codec's scales are in a column of this name and "_scale".
    return f"vision_{name}"[:26] if name in ("", LATENT, *RESERVED) else name[:26]
