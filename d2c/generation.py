"""Sample: images of a model, as a grid to look at and, on request, one ``.npz`` to measure elsewhere.

Work is cut into parts, one for each batch, so that a kill costs one batch, and any number of processes share the rest.
The parts are merged without ever being in memory together, and removed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from d2c import runtime
from d2c.config import execution, identity
from d2c.errors import D2CError, UsageError
from d2c.generator import Generator, Labels, grid, sample_seeds, save_png
from d2c.npz import exported
from d2c.parts import Part, ToDo, require_all, split, work
from d2c.progress import Bar, Progress, Silent
from d2c.runtime import Ranks
from d2c.sampling import SamplerConfig
from d2c.workspace import Stage
from formats.files import atomic, read_json, remove_tree, write_json
from formats.hashing import xxh3_json

GRID, ARRAYS, RECORD = "grid.png", "samples.npz", "samples.json"
SHOWN = 100
"""Images on the grid; the rest is only in the arrays."""
_PARTS = "samples.parts"
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What to draw: ``count`` images of a run, or of a weight file, its classes equally often or at random."""

    run: Path = execution()
    out: Path = execution()
    count: int = 64
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    labels: Literal["balanced", "random"] = "balanced"
    seed: int = 0
    npz: bool = False
    objective: str | None = execution(None)
    codec: str | None = execution(None)
    device: str = execution("auto")
    gpus: int = execution(1)
    batch_size: int = execution(64)
    overwrite: bool = execution(False)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError("there is nothing to sample", found=self.count, expected="--count 64")
        if self.batch_size < 1:
            raise UsageError("a batch has at least one image", found=self.batch_size, expected="--batch-size 64")

    def open(self) -> Generator:
        """The model, on this rank's device."""
        return Generator.open(self.run, runtime.resolve_device(self.device), self.codec, objective=self.objective)

    def labels_of(self, generator: Generator) -> Labels:
        """The class of each image [count]."""
        return generator.labels(self.labels, self.seed, self.count)


@dataclass(frozen=True)
class Plan:
    """What `run` will do."""

    config: GenerationConfig
    generator: Generator
    asked: dict[str, Any]
    done: bool
    leftover: bool
    """A kill came between the result and the removal of its parts."""

    @property
    def stage(self) -> Stage:
        return Stage(self.config.out / _PARTS, "samples", 1)

    @property
    def parts(self) -> list[Part]:
        """One for each batch, in a folder named by what decides the pixels."""
        config = self.config
        pixels = {name: value for name, value in self.asked.items() if name != "npz"}
        folder = self.stage.path / xxh3_json({**pixels, "batch_size": config.batch_size})
        return split(config.count, config.batch_size, folder, ".npy")


@dataclass(frozen=True)
class Result:
    """Where the images are; ``seconds`` are of one worker, over interrupted runs."""

    path: Path
    images: int
    files: list[str]
    seconds: float


@dataclass(frozen=True)
class _Job:
    config: GenerationConfig
    stage: Stage
    todo: ToDo
    progress: Progress
    generator: Generator | None
    """None where other processes work, who open their own."""


def plan(config: GenerationConfig) -> Plan:
    """Open the model.

    Raises:
        D2CError: this is no finished run and no weight file, or ``out`` is a file.
        UsageError: the sampler is for models of another kind, or the run cannot be guided.
    """
    if config.out.exists() and not config.out.is_dir():
        raise D2CError("samples go into a folder", where=config.out, found="a file", hint="choose another --out")
    generator = config.open()
    config = replace(config, sampler=generator.guided(config.sampler).resolved(generator.denoiser.objective.name))
    denoiser = generator.denoiser
    model = {"model": denoiser.spec.name, "reverse_time": denoiser.reverse_time}
    asked = {**identity(config), **model, **generator.digests()}
    done = not config.overwrite and _finished(config.out, asked)
    return Plan(config, generator, asked, done, leftover=(config.out / _PARTS).exists())


