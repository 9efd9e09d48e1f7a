"""Vision tokens of the picks as they wait in the workspace: parts of npy files, in key order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2c.workspace import Stage
from formats.files import atomic

PART = 256
"""Images in a part: 100 MB of tokens at 256 x 768 fp16."""


def save_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write an npy file, whole or not at all."""
    with atomic(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)


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
