"""Select: which images. A method orders each class's images by what it aims at; the budget says how many each gives.

Interval sampling (paper, section 3.2): in each class sort ascending by score and take ranks 0, k, 2k, ...
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2c import plugin, runtime
from d2c.budgets import Quotas
from d2c.errors import UsageError
from d2c.parts import Part, ToDo, require_all, split, work
from d2c.progress import Bar, Progress, Silent
from d2c.runtime import Ranks
from d2c.selection_rule import Pool, SelectionConfig, check_score, class_quotas, select
from d2c.selectors import METHODS
from d2c.tokens import save_array
from d2c.workspace import CROSS_ENTROPIES, FEATURES, SCORES, SELECTION, Record, Stage, Workspace
from formats.files import read_table, write_json, write_table

__all__ = ["Plan", "Selection", "SelectionConfig", "check", "class_quotas", "load", "plan", "run", "select"]


@dataclass(frozen=True)
class Plan:
    """What `run` will do: the budget of each class, before any write."""

    config: SelectionConfig
    stage: Stage
    reasons: list[str]
    inputs: dict[str, str]
    quotas: Quotas
    names: list[str]
    """Of the classes: they may come twice (ImageNet has two cranes)."""

    @property
    def images(self) -> int:
        return int(self.quotas.given.sum())

    @property
    def per_class(self) -> int | None:
        """What every class was asked for; None where that differs."""
        wanted = np.unique(self.quotas.given + self.quotas.missing)
        return int(wanted[0]) if len(wanted) == 1 else None

    @property
    def shortfalls(self) -> list[tuple[str, int]]:
        """Class name and images it lacks to fill its budget."""
        missing = self.quotas.missing
        return [(self.names[c], int(missing[c])) for c in np.flatnonzero(missing)]


@dataclass(frozen=True)
class Selection:
    """A finished selection. ``table`` columns: key, label, score, class_rank (0 = easiest), rank (order of choice)."""

    name: str
    table: pa.Table
    record: Record

    @property
    def classes(self) -> int:
        """Classes that have picks."""
        return len(self.table["label"].unique())


@dataclass(frozen=True)
class _Job:
    plan: Plan
    todo: ToDo
    progress: Progress


def plan(config: SelectionConfig) -> Plan:
    """Check the scores, the budget and the features.

    Raises:
        D2CError: there are no scores or features yet.
        UsageError: the method needs features, or cannot be loaded.
    """
    workspace = Workspace(config.workspace)
    scores = workspace.scores.require("d2c score DIR")
    inputs = {"scores": scores.digest}
    given = check(config)
    if config.needs_features and config.features is None:
        raise UsageError(f"{config.method} looks at images, not only at scores", hint="add --features scorer")
    if "features" in config.asked() and config.features is not None:
        inputs["features"] = workspace.features(config.features).require("d2c select --features ENCODER").digest
    if config.needs_confidence:
        needed = workspace.confidence(str(config.features)).require("d2c select --method ot")
        inputs["confidence"] = needed.digest
    if config.method not in METHODS:
        inputs["method"] = plugin.digest(config.method)
    stage = workspace.selection(config.name)
    return Plan(
        config=config,
        stage=stage,
        reasons=["--overwrite"] if config.overwrite else stage.stale(config.asked(), inputs),
        inputs=inputs,
        quotas=given,
        names=[row["name"] for row in scores.summary["classes"]],
    )


def check(config: SelectionConfig) -> Quotas:
    """What each class of the scored source gives; features are not looked at, since they may cost hours.

    Raises:
        D2CError: there are no scores yet.
        UsageError: there is no such score, the budget cannot be shared out, or the method cannot be loaded.
    """
    stage = Workspace(config.workspace).scores
    classes = stage.require("d2c score DIR").summary["classes"]
    check_score(pq.read_schema(stage.path / SCORES), config.score)
    if config.method not in METHODS:
        plugin.load(config.method)
    return class_quotas(config, np.array([row["count"] for row in classes], dtype=np.int64), config.budget)


def run(plan: Plan, progress: Progress | None = None) -> Selection:
    """Select, write the table, and make it the workspace's current selection.

    A selection that looks at images and was interrupted goes on with the next class.

    Raises:
        D2CError: what a user's own method gives is no selection.
    """
    progress, workspace = progress or Silent(), Workspace(plan.config.workspace)
    if plan.reasons:
        lock = runtime.once(plan.stage.lock)
        try:
            runtime.once(lambda: plan.stage.begin(plan.config.asked(), plan.inputs))
            # Methods that only look at scores take a second for a million images: all of them are one part.
            step = 1 if plan.config.needs_features else len(plan.names)
            parts = split(len(plan.names), step, plan.stage.path / "parts", ".npy")
            job = _Job(plan, ToDo.of(parts), progress)
            workers = min(plan.config.gpus, max(1, len(job.todo.parts)))
            runtime.launch(_choose_parts, job, workers=workers, device=runtime.resolve_device("cpu"))
            runtime.once(lambda: _finish(plan, parts))
        finally:
            if lock:
                lock.release()
    runtime.once(lambda: workspace.set_current("selection", {"name": plan.config.name}))
    result = load(workspace, plan.config.name)
    short = plan.shortfalls
    for name, missing in short[:5]:
        progress.warn(f"class {name!r} has {missing} images fewer than its share: it gives all it has")
    if len(short) > 5:
        progress.warn(f"... and {len(short) - 5} more classes give all they have")
    if empty := len(plan.names) - result.classes:
        progress.warn(f"{empty:,} of {len(plan.names):,} classes get no image")
    if result.table.num_rows < plan.images:
        progress.warn(f"{plan.config.method} chose {result.table.num_rows} images of {plan.images}")
    return result


def _pool(plan: Plan) -> Pool:
    config, workspace = plan.config, Workspace(plan.config.workspace)
    columns = None if config.method not in METHODS else ["key", "label", config.score]
    features = None
    if "features" in plan.inputs:
        features = np.load(workspace.features(str(config.features)).path / FEATURES, mmap_mode="r", allow_pickle=False)
    pool = Pool.of(read_table(workspace.scores.output(SCORES), columns), config, len(plan.names), features)
    if "confidence" not in plan.inputs:
        return pool
    path = workspace.confidence(str(config.features)).output(CROSS_ENTROPIES)
    return replace(pool, cross_entropies=np.load(path, allow_pickle=False))


def _choose_parts(ranks: Ranks, job: _Job) -> None:
    plan = job.plan
    pool = _pool(plan)

    def make(part: Part, bar: Bar) -> None:
        if plan.config.method not in METHODS:
            rows = pool.choose_by(plugin.load(plan.config.method))
        else:
            rows = np.concatenate([pool.choose(label) for label in part.items])
        save_array(part.path, rows.astype(np.int64))
        bar.advance(len(part.items) * ranks.world)

    work(job.todo, make, ranks=ranks, stage=plan.stage, progress=job.progress, label="select", unit="class")


def _finish(plan: Plan, parts: list[Part]) -> None:
    require_all(parts)
    stage = plan.stage
    table = _pool(plan).picks(np.concatenate([np.load(part.path, allow_pickle=False) for part in parts]))
    write_table(stage.path / SELECTION, table)
    picks = [{"key": key, "rank": rank} for key, rank in zip(*_columns(table, "key", "rank"), strict=True)]
    write_json(stage.path / "selection.json", picks)
    shortfalls = [{"class": name, "missing": missing} for name, missing in plan.shortfalls]
    summary: dict[str, Any] = {"images": table.num_rows, "per_class": plan.per_class, "shortfalls": shortfalls}
    if "features" in plan.inputs:
        workspace = Workspace(plan.config.workspace)
        summary["features"] = workspace.features(str(plan.config.features)).require("d2c select").summary
    if "confidence" in plan.inputs:
        judged = Workspace(plan.config.workspace).confidence(str(plan.config.features)).require("d2c select").summary
        summary["confidence"] = {"weight": plan.config.confidence, **judged}
    stage.finish([SELECTION, "selection.json"], summary, device="cpu")


def load(workspace: Workspace, name: str) -> Selection:
    """Read a finished selection."""
    stage = workspace.selection(name)
    record = stage.require("d2c select --ratio R")
    return Selection(name=name, table=read_table(stage.output(SELECTION)), record=record)


def _columns(table: pa.Table, *names: str) -> list[list[Any]]:
    return [table[name].to_pylist() for name in names]
