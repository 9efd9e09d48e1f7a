"""What a selection is asked for, and the rule that follows from it: budgets of the classes, and the choice in each."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2c import discriminant, plugin
from d2c.budgets import LARGEST, Quotas, parse_balance, quotas
from d2c.config import execution, identity
from d2c.errors import UsageError
from d2c.selectors import METHODS, Candidates, Rows, Selector, ranks
from d2c.selectors.ot import Weights
from d2c.selectors.registry import transported
from formats.hashing import xxh3_json

Array = np.ndarray[Any, Any]
ONLY = {"interval": "interval", "confidence": "ot"}
"""Options that concern one method alone."""


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """What to select.

    Exactly one of ``ratio`` (share of all images), ``per_class`` and ``total`` is set. ``inside`` holds smaller budgets
    of the same kind, ascending, whose picks are among these. ``interval`` is the paper's k in ranks; None takes one
    with which the picks span `d2c.selectors.ranks.PAPER_SPAN` of each class.
    """

    workspace: Path = execution()
    method: str = "interval"
    """One of `d2c.selectors.METHODS`, or a user's own function, ``package.module:name`` (`d2c.plugin`)."""
    ratio: float | None = None
    per_class: int | None = None
    total: int | None = None
    inside: tuple[float, ...] = ()
    balance: str = "equal"
    spread: bool = False
    """What small classes lack is given by the others."""
    interval: int | None = None
    easiest: float | None = None
    """Only this share of each class, by score, may be picked."""
    score: str = "score"
    """The column of the scores that says how hard an image is."""
    features: str | None = None
    """Folder of finished features in the workspace (`d2c.embedding`), for methods that look at images."""
    confidence: float = Weights().confusion
    """Weight of a classifier's cross-entropies for `ot` (`d2c.discriminant`); 0 leaves them out."""
    seed: int = 0
    gpus: int = execution(1)
    """Processes that share the classes."""
    overwrite: bool = execution(False)

    def asked(self) -> dict[str, Any]:
        """The identity, without the options that do not concern the method."""
        method = METHODS.get(self.method)
        unused = {name for name, other in ONLY.items() if self.method != other}
        if method is not None:
            unused |= set() if method.features else {"features"}
            unused |= set() if method.seeded else {"seed"}
        return {name: value for name, value in identity(self).items() if name not in unused}

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", "per_class", "total") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(
                "a selection needs one budget",
                found=" and ".join(given) or "none",
                expected="--ratio R, --per-class N or --total N",
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise UsageError("the ratio is a share of all images", found=self.ratio, expected="0 < ratio <= 1")
        if self.per_class is not None and self.per_class < 1:
            raise UsageError("the budget per class is too small", found=self.per_class, expected="1 or more")
        if self.total is not None and self.total < 1:
            raise UsageError("the budget is too small", found=self.total, expected="1 or more")
        if self.budget > LARGEST:
            raise UsageError("the budget is too large", found=f"{self.budget:g}", expected=f"at most {LARGEST:,}")
        if self.interval is not None and self.interval < 1:
            raise UsageError("the interval is a distance in ranks", found=self.interval, expected="1 or more")
        if self.easiest is not None and not 0 < self.easiest <= 1:
            raise UsageError("the easiest are a share of a class", found=self.easiest, expected="0 < share <= 1")
        if not 0 <= self.confidence < np.inf:
            raise UsageError("confidence has a weight", found=self.confidence, expected="0 or more")
        if self.method not in METHODS and ":" not in self.method:
            close = difflib.get_close_matches(self.method, METHODS, n=1)
            raise UsageError(
                "unknown selection method",
                found=self.method,
                expected=f"{', '.join(METHODS)} or package.module:name",
                hint=f"did you mean {close[0]}?" if close else None,
            )
        if parse_balance(self.balance)[0] != "equal" and self.per_class is not None:
            raise UsageError("a budget per class leaves nothing to balance", found=f"--balance {self.balance}")
        if (
            any(small >= large for small, large in pairwise([*self.inside, self.budget]))
            or min(self.inside, default=1) <= 0
        ):
            raise UsageError(
                "budgets inside each other grow",
                found=", ".join(f"{one:g}" for one in [*self.inside, self.budget]),
                expected="ascending ones above 0, the selection's own the last",
            )
        if self.inside and (self.method not in METHODS or not METHODS[self.method].nested):
            raise UsageError(
                f"selections by {self.method} of several budgets do not lie inside each other",
                hint="select each budget on its own, or with another method",
            )

    @property
    def budget(self) -> float:
        """The one budget that is given."""
        return float(next(value for value in (self.ratio, self.per_class, self.total) if value is not None))

    @property
    def needs_features(self) -> bool:
        """The method looks at images."""
        return self.method in METHODS and METHODS[self.method].features

    @property
    def needs_confidence(self) -> bool:
        """The method weighs how sure a classifier is of an image's class."""
        return self.method == "ot" and self.confidence > 0

    @property
    def name(self) -> str:
        """The folder's name: readable, and different for every different selection."""
        if self.ratio is not None:
            budget = f"ratio{self.ratio:g}"
        else:
            budget = f"{self.per_class}-per-class" if self.per_class is not None else f"{self.total}-images"
        method = "".join(c if c.isalnum() else "-" for c in self.method)
        return f"{method}-{budget}-{xxh3_json(self.asked())[:6]}"


def check_score(schema: pa.Schema, name: str) -> None:
    """Raise UsageError where a table of scores has no column ``name`` of decimal numbers."""
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    if name not in floats:
        raise UsageError("there is no such score", found=name, expected=", ".join(floats))


