"""Rank vision encoders as alignment targets on the user's own images, without training: iREPA's measures.

Source of the measures and of the correlations: "What matters for Representation Alignment: Global Information or
Spatial Structure?" (arXiv 2512.10794), section 3 and appendix B. All rest on K(t, t'), the cosine between the tokens t
and t' of one image, and on d(t, t'), the Manhattan distance of their cells. Its fourth measure, SRSS, needs an object
mask of every image from a segmentation model, and is not here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from d2c import picks as picked
from d2c import runtime
from d2c.encoders import first_line
from d2c.encoding import open_for_scores
from d2c.errors import D2CError
from d2c.labelling import reopen
from d2c.picks import Picks
from d2c.progress import Progress, Silent
from d2c.sources import Source
from d2c.workspace import SCORES, Workspace
from formats.files import read_table

Tokens = NDArray[np.float32]
"""float32 [N, grid, grid, D]."""
PerImage = NDArray[np.float64]
"""float64 [N]."""

CAVEAT = (
    "These measures predict, they do not prove: over 27 encoders they went with the FID of SiT models trained with "
    "REPA on ImageNet at 256 px (Pearson |r|: LDS 0.852, CDS 0.847, RMSC 0.888; ImageNet accuracy 0.260; arXiv "
    "2512.10794). Other images, other losses and encoders close to each other may order otherwise; training decides."
)


def lds(tokens: Tokens) -> PerImage:
    """Local against distant similarity: E[K | 0 < d < grid / 2] - E[K | d >= grid / 2]; more is better.

    As the paper's text has it, over all pairs alike; its code compares d = 1 with d >= 6.
    """
    means, pairs = correlogram(tokens)
    # A grid of 2 x 2 would have nothing that is nearer than half of it.
    local = np.arange(1, len(pairs) + 1) < max(2, tokens.shape[1] / 2)
    near: PerImage = np.average(means[:, local], axis=1, weights=pairs[local])
    far: PerImage = np.average(means[:, ~local], axis=1, weights=pairs[~local])
    return near - far


def cds(tokens: Tokens) -> PerImage:
    """Correlation decay slope: -b of the least-squares line a + b d to E[K | d], d = 1 .. grid / 2; more is better.

    The paper leaves the range open; its code ends at 8 on a grid of 16.
    """
    distances = np.arange(1, max(2, tokens.shape[1] // 2) + 1)
    means = correlogram(tokens)[0][:, : len(distances)]
    centred = distances - distances.mean()
    slope: PerImage = -(means @ centred) / (centred @ centred)
    return slope


def rmsc(tokens: Tokens) -> PerImage:
    """RMS spatial contrast: sqrt(mean over t of |x_t - mean of x|^2), x_t the tokens at length 1; more is better."""
    unit = _unit(tokens)
    found: PerImage = np.sqrt(((unit - unit.mean(axis=1, keepdims=True)) ** 2).sum(axis=2).mean(axis=1, dtype=float))
    return found


MEASURES: dict[str, Callable[[Tokens], PerImage]] = {"lds": lds, "cds": cds, "rmsc": rmsc}


def correlogram(tokens: Tokens) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """E[K | d] of every image at d = 1 .. 2 grid - 2: float64 [N, 2 grid - 2]; and how many pairs lie that far apart.

    Raises:
        ValueError: the grid is a single cell, which has no pairs.
    """
    side = tokens.shape[1]
    if side < 2:
        raise ValueError("a correlogram needs a grid of at least 2 x 2 tokens")
    unit = _unit(tokens)
    cosines = (unit @ unit.transpose(0, 2, 1)).reshape(len(unit), -1)
    row, column = np.divmod(np.arange(side * side), side)
    apart = np.abs(row[:, None] - row) + np.abs(column[:, None] - column)
    pairs = np.bincount(apart.ravel()).astype(float)[1:]
    sums = np.stack([np.bincount(apart.ravel(), weights=values)[1:] for values in cosines])
    return sums / pairs, pairs


@dataclass(frozen=True, kw_only=True)
class Row:
    """One encoder. ``error`` says why there are no figures; else each measure is (mean, its standard error)."""

    encoder: str
    error: str | None = None
    measures: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds_per_1000: float | None = None
    """Of encoding alone; images are read beside it."""
    dim: int | None = None
    grid: int | None = None


@dataclass(frozen=True)
class Ranking:
    """Encoders by LDS, the best first, those that failed last; ``images`` is how many each one saw."""

    rows: list[Row]
    images: int
    caveat: str = CAVEAT


def rank(
    workspace: Path,
    encoders: Sequence[str],
    *,
    grid: int,
    images: int = 2000,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 64,
    threads: int = 4,
    progress: Progress | None = None,
) -> Ranking:
    """Measure every encoder (a name as ``attach`` takes it) on the same ``images`` of the scored ones, drawn by seed.

    ``grid`` is that of the model to be trained: measures of different grids do not compare. One batch of tokens is in
    memory at a time, and one encoder.

    Raises:
        D2CError: nothing is scored yet, the images are gone or changed, or the grid is one cell. An encoder that cannot
            be opened or run gives a row with its error.
    """
    if grid < 2:
        raise D2CError("similarity over distance needs a grid of tokens", found=f"--grid {grid}", expected="2 or more")
    place, where = Workspace(workspace), runtime.resolve_device(device)
    source = reopen(place)
    table = read_table(place.scores.output(SCORES), columns=["key", "label", "xxh3"]).sort_by("key")
    drawn = np.sort(runtime.rng("rank encoders", seed).permutation(len(table))[:images])
    job = _Job(
        workspace=place,
        source=source,
        sample=Picks(table.take(drawn)),
        grid=grid,
        seed=seed,
        device=where,
        precision=runtime.resolve_precision(precision, where),
        batch_size=batch_size,
        threads=threads,
    )
    with runtime.one_thread(where):
        rows = [_measure(name, job, progress or Silent()) for name in encoders]
    return Ranking(sorted(rows, key=lambda row: -row.measures["lds"][0] if row.measures else np.inf), len(drawn))


@dataclass(frozen=True, kw_only=True)
class _Job:
    workspace: Workspace
    source: Source
    sample: Picks
    grid: int
    seed: int
    device: torch.device
    precision: str
    batch_size: int
    threads: int


def _measure(name: str, job: _Job, progress: Progress) -> Row:
    try:
        _, encoder, classes = open_for_scores(name, job.grid, job.workspace, job.device, job.seed)
    except D2CError as error:
        return Row(encoder=name, error=str(error))
    labels = classes[job.sample.table["label"].to_numpy()]
    size = int(job.workspace.scores.require("d2c score DIR").config["size"])
    found: dict[str, list[PerImage]] = {measure: [] for measure in MEASURES}
    seconds: list[float] = []
    batches = picked.read(
        job.source, job.sample, range(len(job.sample)), size, batch=job.batch_size, threads=job.threads
    )
    with progress.bar(f"rank {name}", len(job.sample), "image") as bar:
        for batch in batches:
            start = time.perf_counter()
            try:
                with runtime.autocast(job.precision, job.device):
                    flat = encoder.encode(batch.pixels, labels[batch.indices])[:, -(job.grid**2) :]
            except D2CError as error:
                return Row(encoder=name, error=str(error))
            except torch.OutOfMemoryError as error:
                return Row(encoder=name, error=f"{first_line(error)} (a smaller batch may fit)")
            seconds.append((time.perf_counter() - start) / len(batch))
            tokens = flat.astype(np.float32).reshape(len(flat), job.grid, job.grid, -1)
            for measure, of in MEASURES.items():
                found[measure].append(of(tokens))
            bar.advance(len(batch))
    values = {measure: np.concatenate(parts) for measure, parts in found.items()}
    return Row(
        encoder=name,
        measures={m: (float(v.mean()), float(v.std() / max(1, len(v) - 1) ** 0.5)) for m, v in values.items()},
        # The first batch also pays for what a device sets up once.
        seconds_per_1000=1000 * float(np.mean(seconds[1:] or seconds)),
        dim=encoder.info.dim,
        grid=job.grid,
    )


def _unit(tokens: Tokens) -> Tokens:
    """[N, grid, grid, D] -> [N, grid * grid, D] of length 1; a token of zeros stays so."""
    flat = tokens.reshape(len(tokens), -1, tokens.shape[-1])
    unit: Tokens = flat / np.maximum(np.linalg.norm(flat, axis=2, keepdims=True), np.float32(1e-8))
    return unit