def run(plan: Plan, progress: Progress | None = None) -> Result:
    """Draw the images that are not drawn yet and write them all, unless the same ones are there."""
    config = plan.config
    if not plan.done or plan.leftover:
        lock = runtime.once(plan.stage.lock)
        try:
            if not plan.done:
                runtime.once(lambda: _begin(plan))
                _work(plan, progress or Silent())
                runtime.once(lambda: _merge(plan))
            runtime.once(lambda: _clear(config.out))
        finally:
            if lock:
                lock.release()
    record = read_json(config.out / RECORD)
    return Result(path=config.out, images=config.count, files=list(record["files"]), seconds=float(record["seconds"]))


def _finished(out: Path, asked: dict[str, Any]) -> bool:
    if not (out / RECORD).exists():
        return False
    record = read_json(out / RECORD)
    return bool(record["asked"] == asked) and all((out / name).exists() for name in record["files"])


def _begin(plan: Plan) -> None:
    out = plan.config.out
    if plan.config.overwrite and (out / RECORD).exists():
        # Said again after a kill, --overwrite finds no record, and keeps what is drawn since.
        _forget(out)
        _clear(out)
    if not any(part.done for part in plan.parts):
        plan.stage.forget_cost()


def _work(plan: Plan, progress: Progress) -> None:
    config, todo = plan.config, ToDo.of(plan.parts)
    workers = min(config.gpus, max(1, len(todo.parts)))
    here = workers == 1 or runtime.ranks().world > 1
    job = _Job(config, plan.stage, todo, progress, plan.generator if here else None)
    runtime.launch(_draw_parts, job, workers=workers, device=plan.generator.device)


def _draw_parts(ranks: Ranks, job: _Job) -> None:
    config = job.config
    generator = job.generator or config.open()
    labels, seeds = config.labels_of(generator), sample_seeds(config.seed, config.count)
    size = generator.codec.spec.pixels

    def make(part: Part, bar: Bar) -> None:
        rows = slice(part.items.start, part.items.stop)
        chunks = generator.stream(labels[rows], seeds[rows], config.sampler, batch=config.batch_size)
        with atomic(part.path) as temporary, temporary.open("wb") as stream:
            _write_array(stream, chunks, (len(part.items), size, size, 3))
        bar.advance(len(part.items) * ranks.world)

    with runtime.one_thread(generator.device):
        work(job.todo, make, ranks=ranks, stage=job.stage, progress=job.progress, label="sample")


def _merge(plan: Plan) -> None:
    config, parts = plan.config, plan.parts
    require_all(parts)
    _forget(config.out)
    files = [GRID]
    shown = np.concatenate(list(_chunks(parts[: -(-SHOWN // config.batch_size)])))[:SHOWN]
    columns = min(10, max(1, int(np.ceil(np.sqrt(len(shown))))))
    save_png(grid(shown, columns, side=64), config.out / GRID)
    if config.npz:
        size = plan.generator.codec.spec.pixels
        labels = config.labels_of(plan.generator)
        for _ in exported(config.out / ARRAYS, _chunks(parts), config.count, size, labels):
            pass  # written as they come by
        files.append(ARRAYS)
    seconds = round(plan.stage.spent(), 2)
    write_json(config.out / RECORD, {"asked": plan.asked, "files": files, "seconds": seconds})


def _forget(out: Path) -> None:
    """Remove the earlier drawing: what its record names, so that no file lies beside the record of another one."""
    if (out / RECORD).exists():
        for name in {GRID, ARRAYS}.intersection(read_json(out / RECORD)["files"]):
            (out / name).unlink(missing_ok=True)
        (out / RECORD).unlink()


def _clear(out: Path) -> None:
    remove_tree(out / _PARTS)
    for name in (_PARTS, GRID, ARRAYS, RECORD):
        for left in out.glob(f".tmp-*-{name}*"):  # what kills left, as large as all the images
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _chunks(parts: Iterable[Part]) -> Iterator[Pixels]:
    for part in parts:
        yield np.load(part.path)


def _write_array(stream: Any, chunks: Iterable[Pixels], shape: tuple[int, ...]) -> None:
    """What ``np.save`` writes of the joined chunks, one after another."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    for chunk in chunks:
        stream.write(np.ascontiguousarray(chunk).tobytes())
