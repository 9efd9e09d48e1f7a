"""Shards -> batches. Position is one integer: how many samples an endless run of shuffled epochs has given.

Every sample comes exactly once per epoch, on any number of ranks, without padding and without dropping; a run that
resumes on another number of ranks sees the same global batches.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2c import runtime
from d2c.errors import D2CError
from d2c.latents import LatentSpec
from formats import Artifact
from formats.schema import LATENT


def global_batch(position: int, batch_size: int, samples: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Sample numbers at ``position`` .. ``position + batch_size`` of the endless run of per-epoch permutations."""
    pieces = []
    while batch_size > 0:
        epoch, offset = divmod(position, samples)
        take = min(batch_size, samples - offset)
        pieces.append(_epoch(seed, epoch, samples)[offset : offset + take])
        position, batch_size = position + take, batch_size - take
    return np.concatenate(pieces)


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, samples: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    # Kept, since a million samples take longer to shuffle than a step to compute.
    return runtime.rng("epoch", seed, epoch).permutation(samples)


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch, on the device."""

    raw: Tensor  # latents_raw [n, M, C, H, W], in the artifact's dtype
    labels: Tensor  # int64 [n]
    tokens: Tensor | None  # [n, T, D]


class Loader:
    """Batches of an artifact by step.

    Columns are held in memory on the device where they fit into ``budget`` of its free memory, else read from the
    memory-mapped shards. Hashes are checked when a sample is first touched.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        token_column: str | None = None,
        rank: int = 0,
        world: int = 1,
        budget: float = 0.6,
    ) -> None:
        if batch_size % world:
            divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
            raise D2CError(
                "the batch cannot be shared equally by the ranks",
                found=f"batch {batch_size} on {world} ranks",
                expected=f"a number of ranks among {divisors}",
                hint=f"give --batch-size {batch_size // world * world or world}",
            )
        self.artifact, self.batch_size, self.seed, self.device = artifact, batch_size, seed, device
        self._rank, self._world, self._token_column = rank, world, token_column
        self._labels = torch.from_numpy(np.asarray(artifact.labels, dtype=np.int64)).to(device)
        self._order: tuple[int, np.ndarray[Any, np.dtype[np.int64]]] | None = None
        columns = [LATENT, *([token_column] if token_column else [])]
        size = sum(column.nbytes * len(artifact) for column in artifact.columns if column.name in columns)
        self.resident = size < budget * _free_memory(device)
        everything = np.arange(len(artifact))
        self._columns = {name: self._fetch(name, everything) for name in columns} if self.resident else {}

    @property
    def latent(self) -> LatentSpec:
        return LatentSpec.from_dict(self.artifact.manifest["latent"])

    def batch(self, step: int) -> Batch:
        """This rank's images of global batch number ``step``."""
        rows = self._global(step)[self._rank :: self._world]
        index = torch.from_numpy(rows).to(self.device)
        return Batch(
            raw=self._take(LATENT, rows, index),
            labels=self._labels[index],
            tokens=self._take(self._token_column, rows, index) if self._token_column else None,
        )

    def _global(self, step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return global_batch(step * self.batch_size, self.batch_size, len(self.artifact), self.seed)

    def _take(self, column: str, rows: np.ndarray[Any, Any], index: Tensor) -> Tensor:
        return self._columns[column][index] if self.resident else self._fetch(column, rows)

    def _fetch(self, column: str, rows: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(self.artifact.stack(column, rows)).to(self.device)


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    # SC_AVPHYS_PAGES counts what nobody uses at all, so a warm page cache looks like a full machine: take the half.
    return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
