"""Score: how hard each image is for a frozen class-conditional diffusion model.

``score(x) = mean over t, eps of ||target - model(z_t, t, c)||^2`` per latent value (paper, Algorithm 2); larger is
harder. Work is cut into parts of images that follow each other in storage; parts and batches depend on the source
alone, so that any number of processes, and any number of kills, leaves the same bytes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from d2c import picks, runtime
from d2c.config import identity
from d2c.difficulty import Difficulty
from d2c.errors import D2CError
from d2c.estimator import Reliability, reliability, timesteps_of
from d2c.parts import Part, ToDo, require_all, work
from d2c.progress import Bar, Progress, Silent
from d2c.runtime import Ranks
from d2c.score_plan import Plan, ScoringConfig, estimate_seconds, open_scored, parts_digest, plan
from d2c.score_table import merge
from d2c.scorers import Denoiser
from d2c.sources import Source
from d2c.workspace import BAD_FILES, CLASSES, DUPLICATES, LEAKS, SCORES, Record, Stage, Workspace
from formats.files import read_table, remove_tree, write_bytes, write_json, write_table

__all__ = ["Plan", "Result", "ScoringConfig", "Share", "estimate_seconds", "plan", "run", "run_share"]

_PATIENCE = 600.0
"""Seconds that a task of a job array waits while others begin, and look for unreadable images."""


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
    source: str
    """Digest of the source that was planned with."""
    progress: Progress


def run(plan: Plan, progress: Progress | None = None) -> Result:
    """Score every part that is not done yet, then merge the parts into ``scores.parquet`` and ``bad_files.parquet``.

    Raises:
        D2CError: more images than allowed cannot be used, or the source changed meanwhile.
    """
    progress = progress or Silent()
    if plan.reasons:
        lock = runtime.once(plan.stage.lock)
        try:
            runtime.once(lambda: _begin(plan))
            _work(plan, plan.parts, progress)
            runtime.once(lambda: _merge(plan, progress))
        finally:
            if lock:
                lock.release()
    else:
        runtime.once(lambda: _check_bad(plan, read_table(plan.stage.output(BAD_FILES)).to_pylist()))
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
    parts = plan.parts  # named before the lock is taken: of a million images that is seconds
    if plan.reasons:
        lock = runtime.once(lambda: plan.stage.lock(_PATIENCE))
        try:
            runtime.once(lambda: _begin(plan))
        finally:
            if lock:
                lock.release()
        _work(plan, parts[number - 1 :: of], progress or Silent())
    return Share(plan.stage.path, sum(part.done for part in parts) if plan.reasons else len(parts), len(parts))


def _begin(plan: Plan) -> None:
    config, stage, parts = plan.config, plan.stage, plan.parts
    if config.overwrite and stage.record() is not None:
        # The tasks of a job array all say --overwrite: only the first of them finds a record.
        stage.unfinish()
        remove_tree(stage.path / "parts" / plan.digest)
    if not any((stage.path / "parts" / plan.digest).glob("*.parquet")):
        stage.forget_cost()
    again = plan.parts_with_bad() if config.retry_bad else []
    stage.begin(identity(config), plan.inputs, keep=True)
    mine = parts if config.share is None else parts[config.share[0] - 1 :: config.share[1]]
    for part in again:
        if part in mine:
            part.path.unlink(missing_ok=True)


def _work(plan: Plan, parts: list[Part], progress: Progress) -> None:
    todo = ToDo.of(parts)
    # Under torchrun all ranks must come to the same point, whatever each of them found to do.
    if not todo.parts and runtime.ranks().world == 1:
        return
    job = _Job(plan.config, plan.stage, todo, plan.source.digest, progress)
    workers = min(plan.config.gpus, max(1, len(job.todo.parts)))
    runtime.launch(_score_parts, job, workers=workers, device=runtime.resolve_device(plan.config.device))


def _score_parts(ranks: Ranks, job: _Job) -> None:
    device = runtime.resolve_device(job.config.device)
    with runtime.one_thread(device):
        source = open_scored(job.config)
        if source.digest != job.source:
            raise D2CError(
                "the source changed while it was being scored",
                where=source.location,
                hint="run the same command again: it takes note of what changed",
            )
        scorer = Difficulty.open(job.config.settings, source)
        # As the bytes lie: in key order a large Parquet file's row groups would be visited at random.
        order = source.storage_order()
        earlier, kept = _earlier_parts(job.todo), list[Part]()

        def make(part: Part, bar: Bar) -> None:
            tables = []
            indices = order[part.items.start : part.items.stop].tolist()
            for path in earlier.get(part.number, []):
                if _same_images(path, source, indices, job.config):
                    write_bytes(part.path, path.read_bytes())
                    bar.advance(len(part.items) * ranks.world)
                    kept.append(part)
                    return
            for table in scorer.tables(indices):
                tables.append(table)
                bar.advance(table.num_rows * ranks.world)
            write_table(part.path, pa.concat_tables(tables))

        work(job.todo, make, ranks=ranks, stage=job.stage, progress=job.progress, label="score")
        if kept and ranks.main:
            job.progress.say("images that are the same under other file times keep their scores")


def _earlier_parts(todo: ToDo) -> dict[int, list[Path]]:
    """Parts of the numbers that are to do, made when the files had other times, or had them elsewhere."""
    found: dict[int, list[Path]] = defaultdict(list)
    numbers = {f"{part.number:06d}": part.number for part in todo.parts}
    for path in sorted(todo.parts[0].path.parent.glob("*.parquet")) if todo.parts else []:
        if (number := numbers.get(path.name.partition("-")[0])) is not None:
            found[number].append(path)
    return found


def _same_images(path: Path, source: Source, indices: list[int], config: ScoringConfig) -> bool:
    """Whether a part's images are those at ``indices``, under the same labels and byte for byte."""
    table = read_table(path, ["key", "label", "xxh3"])
    labels = {source.keys[index]: int(source.labels[index]) for index in indices}
    there = dict(zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True))
    # What could not be used has no label.
    if there.keys() != labels.keys() or any(label not in (None, labels[key]) for key, label in there.items()):
        return False
    return picks.unchanged(source, table, config.size, threads=config.threads)


