"""Select: which images. A selector orders each class's images by one rule; the budget cuts the order.

Interval sampling (paper, section 3.2): in each class sort ascending by score and take ranks 0, k, 2k, ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa

from d2c import runtime
from d2c.config import execution, identity
from d2c.errors import UsageError
from d2c.progress import Progress, Silent
from d2c.workspace import SCORES, SELECTION, Record, Stage, Workspace
from formats.files import read_table, write_json, write_table
from formats.hashing import xxh3, xxh3_json

Method: TypeAlias = Literal["interval", "random"]
PAPER_SPAN = 0.74
"""Part of a class that the paper's three ImageNet settings span: n*k/1300 is 0.74, 0.62 and 0.77 (its Appendix C)."""


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """What to select.

    Exactly one of ``ratio`` (share of all images, spread equally over the classes) and ``per_class`` is set.
    ``interval`` is the paper's k in ranks; None takes the k whose picks span ``PAPER_SPAN`` of each class.
    """

    workspace: Path = execution()
    method: Method = "interval"
    ratio: float | None = None
    per_class: int | None = None
    interval: int | None = None
    seed: int = 0
    overwrite: bool = execution(False)

    def asked(self) -> dict[str, Any]:
        """The identity: only a random selection depends on a seed, only an interval one on k."""
        unused = "seed" if self.method == "interval" else "interval"
        return {name: value for name, value in identity(self).items() if name != unused}

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.per_class is None):
            raise UsageError(
                "a selection needs one budget",
                found="both" if self.ratio is not None else "none",
                expected="either --ratio R or --per-class N",
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise UsageError("the ratio is a share of all images", found=self.ratio, expected="0 < ratio <= 1")
        if self.per_class is not None and self.per_class < 1:
            raise UsageError("the budget per class is too small", found=self.per_class, expected="1 or more")
        if self.interval is not None and self.interval < 1:
            raise UsageError("the interval is a distance in ranks", found=self.interval, expected="1 or more")

    @property
    def name(self) -> str:
        """The folder's name: readable, and different for every different selection."""
        budget = f"ratio{self.ratio:g}" if self.ratio is not None else f"{self.per_class}-per-class"
        return f"{self.method}-{budget}-{xxh3_json(self.asked())[:6]}"


@dataclass(frozen=True)
class Plan:
    """What `run` will do: the budget of each class, before any write."""

    config: SelectionConfig
    stage: Stage
    reasons: list[str]
    per_class: int
    classes: int
    images: int
    shortfalls: list[tuple[str, int]]
    """Class name and images it lacks to fill its budget."""


@dataclass(frozen=True)
class Selection:
    """A finished selection. ``table`` columns: key, label, score, class_rank (0 = easiest), rank (order of choice)."""

    name: str
    table: pa.Table
    record: Record


def budget_per_class(config: SelectionConfig, images: int, classes: int) -> int:
    """Images a class may give: ``per_class``, or ``ratio`` of all images shared equally by the classes, at least 1."""
    if config.per_class is not None:
        return config.per_class
    assert config.ratio is not None
    return max(1, round(config.ratio * images / classes))


def interval_ranks(size: int, budget: int, interval: int | None) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Ranks 0, k, 2k, ... of the ``budget`` picks in a class of ``size`` images (paper, section 3.2).

    k is ``interval``, or the one that spans ``PAPER_SPAN`` of the class; where k overruns a small class it shrinks to
    the largest that fits, so that the class gives ``min(budget, size)`` images and never fewer.
    """
    count = min(budget, size)
    if count <= 1:
        return np.zeros(count, dtype=np.int64)
    wanted = interval if interval is not None else int(PAPER_SPAN * size / count)
    k = max(1, min(wanted, (size - 1) // (count - 1)))
    return np.arange(count, dtype=np.int64) * k


def _choose_interval(config: SelectionConfig, keys: list[str], budget: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return interval_ranks(len(keys), budget, config.interval)


def _choose_random(config: SelectionConfig, keys: list[str], budget: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    # Ordering by a hash of (seed, key) makes every smaller budget a subset of every larger one.
    draws = [xxh3(f"random\0{config.seed}\0{key}".encode()) for key in keys]
    return np.argsort(np.array(draws), kind="stable")[:budget].astype(np.int64)


_METHODS: dict[str, Callable[[SelectionConfig, list[str], int], np.ndarray[Any, np.dtype[np.int64]]]] = {
    "interval": _choose_interval,
    "random": _choose_random,
}
METHODS = tuple(_METHODS)


def select(scores: pa.Table, config: SelectionConfig, classes: int) -> pa.Table:
    """Choose from ``scores`` (columns key, label, score); any order of its rows gives the same selection.

    Ties in score are broken by key. Returns the picks in order of label, then of choice.
    """
    table = scores.select(["key", "label", "score"]).sort_by(
        [("label", "ascending"), ("score", "ascending"), ("key", "ascending")]
    )
    labels = table["label"].to_numpy()
    budget = budget_per_class(config, len(labels), classes)
    starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]]) if len(labels) else np.zeros(0, dtype=np.int64)
    rows, within = [], []
    for start, stop in zip(starts, [*starts[1:], len(labels)], strict=True):
        ranks = _METHODS[config.method](config, table["key"][start:stop].to_pylist(), budget)
        rows.append(start + ranks)
        within.append(np.arange(len(ranks)))
    taken = np.concatenate(rows)
    picks = table.take(pa.array(taken))
    class_rank = taken - starts[np.searchsorted(starts, taken, side="right") - 1]
    picks = picks.append_column("class_rank", pa.array(class_rank.astype(np.int32)))
    return picks.append_column("rank", pa.array(np.concatenate(within).astype(np.int32)))


def plan(config: SelectionConfig) -> Plan:
    """Check the scores and the budget.

    Raises:
        D2CError: there are no scores yet.
        UsageError: the method is unknown.
    """
    if config.method not in _METHODS:
        raise UsageError("unknown selection method", found=config.method, expected=", ".join(METHODS))
    workspace = Workspace(config.workspace)
    scores = workspace.scores.require("d2c score DIR")
    stage = workspace.selection(config.name)
    # Names may come twice (ImageNet has two cranes): only the rows are classes.
    counts = [(row["name"], row["count"]) for row in scores.summary["classes"]]
    budget = budget_per_class(config, sum(count for _, count in counts), len(counts))
    asked = config.asked()
    return Plan(
        config=config,
        stage=stage,
        reasons=["--overwrite"] if config.overwrite else stage.stale(asked, {"scores": scores.digest}),
        per_class=budget,
        classes=len(counts),
        images=sum(min(budget, count) for _, count in counts),
        shortfalls=[(name, budget - count) for name, count in counts if count < budget],
    )


def run(plan: Plan, progress: Progress | None = None) -> Selection:
    """Select, write the table, and make it the workspace's current selection."""
    progress, workspace = progress or Silent(), Workspace(plan.config.workspace)
    runtime.once(lambda: _write(plan, workspace))
    for name, missing in plan.shortfalls[:5]:
        progress.warn(
            f"class {name!r} has {missing} images fewer than its budget of {plan.per_class}: it gives all it has"
        )
    if len(plan.shortfalls) > 5:
        progress.warn(f"... and {len(plan.shortfalls) - 5} more classes give all they have")
    return load(workspace, plan.config.name)


def _write(plan: Plan, workspace: Workspace) -> None:
    stage, config = plan.stage, plan.config
    if plan.reasons:
        scores = workspace.scores.require("d2c score DIR")
        with stage.locked():
            stage.begin(config.asked(), {"scores": scores.digest})
            with stage.spending():
                table = select(read_table(workspace.scores.output(SCORES)), config, plan.classes)
                write_table(stage.path / SELECTION, table)
                picks = [{"key": key, "rank": rank} for key, rank in zip(*_columns(table, "key", "rank"), strict=True)]
                write_json(stage.path / "selection.json", picks)
            shortfalls = [{"class": name, "missing": missing} for name, missing in plan.shortfalls]
            summary = {"images": table.num_rows, "per_class": plan.per_class, "shortfalls": shortfalls}
            stage.finish([SELECTION, "selection.json"], summary, device="cpu")
    workspace.set_current("selection", {"name": config.name})


def load(workspace: Workspace, name: str) -> Selection:
    """Read a finished selection."""
    stage = workspace.selection(name)
    record = stage.require("d2c select --ratio R")
    return Selection(name=name, table=read_table(stage.output(SELECTION)), record=record)


def _columns(table: pa.Table, *names: str) -> list[list[Any]]:
    return [table[name].to_pylist() for name in names]