def class_quotas(config: SelectionConfig, counts: Array, budget: float) -> Quotas:
    """What classes of ``counts`` [C] images give for a budget of the config's kind.

    A ratio with equal balance gives every class the same whole number, at least 1: 0.8 % of ImageNet is 10 a class.
    """
    classes, images = max(1, int(np.count_nonzero(counts))), int(counts.sum())
    if config.per_class is not None:
        total = int(budget) * classes
    elif config.ratio is None:
        total = int(budget)
    elif config.balance == "equal":
        total = max(1, round(budget * images / classes)) * classes
    else:
        total = max(1, round(budget * images))
    return quotas(counts, total, config.balance, spread=config.spread)


@dataclass(frozen=True, eq=False)
class Pool:
    """The scored images in key order, and the rule that chooses among those of a class."""

    config: SelectionConfig
    table: pa.Table
    """Sorted by key, all columns of the scores."""
    labels: Array
    scores: Array
    features: Array | None
    """[N, D], in the same order."""
    members: list[Array]
    """Rows of each class, in key order."""
    quotas: list[Quotas]
    """Of the smaller budgets inside, then of the selection's own."""
    cross_entropies: Array | None = None
    """[N], in the same order, where the method weighs them."""

    @staticmethod
    def of(table: pa.Table, config: SelectionConfig, classes: int, features: Array | None = None) -> Pool:
        """Any order of the table's rows gives the same selection; ``features`` [N, D] are in the table's order.

        Raises:
            UsageError: there is no such score, or images have none.
        """
        check_score(table.schema, config.score)
        # Of a column in pieces each class's rows would be looked up in all of them.
        table = table.combine_chunks()
        keys = table["key"].combine_chunks()
        # Scores are written in key order: a million strings are sorted only where they are not.
        if len(keys) > 1 and not pc.all(pc.less(keys[:-1], keys[1:])).as_py():
            order = pc.sort_indices(keys)
            table = table.take(order)
            features = None if features is None else features[order.to_numpy()]
        scores = table[config.score].to_numpy().astype(np.float64)
        if not np.isfinite(scores).all():
            raise UsageError(
                f"{int(np.count_nonzero(~np.isfinite(scores)))} images have no {config.score}",
                hint="score with more evaluations, or select by another score",
            )
        labels = table["label"].to_numpy()
        bounds = np.cumsum(np.bincount(labels, minlength=classes))[:-1]
        members = np.split(np.argsort(labels, kind="stable"), bounds)
        counts = np.array([len(rows) for rows in members])
        chain = [class_quotas(config, counts, budget) for budget in (*config.inside, config.budget)]
        return Pool(config, table, labels, scores, features, members, chain)

    def choose(self, label: int) -> Array:
        """Rows of the picks of one class, in order of choice."""
        rows, config = self.members[label], self.config
        if not self.quotas[-1].given[label]:
            return rows[:0]
        candidates = Candidates(
            keys=self.table["key"].take(pa.array(rows)).to_pylist(),
            scores=self.scores[rows],
            features=None if self.features is None else np.asarray(self.features[rows], dtype=np.float32),
            confusion=None if self.cross_entropies is None else self.cross_entropies[rows],
            seed=config.seed,
        )
        taken: Rows = np.empty(0, dtype=np.int64)
        for share in self.quotas:
            taken = _selector(config)(candidates, int(share.given[label]), taken)
        return np.asarray(rows[taken])

    def choose_by(self, function: plugin.Function) -> Array:
        """Rows of the picks of a user's function, class by class, in its order of choice."""
        rows = plugin.choose(function, self.table, self.quotas[-1].given, self.features, self.config.method)
        return rows[np.argsort(self.labels[rows], kind="stable")]

    def picks(self, rows: Array) -> pa.Table:
        """The table of a selection, of ``rows`` that stand class by class in order of choice."""
        class_rank = np.empty(len(self.scores), dtype=np.int64)
        for members in self.members:
            class_rank[members[np.argsort(self.scores[members], kind="stable")]] = np.arange(len(members))
        firsts = np.searchsorted(self.labels[rows], self.labels[rows])
        picked = self.table.select(["key", "label"]).take(pa.array(rows))
        picked = picked.append_column("score", pa.array(self.scores[rows]))
        picked = picked.append_column("class_rank", pa.array(class_rank[rows].astype(np.int32)))
        return picked.append_column("rank", pa.array((np.arange(len(rows)) - firsts).astype(np.int32)))


def select(scores: pa.Table, config: SelectionConfig, classes: int, features: Array | None = None) -> pa.Table:
    """Choose from ``scores`` (columns key, label and the score; any order) and ``features`` [N, D], in this process.

    Ties in score are broken by key. Returns the picks in order of label, then of choice.
    """
    pool = Pool.of(scores, config, classes, features)
    if config.method not in METHODS:
        return pool.picks(pool.choose_by(plugin.load(config.method)))
    if config.needs_confidence and pool.features is not None:
        pool = replace(pool, cross_entropies=discriminant.judge(pool.features, pool.labels).cross_entropies)
    return pool.picks(np.concatenate([pool.choose(label) for label in range(classes)]))


def _selector(config: SelectionConfig) -> Selector:
    selector = METHODS[config.method].select
    if config.method == "interval":
        selector = partial(ranks.interval, k=config.interval)
    if config.method == "ot":
        selector = partial(transported, confidence=config.confidence)
    return selector if config.easiest is None else partial(ranks.within, selector=selector, share=config.easiest)
