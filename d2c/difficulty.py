"""The losses of a frozen denoiser on the images of a source, batch by batch: what a score is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from d2c import batches, runtime
from d2c.batches import Batch
from d2c.duplicates import fingerprints
from d2c.errors import D2CError
from d2c.estimator import noise_of, timesteps_of
from d2c.images import gradient_energy
from d2c.latents import LatentCodec, LatentSpec, open_codec, to_model
from d2c.picks import class_indices
from d2c.score_table import PART_SCHEMA
from d2c.scorers import Denoiser, load_denoiser
from d2c.sources import Source
from d2c.throughput import Coming, compile_blocks, one_behind, padded, to_device


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the losses; `d2c.scoring.ScoringConfig` says what each means."""

    scorer: str
    objective: str | None
    class_map: Path | None
    codec: str
    size: int
    estimator: Literal["stratified", "paper"]
    evals: int
    batch_size: int
    precision: str
    compile: bool
    seed: int
    device: str
    threads: int


@dataclass
class Difficulty:
    """A frozen denoiser with what it needs to judge the images of a source."""

    settings: Settings
    source: Source
    denoiser: Denoiser
    codec: LatentCodec
    labels: np.ndarray[Any, np.dtype[np.int64]]
    """The scorer's index of each class of the source."""
    device: torch.device

    @staticmethod
    def open(settings: Settings, source: Source) -> Difficulty:
        device = runtime.resolve_device(settings.device)
        denoiser = load_denoiser(settings.scorer, device=device, objective=settings.objective)
        codec = open_codec(settings.codec, settings.size, device)
        check_shapes(denoiser, codec.spec)
        if settings.compile:
            compile_blocks(denoiser.model, device)
        return Difficulty(
            settings, source, denoiser, codec, class_indices(source, denoiser, settings.class_map), device
        )

    def tables(self, indices: list[int]) -> Iterator[pa.Table]:
        """One table (`PART_SCHEMA`) per batch of ``indices``."""
        settings = self.settings
        loaded = batches.load(self.source, indices, settings.size, batch=settings.batch_size, threads=settings.threads)
        for batch, found in one_behind(((batch, self._begin(batch)) for batch in loaded), self.device):
            rows: list[dict[str, Any]] = [{"key": bad.key, "reason": bad.reason} for bad in batch.bad]
            if found is not None:
                losses, times = found[0].numpy(), found[1]
                pixels, hashed = fingerprints(batch.pixels)
                gradients = gradient_energy(batch.pixels)
                rows += [
                    {
                        "key": self.source.keys[index],
                        "label": int(self.source.labels[index]),
                        "losses": losses[row],
                        "times": None if times is None else times[row],
                        "xxh3": batch.digests[row],
                        "bytes": batch.sizes[row],
                        "width": batch.crops[row][0],
                        "height": batch.crops[row][1],
                        "gradient": gradients[row],
                        "pixels_xxh3": pixels[row],
                        "phash": hashed[row],
                    }
                    for row, index in enumerate(batch.indices)
                ]
            yield pa.Table.from_pylist(rows, schema=PART_SCHEMA)

    def _begin(self, batch: Batch) -> tuple[Coming, np.ndarray[Any, np.dtype[np.float32]] | None] | None:
        if not len(batch.indices):
            return None
        keys = [self.source.keys[i] for i in batch.indices]
        return self.losses(batch.pixels, keys, self.labels[self.source.labels[batch.indices]])

    @torch.inference_mode()
    def losses(
        self, pixels: np.ndarray[Any, Any], keys: list[str], labels: np.ndarray[Any, Any]
    ) -> tuple[Coming, np.ndarray[Any, np.dtype[np.float32]] | None]:
        """Denoising losses of ``pixels`` u1 [N, S, S, 3], one column per evaluation: f4 [N, evals].

        And their times, f4 [N, evals], where they are not the same for all images.
        """
        settings = self.settings
        count, rows = len(keys), settings.batch_size
        pixels = padded(torch.from_numpy(pixels), rows, self.device).numpy()
        raw = to_device(self.codec.encode(pixels), self.device)
        latents = to_model(raw, self.codec.spec)  # [N, C, H, W]
        classes = padded(to_device(labels, self.device), rows, self.device)
        columns, times = [], []
        for j in range(settings.evals):
            t = timesteps_of(settings.estimator, settings.seed, j, settings.evals, keys)
            noise = noise_of(settings.estimator, settings.seed, j, keys, tuple(latents.shape[1:])).to(self.device)
            noise = noise if len(noise) == 1 else padded(noise, rows, self.device)
            given = padded(t.to(self.device), rows, self.device)
            with runtime.autocast(runtime.resolve_precision(settings.precision, self.device), self.device):
                columns.append(self.denoiser.loss(latents, noise.expand_as(latents), given, classes))
            times.append(t)
        own = torch.stack(times, dim=1).numpy() if settings.estimator == "paper" else None
        return Coming(torch.stack(columns, dim=1)[:count].float()), own


def check_shapes(denoiser: Denoiser, codec: LatentSpec) -> None:
    """The denoiser reads what the codec makes.

    Raises:
        D2CError: it reads latents of another shape.
    """
    want = (denoiser.spec.channels, denoiser.spec.input_size)
    have = (codec.channels, codec.size)
    if want != have:
        raise D2CError(
            "the scorer reads latents of another shape",
            found=f"{have[0]} x {have[1]} x {have[1]} (codec {codec.codec})",
            expected=f"{want[0]} x {want[1]} x {want[1]}",
            hint="give --codec and --size as the scorer was trained with, or --scorer train",
        )
