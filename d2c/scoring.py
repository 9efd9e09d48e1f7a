"""Score: how hard each image is for a frozen class-conditional diffusion model.

``score(x) = mean over t, eps of ||target - model(z_t, t, c)||^2`` per latent value (paper, Algorithm 2); larger is
harder. Work is cut into parts of images that follow each other in storage; parts and batches depend on the source
alone, so that any number of processes, and any number of kills, leaves the same bytes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from d2c import runtime
from d2c.config import execution, identity
from d2c.difficulty import Difficulty, Settings, check_shapes
from d2c.errors import D2CError, UsageError
from d2c.estimator import Reliability, reliability, timesteps_of
from d2c.latents import LatentSpec, open_codec
from d2c.parts import Part, ToDo, require_all, split, work
from d2c.picks import class_indices
from d2c.progress import Bar, Progress, Silent
from d2c.runtime import Ranks
from d2c.score_table import merge
from d2c.scorers import Denoiser, load_denoiser
from d2c.sources import Source, open_source
from d2c.workspace import BAD_FILES, CLASSES, SCORES, Record, Stage, Workspace
from formats.files import read_table, write_json, write_table
from formats.hashing import xxh3_array

_PATIENCE = 30.0
"""Seconds that a task of a job array waits while others begin."""


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """What to score and with what.

    ``evals`` is denoiser evaluations per image. ``stratified`` takes one timestep from each of ``evals`` equal strata
    and the same noise for every image, so that the draws cancel in the ranking; ``paper`` draws both anew for every
    image (Algorithm 2 as written).
    """

    source: Path = execution()
    workspace: Path = execution()
    scorer: str = execution()
    objective: str | None = None
    class_map: Path | None = execution(None)
    """Which class of the source is which of the scorer's (`d2c.classmap`): what it says counts, not where it lies."""
    codec: str = "rgb"
    size: int = 256
    estimator: Literal["stratified", "paper"] = "stratified"
    evals: int = 8
    batch_size: int = 64
    part: int = 1024
    """Images in a part, rounded up to whole batches: the most work that a kill can cost."""
    precision: str = "auto"
    seed: int = 0
    device: str = execution("auto")
    gpus: int = execution(1)
    threads: int = execution(4)
    share: tuple[int, int] | None = execution(None)
    """(i, n): do the i-th of n shares of the parts and merge nothing, as a task of a job array does."""
    retry_bad: bool = execution(False)
    """Try again what could not be read, and score only the parts in which that was."""
    max_bad: float | None = execution(None)
    """Images that may be unreadable: a share below 1, or a number."""
    overwrite: bool = execution(False)

    def __post_init__(self) -> None:
        if self.share is not None and not 1 <= self.share[0] <= self.share[1]:
            raise UsageError(
                "there is no such share of the parts", found="/".join(map(str, self.share)), expected="1/N to N/N"
            )
        if self.estimator not in ("stratified", "paper"):
            raise UsageError("unknown estimator", found=self.estimator, expected="stratified or paper")
        if self.evals < 2:
            raise UsageError(
                "a score needs at least two evaluations, to know its own error", found=self.evals, expected="--evals 8"
            )

    @property
    def settings(self) -> Settings:
        """What decides the losses."""
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})


