"""Sample: images from a finished run, as a grid to look at and, on request, one ``.npz`` to measure elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from d2c import runtime
from d2c.config import execution, identity
from d2c.errors import D2CError, UsageError
from d2c.generator import Generator, balanced_labels, grid, sample_seeds, save_png
from d2c.progress import Progress, Silent
from d2c.sampling import SamplerConfig
from formats.files import atomic, read_json, write_json

GRID, ARRAYS, RECORD = "grid.png", "samples.npz", "samples.json"
SHOWN = 100
"""Images on the grid; the rest is only in the arrays."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What to draw: ``count`` images, every class equally often."""

    run: Path = execution()
    out: Path = execution()
    count: int = 64
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    seed: int = 0
    npz: bool = False
    codec: str | None = execution(None)
    device: str = execution("auto")
    batch_size: int = execution(64)
    overwrite: bool = execution(False)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError("there is nothing to sample", found=self.count, expected="--count 64")


@dataclass(frozen=True)
class Plan:
    """What `run` will do."""

    config: GenerationConfig
    generator: Generator
    asked: dict[str, Any]
    done: bool


@dataclass(frozen=True)
class Result:
    """Where the images are."""

    path: Path
    images: int
    files: list[str]
    seconds: float


def plan(config: GenerationConfig) -> Plan:
    """Open the run.

    Raises:
        D2CError: this is no finished run, or ``out`` is a file.
    """
    if config.out.exists() and not config.out.is_dir():
        raise D2CError("samples go into a folder", where=config.out, found="a file", hint="choose another --out")
    generator = Generator.open(config.run, runtime.resolve_device(config.device), config.codec)
    asked = {**identity(config), "weights_xxh3": generator.denoiser.origin["weights_xxh3"]}
    record = config.out / RECORD
    done = not config.overwrite and record.exists() and read_json(record)["asked"] == asked
    return Plan(config, generator, asked, done)


def run(plan: Plan, progress: Progress | None = None) -> Result:
    """Draw the images and write them, unless the same ones are there."""
    progress = progress or Silent()
    config = plan.config
    if not plan.done:
        runtime.once(lambda: _draw(plan, progress))
    record = read_json(config.out / RECORD)
    return Result(path=config.out, images=config.count, files=list(record["files"]), seconds=float(record["seconds"]))


def _draw(plan: Plan, progress: Progress) -> None:
    config, generator, start = plan.config, plan.generator, time.perf_counter()
    labels = balanced_labels(config.count, len(generator.classes))
    seeds = sample_seeds(config.seed, config.count)
    pixels = generator.pixels(labels, seeds, config.sampler, batch=config.batch_size, progress=progress)
    columns = min(10, max(1, int(np.ceil(np.sqrt(min(config.count, SHOWN))))))
    save_png(grid(pixels[:SHOWN], columns, side=64), config.out / GRID)
    files = [GRID]
    if config.npz:
        with atomic(config.out / ARRAYS) as temporary, temporary.open("wb") as stream:
            np.savez(stream, arr_0=pixels, labels=labels)
        files.append(ARRAYS)
    seconds = round(time.perf_counter() - start, 2)
    write_json(config.out / RECORD, {"asked": plan.asked, "files": files, "seconds": seconds})
