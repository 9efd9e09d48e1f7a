"""Score: how hard each image is for a frozen class-conditional diffusion model.

``score(x) = mean over t, eps of ||target - model(z_t, t, c)||^2`` per latent value (paper, Algorithm 2); larger is
harder. Work is cut into parts of consecutive sorted keys; parts and batches depend on the keys alone, so that any
number of processes, and any number of kills, leaves the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from d2c import batches, runtime
from d2c.config import execution, identity
from d2c.errors import D2CError, UsageError
from d2c.estimator import Reliability, noise_of, reliability, standard_errors, timesteps_of
from d2c.latents import LatentCodec, LatentSpec, open_codec, to_model
from d2c.parts import Part, ToDo, require_all, split, work
from d2c.picks import class_indices
from d2c.progress import Bar, Progress, Silent
from d2c.runtime import Ranks
from d2c.scorers import Denoiser, load_denoiser
from d2c.sources import Source, open_source
from d2c.workspace import BAD_FILES, CLASSES, SCORES, Record, Stage, Workspace
from formats.files import read_table, write_json, write_table
from formats.hashing import xxh3_lines

_PART_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int32()),
        ("losses", pa.list_(pa.float32())),
        ("xxh3", pa.string()),
        ("bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("reason", pa.string()),
    ]
)


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
    overwrite: bool = execution(False)

    def __post_init__(self) -> None:
        if self.estimator not in ("stratified", "paper"):
            raise UsageError("unknown estimator", found=self.estimator, expected="stratified or paper")
        if self.evals < 2:
            raise UsageError(
                "a score needs at least two evaluations, to know its own error", found=self.evals, expected="--evals 8"
            )


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
    class_indices(source, denoiser)
    codec = open_codec(config.codec, config.size, torch.device("cpu")).spec
    _check_shapes(denoiser, codec)
    # Resolved here: parts of one table must not mix precisions because it was resumed on another device.
    device = runtime.resolve_device(config.device)
    config = replace(config, precision=runtime.resolve_precision(config.precision, device))
    stage = Workspace(config.workspace).scores
    weights = str(denoiser.origin["weights_xxh3"])
    inputs = {"source": source.digest, "scorer": weights, "codec": codec.weights_xxh3}
    reasons = ["--overwrite"] if config.overwrite else stage.stale(identity(config), inputs)
    return Plan(config, stage, reasons, source, denoiser, codec, inputs)


def run(plan: Plan, progress: Progress | None = None) -> Result:
    """Score every part that is not done yet, then merge the parts into ``scores.parquet`` and ``bad_files.parquet``."""
    progress = progress or Silent()
    stage, config = plan.stage, plan.config
    if plan.reasons:
        lock = runtime.once(stage.lock)
        try:
            runtime.once(lambda: stage.begin(identity(config), plan.inputs))
            job = _Job(config, stage, ToDo.of(_parts(plan)), progress)
            device = runtime.resolve_device(config.device)
            workers = min(config.gpus, max(1, len(job.todo.parts)))
            runtime.launch(_score_parts, job, workers=workers, device=device)
            runtime.once(lambda: _merge(plan, device))
        finally:
            if lock:
                lock.release()
    runtime.once(lambda: _note_places(plan))
    record = stage.require("d2c score DIR")
    return Result(record=record, path=stage.path)


def estimate_seconds(plan: Plan) -> float:
    """Seconds of one worker for the whole source, from one timed batch after one that warms up."""
    device = runtime.resolve_device(plan.config.device)
    config = replace(plan.config, device=str(device))
    scorer = _Scorer.open(config, plan.source)
    indices = list(range(min(config.batch_size, len(plan.source))))
    seconds = 0.0
    with runtime.one_thread(device):
        for _ in range(2):
            start = time.perf_counter()
            for _ in scorer.tables(indices):
                pass
            seconds = time.perf_counter() - start
    return seconds / len(indices) * len(plan.source)


@dataclass
class _Scorer:
    """A worker's opened inputs."""

    config: ScoringConfig
    source: Source
    denoiser: Denoiser
    codec: LatentCodec
    labels: np.ndarray[Any, np.dtype[np.int64]]
    device: torch.device

    @staticmethod
    def open(config: ScoringConfig, source: Source) -> _Scorer:
        device = runtime.resolve_device(config.device)
        denoiser = load_denoiser(config.scorer, device=device, objective=config.objective)
        codec = open_codec(config.codec, config.size, device)
        _check_shapes(denoiser, codec.spec)
        return _Scorer(config, source, denoiser, codec, class_indices(source, denoiser), device)

    def tables(self, indices: list[int]) -> Iterator[pa.Table]:
        """One table (``_PART_SCHEMA``) per batch of ``indices``."""
        config = self.config
        for batch in batches.load(self.source, indices, config.size, batch=config.batch_size, threads=config.threads):
            rows: list[dict[str, Any]] = [{"key": bad.key, "reason": bad.reason} for bad in batch.bad]
            if len(batch.indices):
                keys = [self.source.keys[i] for i in batch.indices]
                losses = self.losses(batch.pixels, keys, self.labels[self.source.labels[batch.indices]])
                rows += [
                    {
                        "key": key,
                        "label": int(self.source.labels[index]),
                        "losses": losses[row],
                        "xxh3": batch.digests[row],
                        "bytes": batch.sizes[row],
                        "width": batch.crops[row][0],
                        "height": batch.crops[row][1],
                    }
                    for row, (index, key) in enumerate(zip(batch.indices, keys, strict=True))
                ]
            yield pa.Table.from_pylist(rows, schema=_PART_SCHEMA)

    @torch.inference_mode()
    def losses(
        self, pixels: np.ndarray[Any, Any], keys: list[str], labels: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Denoising losses of ``pixels`` u1 [N, S, S, 3], one column per evaluation: f4 [N, evals]."""
        config = self.config
        raw = torch.from_numpy(self.codec.encode(pixels)).to(self.device)
        latents = to_model(raw, self.codec.spec)  # [N, C, H, W]
        classes = torch.from_numpy(labels).to(self.device)
        columns = []
        for j in range(config.evals):
            t = timesteps_of(config.estimator, config.seed, j, config.evals, keys).to(self.device)
            noise = noise_of(config.estimator, config.seed, j, keys, tuple(latents.shape[1:])).to(self.device)
            with runtime.autocast(runtime.resolve_precision(config.precision, self.device), self.device):
                columns.append(self.denoiser.loss(latents, noise.expand_as(latents), t, classes))
        return torch.stack(columns, dim=1).float().cpu().numpy()


def _score_parts(ranks: Ranks, job: _Job) -> None:
    device = runtime.resolve_device(job.config.device)
    with runtime.one_thread(device):
        scorer = _Scorer.open(job.config, open_source(job.config.source))

        def make(part: Part, bar: Bar) -> None:
            tables = []
            for table in scorer.tables(list(part.items)):
                tables.append(table)
                bar.advance(table.num_rows * ranks.world)
            write_table(part.path, pa.concat_tables(tables))

        work(job.todo, make, ranks=ranks, stage=job.stage, progress=job.progress, label="score")


def _merge(plan: Plan, device: torch.device) -> None:
    stage, config, source = plan.stage, plan.config, plan.source
    parts = _parts(plan)
    require_all(parts)
    table = pa.concat_tables([read_table(part.path) for part in parts])
    bad = table.filter(table["reason"].is_valid())
    good = table.filter(table["reason"].is_null())
    if not good.num_rows:
        raise D2CError(
            "no image could be read",
            where=source.path,
            found=f"{bad.num_rows} files, the first: {bad['key'][0]}: {bad['reason'][0]}",
        )
    losses = good["losses"].combine_chunks().flatten().to_numpy().reshape(-1, config.evals).astype(np.float64)
    scores = good.drop_columns(["reason"]).append_column("score", pa.array(losses.mean(axis=1)))
    scores = scores.append_column("stderr", pa.array(standard_errors(losses)))
    # Order by key, as every later stage joins by key.
    write_table(stage.path / SCORES, scores.sort_by("key"))
    rejected = [{"key": b.key, "stage": b.stage, "reason": b.reason} for b in source.bad]
    rejected += [{"key": r["key"], "stage": "score", "reason": r["reason"]} for r in bad.to_pylist()]
    columns = pa.schema([("key", pa.string()), ("stage", pa.string()), ("reason", pa.string())])
    write_table(stage.path / BAD_FILES, pa.Table.from_pylist(rejected, schema=columns).sort_by("key"))
    counts = np.bincount(good["label"].to_numpy(), minlength=len(source.classes))
    classes = [
        {"id": c.id, "name": c.name, "source_id": c.source_id, "count": int(counts[c.id])} for c in source.classes
    ]
    write_json(stage.path / CLASSES, classes)
    trust: Reliability = reliability(losses, good["label"].to_numpy())
    lines = zip(*(scores[name].to_pylist() for name in ("key", "bytes", "xxh3")), strict=True)
    summary = {
        "images": good.num_rows,
        "bad_files": len(rejected),
        "classes": classes,
        "source": {
            "path": str(source.path.resolve()),
            "kind": source.kind,
            "name": source.path.resolve().name,
            "files": good.num_rows,
            "fingerprint": "xxh3-128:" + xxh3_lines(f"{key}\t{size}\t{digest}" for key, size, digest in sorted(lines)),
        },
        "notes": list(source.notes),
        "codec": {"name": config.codec, **plan.codec.to_dict()},
        "size": config.size,
        "scorer": {
            "spec": Workspace(config.workspace).remember(config.scorer),
            "grid": plan.scorer.grid,
            "facts": _facts(plan.scorer),
        },
        "rank_correlation": trust.to_dict(),
        "score": {
            q: float(np.quantile(losses.mean(axis=1), p)) for q, p in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95))
        },
        "precision": runtime.resolve_precision(config.precision, device),
    }
    stage.finish([SCORES, BAD_FILES, CLASSES], summary, device=device.type)


def _parts(plan: Plan) -> list[Part]:
    batch = plan.config.batch_size
    return split(len(plan.source), batch * -(-plan.config.part // batch), plan.stage.path / "parts", ".parquet")


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


def _check_shapes(denoiser: Denoiser, codec: LatentSpec) -> None:
    want = (denoiser.spec.channels, denoiser.spec.input_size)
    have = (codec.channels, codec.size)
    if want != have:
        raise D2CError(
            "the scorer reads latents of another shape",
            found=f"{have[0]} x {have[1]} x {have[1]} (codec {codec.codec})",
            expected=f"{want[0]} x {want[1]} x {want[1]}",
            hint="give --codec and --size as the scorer was trained with, or --scorer train",
        )