@dataclass(frozen=True)
class Plan:
    """What `run` will do, from opened and checked inputs."""

    config: ScoringConfig
    stage: Stage
    reasons: list[str]
    source: Source
    scorer: Denoiser
    codec: LatentSpec
    inputs: dict[str, str]
    classes: np.ndarray[Any, np.dtype[np.int64]]
    """The scorer's index of each class of the source."""

    @property
    def parts(self) -> list[Part]:
        """Runs of whole batches of images that follow each other in the source's storage."""
        batch = self.config.batch_size
        return split(len(self.source), batch * -(-self.config.part // batch), self.stage.path / "parts", ".parquet")

    @property
    def evaluations(self) -> int:
        """Denoiser evaluations in all."""
        return len(self.source) * self.config.evals


@dataclass(frozen=True)
class Result:
    """A finished scoring: the record's summary says images, bad files, classes and reliability."""

    record: Record
    path: Path


@dataclass(frozen=True)
class Share:
    """What one task of a job array did: ``done`` of ``total`` parts are finished, by this task and all others."""

    path: Path
    done: int
    total: int


@dataclass(frozen=True)
class _Job:
    config: ScoringConfig
    stage: Stage
    todo: ToDo
    progress: Progress


def plan(config: ScoringConfig, source: Source | None = None) -> Plan:
    """Open the source and the scorer and compare them.

    Raises:
        D2CError: a path is missing, the scorer is not readable, or its classes are not the source's.
    """
    source = source or open_source(config.source)
    # The plan only asks what the scorer is; the workers load it where they run.
    denoiser = load_denoiser(config.scorer, device=torch.device("cpu"), objective=config.objective)
    classes = class_indices(source, denoiser, config.class_map)
    codec = open_codec(config.codec, config.size, torch.device("cpu")).spec
    check_shapes(denoiser, codec)
    # Resolved here: parts of one table must not mix precisions because it was resumed on another device.
    device = runtime.resolve_device(config.device)
    config = replace(config, precision=runtime.resolve_precision(config.precision, device))
    stage = Workspace(config.workspace).scores
    weights = str(denoiser.origin["weights_xxh3"])
    inputs = {"source": source.digest, "scorer": weights, "codec": codec.weights_xxh3, "classes": xxh3_array(classes)}
    reasons = ["--overwrite"] if config.overwrite else stage.stale(identity(config), inputs)
    made = Plan(config, stage, reasons, source, denoiser, codec, inputs, classes)
    if not reasons and config.retry_bad and (again := _parts_with_bad(made)):
        return replace(made, reasons=[f"{len(again)} parts with unreadable images are tried again"])
    return made


def run(plan: Plan, progress: Progress | None = None) -> Result:
    """Score every part that is not done yet, then merge the parts into ``scores.parquet`` and ``bad_files.parquet``."""
    progress = progress or Silent()
    if plan.reasons:
        lock = runtime.once(plan.stage.lock)
        try:
            runtime.once(lambda: _begin(plan))
            _work(plan, plan.parts, progress)
            runtime.once(lambda: _merge(plan))
        finally:
            if lock:
                lock.release()
    runtime.once(lambda: _note_places(plan))
    record = plan.stage.require("d2c score DIR")
    return Result(record=record, path=plan.stage.path)


def run_share(plan: Plan, progress: Progress | None = None) -> Share:
    """Score this task's share of the parts (``config.share``) beside other tasks; `run` merges when all are done.

    Raises:
        FormatError: a whole scoring is running here.
    """
    assert plan.config.share is not None
    number, of = plan.config.share
    if plan.reasons:
        lock = runtime.once(lambda: plan.stage.lock(_PATIENCE))
        try:
            runtime.once(lambda: _begin(plan))
        finally:
            if lock:
                lock.release()
        _work(plan, plan.parts[number - 1 :: of], progress or Silent())
    parts = plan.parts
    return Share(plan.stage.path, sum(part.done for part in parts) if plan.reasons else len(parts), len(parts))


def _begin(plan: Plan) -> None:
    config = plan.config
    if not config.overwrite and config.retry_bad:
        again = _parts_with_bad(plan)
        if again and not plan.stage.stale(identity(config), plan.inputs):
            plan.stage.reopen()
        for part in again:
            part.path.unlink()
    plan.stage.begin(identity(config), plan.inputs)


def _parts_with_bad(plan: Plan) -> list[Part]:
    """Finished parts that hold an image which could not be read."""
    done = [part for part in plan.parts if part.done]
    return [part for part in done if read_table(part.path, ["reason"])["reason"].null_count < len(part.items)]


def _work(plan: Plan, parts: list[Part], progress: Progress) -> None:
    job = _Job(plan.config, plan.stage, ToDo.of(parts), progress)
    workers = min(plan.config.gpus, max(1, len(job.todo.parts)))
    runtime.launch(_score_parts, job, workers=workers, device=runtime.resolve_device(plan.config.device))


def estimate_seconds(plan: Plan) -> float:
    """Seconds of one worker for the whole source, from one timed batch after one that warms up."""
    device = runtime.resolve_device(plan.config.device)
    config = replace(plan.config, device=str(device))
    scorer = Difficulty.open(config.settings, plan.source)
    indices = plan.source.storage_order()[: config.batch_size].tolist()
    seconds = 0.0
    with runtime.one_thread(device):
        for _ in range(2):
            start = time.perf_counter()
            for _ in scorer.tables(indices):
                pass
            seconds = time.perf_counter() - start
    return seconds / len(indices) * len(plan.source)


def _score_parts(ranks: Ranks, job: _Job) -> None:
    device = runtime.resolve_device(job.config.device)
    with runtime.one_thread(device):
        source = open_source(job.config.source)
        scorer = Difficulty.open(job.config.settings, source)
        # As the bytes lie: in key order a large Parquet file's row groups would be visited at random.
        order = source.storage_order()

        def make(part: Part, bar: Bar) -> None:
            tables = []
            for table in scorer.tables(order[part.items.start : part.items.stop].tolist()):
                tables.append(table)
                bar.advance(table.num_rows * ranks.world)
            write_table(part.path, pa.concat_tables(tables))

        work(job.todo, make, ranks=ranks, stage=job.stage, progress=job.progress, label="score")


def _merge(plan: Plan) -> None:
    stage, config, source = plan.stage, plan.config, plan.source
    device, parts = runtime.resolve_device(config.device), plan.parts
    require_all(parts)
    shared = None
    if config.estimator == "stratified":
        drawn = [timesteps_of("stratified", config.seed, j, config.evals, [""]) for j in range(config.evals)]
        shared = torch.cat(drawn).double().numpy()
    merged = merge([part.path for part in parts], source.path, shared, plan.scorer.objective)
    scores, losses = merged.scores, merged.losses
    write_table(stage.path / SCORES, scores)
    rejected = [{"key": b.key, "stage": b.stage, "reason": b.reason} for b in source.bad]
    rejected += [{"key": r["key"], "stage": "score", "reason": r["reason"]} for r in merged.bad.to_pylist()]
    columns = pa.schema([("key", pa.string()), ("stage", pa.string()), ("reason", pa.string())])
    write_table(stage.path / BAD_FILES, pa.Table.from_pylist(rejected, schema=columns).sort_by("key"))
    _check_bad(plan, rejected)
    counts = np.bincount(scores["label"].to_numpy(), minlength=len(source.classes))
    classes = [
        {"id": c.id, "name": c.name, "source_id": c.source_id, "count": int(counts[c.id])} for c in source.classes
    ]
    write_json(stage.path / CLASSES, classes)
    trust: Reliability = reliability(losses, scores["label"].to_numpy())
    summary = {
        "images": scores.num_rows,
        "bad_files": len(rejected),
        "classes": classes,
        "source": {
            "path": str(source.path.resolve()),
            "kind": source.kind,
            "name": source.path.resolve().name,
            "files": scores.num_rows,
            "fingerprint": merged.fingerprint,
        },
        "notes": list(source.notes),
        "codec": {"name": config.codec, **plan.codec.to_dict()},
        "size": config.size,
        "scorer": {
            "spec": Workspace(config.workspace).remember(config.scorer),
            "grid": plan.scorer.grid,
            "facts": _facts(plan.scorer),
            "classes": plan.classes.tolist(),
        },
        "rank_correlation": trust.to_dict(),
        "score": {
            q: float(np.quantile(losses.mean(axis=1), p)) for q, p in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95))
        },
        "precision": runtime.resolve_precision(config.precision, device),
    }
    stage.finish([SCORES, BAD_FILES, CLASSES], summary, device=device.type)


