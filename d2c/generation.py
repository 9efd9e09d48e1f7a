"""Sample: images from a finished run, as a grid to look at and, on request, one ``.npz`` to measure elsewhere."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Iterable, Iterator
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
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


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
    asked = {**identity(config), **generator.digests()}
    done = not config.overwrite and _finished(config.out, asked)
    return Plan(config, generator, asked, done)


def run(plan: Plan, progress: Progress | None = None) -> Result:
    """Draw the images and write them, unless the same ones are there."""
    progress = progress or Silent()
    config = plan.config
    if not plan.done:
        runtime.once(lambda: _draw(plan, progress))
    record = read_json(config.out / RECORD)
    return Result(path=config.out, images=config.count, files=list(record["files"]), seconds=float(record["seconds"]))


def _finished(out: Path, asked: dict[str, Any]) -> bool:
    if not (out / RECORD).exists():
        return False
    record = read_json(out / RECORD)
    return record["asked"] == asked and all((out / name).exists() for name in record["files"])


def _draw(plan: Plan, progress: Progress) -> None:
    config, generator, start = plan.config, plan.generator, time.perf_counter()
    labels = balanced_labels(config.count, len(generator.classes))
    seeds = sample_seeds(config.seed, config.count)
    chunks = generator.stream(labels, seeds, config.sampler, batch=config.batch_size, progress=progress)
    shown: list[Pixels] = []
    watched = _keep(chunks, shown)
    files = [GRID]
    if config.npz:
        size = generator.codec.spec.pixels
        _write_npz(config.out / ARRAYS, watched, (config.count, size, size, 3), labels)
        files.append(ARRAYS)
    else:
        for _ in watched:
            pass
    columns = min(10, max(1, int(np.ceil(np.sqrt(min(config.count, SHOWN))))))
    save_png(grid(np.concatenate(shown), columns, side=64), config.out / GRID)
    seconds = round(time.perf_counter() - start, 2)
    write_json(config.out / RECORD, {"asked": plan.asked, "files": files, "seconds": seconds})


def _keep(chunks: Iterable[Pixels], shown: list[Pixels]) -> Iterator[Pixels]:
    """The chunks as they are; the first ``SHOWN`` images of them also go into ``shown``."""
    kept = 0
    for chunk in chunks:
        if kept < SHOWN:
            shown.append(chunk[: SHOWN - kept])
            kept += len(shown[-1])
        yield chunk


def _write_npz(path: Path, chunks: Iterable[Pixels], shape: tuple[int, ...], labels: np.ndarray[Any, Any]) -> None:
    """What ``np.savez(path, arr_0=pixels, labels=labels)`` writes, without the pixels ever being in memory at once."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for chunk in chunks:
                member.write(np.ascontiguousarray(chunk).tobytes())
        with archive.open("labels.npy", "w") as member:
            np.lib.format.write_array(member, labels, allow_pickle=False)