def _merge(plan: Plan, progress: Progress) -> None:
    stage, config, source = plan.stage, plan.config, plan.source
    device, parts = runtime.resolve_device(config.device), plan.parts
    require_all(parts)
    shared = None
    if config.estimator == "stratified":
        drawn = [timesteps_of("stratified", config.seed, j, config.evals, [""]) for j in range(config.evals)]
        shared = torch.cat(drawn).double().numpy()
    prints = config.duplicates != "off" or plan.held_out is not None
    read = merge([part.path for part in parts], source.location, shared, plan.scorer.objective, prints=prints)
    merged, twins, listed = config.dedup.run(read, source, plan.held_out, progress)
    scores, losses = merged.scores, merged.losses
    rejected = [{"key": b.key, "stage": b.stage, "reason": b.reason} for b in source.bad]
    rejected += [{"key": r["key"], "stage": "score", "reason": r["reason"]} for r in read.bad.to_pylist()]
    columns = pa.schema([("key", pa.string()), ("stage", pa.string()), ("reason", pa.string())])
    before = stage.record()
    stage.unfinish()
    write_table(stage.path / BAD_FILES, pa.Table.from_pylist(rejected, schema=columns).sort_by("key"))
    _check_bad(plan, rejected)
    for name, table in {SCORES: scores, **listed}.items():
        write_table(stage.path / name, table)
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
            "path": source.location,
            "kind": source.kind,
            "name": source.name,
            "labels": config.labels,
            "files": read.scores.num_rows,
            "fingerprint": read.fingerprint,
        },
        **twins,
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
    stage.finish([SCORES, BAD_FILES, CLASSES, DUPLICATES, LEAKS], summary, device=device.type)
    _forget_changed(plan)
    if before and (replaced := parts_digest(before.config, before.inputs, before.version)) != plan.digest:
        remove_tree(stage.path / "parts" / replaced)


def _forget_changed(plan: Plan) -> None:
    """Remove parts whose images are others now."""
    mine = {part.path for part in plan.parts}
    for path in (plan.stage.path / "parts" / plan.digest).glob("*.parquet"):
        if path not in mine:
            path.unlink()


def _check_bad(plan: Plan, rejected: list[dict[str, str]]) -> None:
    limit, total = plan.config.max_bad, len(plan.source) + len(plan.source.bad)
    if limit is not None and len(rejected) > (limit * total if limit < 1 else limit):
        raise D2CError(
            "more images than allowed cannot be used",
            where=plan.stage.path / BAD_FILES,
            found=f"{len(rejected)} of {total}, the first: {rejected[0]['key']}: {rejected[0]['reason']}",
            expected=f"at most {limit:g}" + (" of all" if limit < 1 else ""),
            hint="mend them and add --retry-bad, or allow more with --max-bad: no other part is scored again",
        )


def _note_places(plan: Plan) -> None:
    """Note where the source and the scorer lie now: they may have moved and be the same by content."""
    summary = plan.stage.require("d2c score DIR").summary
    spec = Workspace(plan.config.workspace).remember(plan.config.scorer)
    plan.stage.refresh(
        source={**summary["source"], "path": plan.source.location},
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