def _check_bad(plan: Plan, rejected: list[dict[str, str]]) -> None:
    limit, total = plan.config.max_bad, len(plan.source) + len(plan.source.bad)
    if limit is not None and len(rejected) > (limit * total if limit < 1 else limit):
        raise D2CError(
            "more images than allowed cannot be used",
            where=plan.stage.path / BAD_FILES,
            found=f"{len(rejected)} of {total}, the first: {rejected[0]['key']}: {rejected[0]['reason']}",
            expected=f"at most {limit:g}" + (" of all" if limit < 1 else ""),
            hint="mend them and add --retry-bad, or allow more with --max-bad: nothing is scored twice",
        )


def _note_places(plan: Plan) -> None:
    """Note where the source and the scorer lie now: they may have moved and be the same by content."""
    summary = plan.stage.require("d2c score DIR").summary
    spec = Workspace(plan.config.workspace).remember(plan.config.scorer)
    plan.stage.refresh(
        source={**summary["source"], "path": str(plan.source.path.resolve())},
        scorer={**summary["scorer"], "spec": spec},
    )


def _facts(denoiser: Denoiser) -> dict[str, str]:
    """Which scorer it was, in words that hold on another machine."""
    origin = denoiser.origin
    named = origin["source"] if origin["kind"] == "diffusers" else Path(origin["path"]).name
    return {
        "kind": origin["kind"],
        "name": named,
        "model": denoiser.spec.name,
        "weights_xxh3": origin["weights_xxh3"],
        "sha256": origin["sha256"],
    }
