"""Shards -> batches. Position is one integer: how many samples an endless run of shuffled epochs has given.

Every sample comes exactly once per epoch, on any number of ranks, without padding and without dropping; a run that
resumes on another number of ranks sees the same global batches.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2c import runtime
from d2c.errors import D2CError, UsageError
from d2c.latents import LatentSpec
from d2c.recipe import Flip
from d2c.transport import Objective
from formats import Artifact
from formats.order import canonical, epoch_order
from formats.schema import INT8, LATENT, RMS, Column, View, view_column

_HOST = torch.device("cpu")
STAGED = 2**26
"""Bytes of a column, 64 MiB, that pass through host memory at once on their way to the device."""


def global_batch(position: int, batch_size: int, samples: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Numbers at ``position`` .. ``position + batch_size`` of the endless run of per-epoch permutations of samples."""
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
    return epoch_order(samples, seed, epoch)


def require_equal_shares(batch_size: int, world: int) -> None:
    """Raises: UsageError: the images of a batch cannot be shared equally by ``world`` ranks."""
    if batch_size % world:
        divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
        raise UsageError(
            "the batch cannot be shared equally by the ranks",
            found=f"batch {batch_size} on {world} ranks",
            expected=f"a number of ranks among {divisors}",
            hint=f"give --batch-size {batch_size // world * world or world}",
        )


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch, on the device."""

    raw: Tensor  # latents_raw [n, M, C, H, W], in the artifact's dtype
    labels: Tensor  # int64 [n]
    tokens: Tensor | None  # [n, T, D], decoded: float32 where they have a codec
    class_token: Tensor | None  # float32 [n, D]
    text: Tensor | None  # float32 [n, W, D]
    mask: Tensor | None  # u1 [n, W]


class Loader:
    """Batches of an artifact by step.

    Columns are ``resident`` on the device where they fit into ``budget`` of this rank's share of its free memory, else
    in this machine's memory, else they are read from the memory-mapped shards. Hashes are checked when a sample is
    first touched. Gradients, moments, averages and activations are yet to come when the columns are loaded, hence a
    budget below one half. Tokens stay in their codec until a batch of them is on the device.

    The order follows from the artifact's content and the seed alone: an artifact that was repacked into another
    container or other shards gives the same batches.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        token_column: str | None = None,
        class_column: str | None = None,
        text: bool = False,
        flip: Flip = "none",
        rank: int = 0,
        world: int = 1,
        budget: float = 0.4,
    ) -> None:
        require_equal_shares(batch_size, world)
        if not 0 <= rank < world:
            raise D2CError("there is no such rank", found=f"rank {rank} of {world}", expected=f"0 to {world - 1}")
        known = [column.name for column in artifact.columns]
        if token_column is not None and token_column not in known:
            raise D2CError(
                "there is no such column", where=artifact.path, found=token_column, expected=", ".join(known)
            )
        self.artifact, self.batch_size, self.seed, self.device = artifact, batch_size, seed, device
        self._rank, self._world, self._flip = rank, world, flip
        self._token_column, self._class_column = token_column, class_column
        self._labels = torch.from_numpy(np.asarray(artifact.labels, dtype=np.int64)).to(device)
        self._order = canonical(artifact.index)
        views: list[View] = ["orig", "hflip"] if flip == "stored" else ["orig"]
        wanted = [view_column(name, view) for name in (LATENT, token_column, class_column) if name for view in views]
        used = [column for column in artifact.columns if column.name in wanted]
        self._coded = {column.name: column for column in used if column.scale_column}
        self._rms = {name: torch.from_numpy(artifact.codec_array(name, RMS)).to(device) for name in self._coded}
        names = [*wanted, *(column.scale_column for column in used)]
        columns = [column for column in artifact.columns if column.name in names]
        size = sum(column.nbytes * len(artifact) for column in columns)
        homes = [home for home in (device, _HOST) if size < budget * _free_memory(home, world)]
        self.resident: torch.device | None = homes[0] if homes else None
        self._columns = {column.name: self._whole(column, homes[0]) for column in columns} if homes else {}
        tables = [artifact.table(name) for name in ("text_embeds", "text_mask")] if text else []
        self._text = [torch.from_numpy(table).to(device) for table in tables]

    @property
    def latent(self) -> LatentSpec:
        return LatentSpec.from_dict(self.artifact.manifest["latent"])

    def batch(self, step: int) -> Batch:
        """This rank's images of global batch number ``step``."""
        rows = self._global(step)[self._rank :: self._world]
        labels = self._labels[torch.from_numpy(rows).to(self.device)]
        text, mask = (table[labels] for table in self._text) if self._text else (None, None)
        mirrored = self._mirrored(step)
        return Batch(
            raw=self._seen(LATENT, rows, mirrored),
            labels=labels,
            tokens=self._seen(self._token_column, rows, mirrored) if self._token_column else None,
            class_token=self._seen(self._class_column, rows, mirrored).float() if self._class_column else None,
            text=text.float() if text is not None else None,
            mask=mask,
        )

    def draws(
        self, step: int, objective: Objective, class_dropout: float
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Times, noise, posterior noise and null mask: drawn for the whole batch, cut to this rank's images."""
        latent, count = self.latent, self.batch_size
        generator = runtime.generator("step", self.seed, step, device=self.device)
        shape = (count, latent.channels, latent.size, latent.size)
        mine = slice(self._rank, None, self._world)
        t = objective.sample_t(count, generator)[mine]
        noise = torch.randn(shape, generator=generator, device=self.device)[mine]
        null = (torch.rand(count, generator=generator, device=self.device) < class_dropout)[mine]
        posterior = None
        if len(latent.moments) > 1:
            posterior = torch.randn(shape, generator=generator, device=self.device)[mine]
        return t, noise, posterior, null

    def class_noise(self, step: int, dim: int) -> Tensor:
        """Noise for class tokens, float32 [n, dim]; the other draws do not depend on whether there are any."""
        generator = runtime.generator("class token", self.seed, step, device=self.device)
        noise = torch.randn((self.batch_size, dim), generator=generator, device=self.device)
        return noise[self._rank :: self._world]

    def _global(self, step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        position = step * self.batch_size
        rows: np.ndarray[Any, np.dtype[np.int64]] = self._order[
            global_batch(position, self.batch_size, len(self.artifact), self.seed)
        ]
        return rows

    def _mirrored(self, step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Which images of this rank's batch are mirrored: drawn for the whole batch, on every device alike."""
        if self._flip == "none":
            return np.empty(0, np.int64)
        turned = runtime.rng("flip", self.seed, step).random(self.batch_size) < 0.5
        return np.flatnonzero(turned[self._rank :: self._world])

    def _seen(self, name: str, rows: np.ndarray[Any, Any], mirrored: np.ndarray[Any, Any]) -> Tensor:
        """Values of a column, of the mirror images where ``mirrored`` says so."""
        values = self._values(name, rows)
        if not len(mirrored):
            return values
        where = torch.from_numpy(mirrored).to(self.device)
        if self._flip == "stored":
            return values.index_copy(0, where, self._values(view_column(name, "hflip"), rows[mirrored]))
        if name == self._class_column:
            return values  # it lies nowhere
        some = values.index_select(0, where)
        if name != LATENT:
            grid = math.isqrt(some.shape[1])
            some = some.view(len(some), grid, grid, -1).flip(2).flatten(1, 2)
        else:
            some = some.flip(-1)
        return values.index_copy(0, where, some)

    def _values(self, name: str, rows: np.ndarray[Any, Any]) -> Tensor:
        """A column's values at ``rows``, decoded where it has a codec."""
        index = torch.from_numpy(rows)
        values = self._take(name, rows, index)
        if name not in self._coded:
            return values
        column = self._coded[name]
        scale = self._take(str(column.scale_column), rows, index)
        return decode_tokens(column.codec, values, scale, self._rms[name])

    def _take(self, column: str, rows: np.ndarray[Any, Any], index: Tensor) -> Tensor:
        if self.resident is None:
            return torch.from_numpy(self.artifact.stack(column, rows)).to(self.device)
        return self._columns[column].index_select(0, index.to(self.resident)).to(self.device)

    def _whole(self, column: Column, home: torch.device) -> Tensor:
        dtype = torch.from_numpy(np.empty(0, column.numpy)).dtype
        whole = torch.empty((len(self.artifact), *column.shape), dtype=dtype, device=home)
        chunk = max(1, STAGED // column.nbytes)
        for start in range(0, len(whole), chunk):
            rows = np.arange(start, min(start + chunk, len(whole)))
            whole[start : start + len(rows)] = torch.from_numpy(self.artifact.stack(column.name, rows))
        return whole


def decode_tokens(codec: str, codes: Tensor, scale: Tensor, rms: Tensor) -> Tensor:
    """`formats.codecs.decode` on any device: float32 [n, T, D] from codes [n, T, D or D/2], scale [n, T], rms [D]."""
    decoded = torch.empty((*scale.shape, len(rms)), device=codes.device)
    # On a CPU one image at a time, whose numbers stay in its cache: half the time of a whole batch.
    step = 1 if codes.device.type == "cpu" else max(1, len(codes))
    for first in range(0, len(codes), step):
        some = slice(first, first + step)
        torch.mul(_levels(codec, codes[some]), scale[some].float()[..., None] * rms, out=decoded[some])
    return decoded


def _levels(codec: str, codes: Tensor) -> Tensor:
    return codes if codec == INT8 else 2 * torch.stack([codes & 15, codes >> 4], -1).flatten(-2).float() - 15


def _free_memory(device: torch.device, world: int) -> float:
    """Bytes for this rank: every rank has a GPU of its own, and all share the machine's memory."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    # SC_AVPHYS_PAGES counts what nobody uses at all, so a warm page cache looks like a full machine: take the half.
    return 0.5 * min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _allowance()) / world


def _allowance() -> float:
    """Bytes that this process's control group may use, as a container sets them."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = Path("/sys/fs/cgroup") / name
        if file.is_file() and (text := file.read_text(encoding="ascii").strip()).isdigit():
            return float(text)
    return float("inf")
