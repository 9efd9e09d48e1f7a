"""Why an image was chosen or not."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2c import neighbours
from d2c.errors import D2CError, UsageError
from d2c.selectors import METHODS, Candidates, ranks
from d2c.workspace import BAD_FILES, CROSS_ENTROPIES, DUPLICATES, FEATURES, SCORES, SELECTION, Workspace
from formats.files import read_table

Array: TypeAlias = np.ndarray[Any, Any]
NEAREST = 3
"""Picks that an image is compared with."""
_MADE_BY = "d2c select --ratio R"
_CLOSE = 2_000  # keys beside a mistyped one, in order, among which similar ones are looked for


@dataclass(frozen=True, eq=False)
class Case:
    """An image among those of its class, which have N rows in key order.

    ``picks``: rows in order of choice. ``asked``: the options of the selection.
    """

    asked: dict[str, Any]
    candidates: Candidates
    row: int
    picks: Array

    @property
    def picked(self) -> bool:
        return self.row in self.picks

    def ranks(self) -> Array:
        """[N] 0 is the easiest."""
        found = np.empty(len(self.candidates), dtype=np.int64)
        found[np.argsort(self.candidates.scores, kind="stable")] = np.arange(len(found))
        return found

    def why(self) -> str:
        """Why the image is in or out, in words of the method."""
        size, budget = len(self.candidates), len(self.picks)
        if not budget:
            return "its class gives no images"
        if budget == size:
            return "its class gives all images that it has"
        method = str(self.asked["method"])
        if method not in METHODS:
            return f"{method} is a function of yours: it {self._place()}, and only it knows why"
        share, pool = self.pool()
        if self.ranks()[self.row] >= pool:
            return f"only the easiest {share:.0%} of its class may be picked, which end at rank {pool - 1:,}"
        words = _WORDS.get(method)
        return words(self) if words else f"{method} aims at {METHODS[method].goal}: it {self._place()}{self._far()}"

    def pool(self) -> tuple[float, int]:
        """Which share of the class may be picked, the easiest, and how many images that are."""
        share, size = 1.0, len(self.candidates)
        # The window of random-window is a part of what --easiest leaves.
        window = ranks.PAPER_SPAN if self.asked["method"] == "random-window" else None
        for part in (self.asked.get("easiest"), window):
            if part is not None:
                share, size = share * part, ranks.pool_size(size, len(self.picks), part)
        return share, size

    def _place(self) -> str:
        if not self.picked:
            return "is not among its choices"
        return f"was choice {int(np.flatnonzero(self.picks == self.row)[0]) + 1:,} of {len(self.picks):,}"

    def _far(self) -> str:
        """How far a rejected image is from the picks, beside the other rejected ones."""
        features = self.candidates.features
        if self.picked or features is None:
            return ""
        others = np.setdiff1d(np.arange(len(features)), self.picks)
        apart, _ = neighbours.nearest(features[others], features[self.picks])
        own = float(apart[np.searchsorted(others, self.row)])
        return f", and {own:.3g} away from the nearest; the mean of those left out is {apart.mean():.3g}"

    def nearest(self) -> list[dict[str, Any]]:
        """The picks nearest to the image, but for itself: by features where there are some, else by rank."""
        others, own = self.picks[self.picks != self.row], self.ranks()
        features = self.candidates.features
        if features is None:
            apart = np.abs(own[others] - own[self.row]).astype(np.float64)
        else:
            apart = np.linalg.norm(features[others].astype(np.float64) - features[self.row], axis=1)
        found = others[np.lexsort((others, apart))[:NEAREST]]
        rows = [
            {"key": self.candidates.keys[row], "class_rank": int(own[row]), "score": float(self.candidates.scores[row])}
            for row in found
        ]
        if features is not None:
            rows = [{**told, "distance": float(far)} for told, far in zip(rows, np.sort(apart), strict=False)]
        return rows


def _interval(case: Case) -> str:
    own = case.ranks()
    rank, taken = int(own[case.row]), np.sort(own[case.picks])
    if case.picked:
        # Steps of less than 10 ranks need be no whole number.
        how = "equally distant" if len(np.unique(np.diff(taken))) < 2 else "evenly spread"
        return f"interval takes {how} ranks, {_listed(taken)}, and rank {rank:,} is one of them"
    below, above = taken[taken < rank], taken[taken > rank]
    if not len(above):
        return f"rank {rank:,} lies beyond the last rank that interval takes, {int(below[-1]):,}"
    return f"interval takes ranks {int(below[-1]):,} and {int(above[0]):,}; rank {rank:,} lies between them"


def _listed(taken: Array) -> str:
    shown = [f"{int(rank):,}" for rank in taken]
    return ", ".join(shown) if len(shown) <= 4 else f"{', '.join(shown[:3])} ... {shown[-1]}"


def _random(case: Case) -> str:
    budget, size = len(case.picks), len(case.candidates)
    order = ranks.random(case.candidates, size, np.empty(0, dtype=np.int64))
    order = order[case.ranks()[order] < case.pool()[1]]
    draw = int(np.flatnonzero(order == case.row)[0]) + 1
    return (
        f"by the seed {case.candidates.seed} it is draw {draw:,} of {len(order):,}, and the first {budget:,} are picked"
    )


def _lowest(case: Case) -> str:
    own = case.ranks()
    return f"its rank is {int(own[case.row]):,}, and ranks 0 to {int(own[case.picks].max()):,} are picked"


def _highest(case: Case) -> str:
    own = case.ranks()
    first, last = int(own[case.picks].min()), int(own[case.picks].max())
    return f"its rank is {int(own[case.row]):,}, and ranks {first:,} to {last:,} are picked"


def _medium(case: Case) -> str:
    own = case.ranks()
    first, last = int(own[case.picks].min()), int(own[case.picks].max())
    return f"its rank is {int(own[case.row]):,}, and the middle ones are picked, {first:,} to {last:,}"


_WORDS: dict[str, Callable[[Case], str]] = {
    "interval": _interval,
    "random": _random,
    "random-window": _random,
    "min": _lowest,
    "max": _highest,
    "medium": _medium,
}


def explain(workspace: Workspace, key: str, name: str | None = None) -> dict[str, Any]:
    """What is known of the image ``key``, and why the selection ``name``, or the one made last, has it or not.

    Raises:
        D2CError: the image was not scored, there is no such selection, or the images were scored again since.
        UsageError: nothing is selected yet.
    """
    if name is None:
        name = (workspace.current("selection") or {}).get("name")
    if name is None:
        raise UsageError("nothing is selected yet", where=workspace.path, hint=f"make a selection with: {_MADE_BY}")
    scores, record = workspace.scores.require("d2c score DIR"), workspace.selected(name)
    asked, column = record.config, str(record.config["score"])
    columns = dict.fromkeys(["key", "label", "score", "stderr", column])
    table = read_table(workspace.scores.output(SCORES), columns=list(columns))
    row = pc.index(table["key"], key).as_py()
    if row < 0:
        raise _unknown(workspace, table["key"], key)
    label = table["label"][row].as_py()
    members = np.flatnonzero(table["label"].to_numpy() == label)
    mine = table.take(pa.array(members))
    chosen = read_table(workspace.selection(name).output(SELECTION), columns=["key", "label"])
    chosen = chosen.filter(pc.equal(chosen["label"], label))["key"]
    features = None
    if asked.get("features") is not None:
        stored = np.load(workspace.features(asked["features"]).path / FEATURES, mmap_mode="r", allow_pickle=False)
        features = np.asarray(stored[members], dtype=np.float32)
    judged = {}
    if "confidence" in record.inputs:
        entropies = np.load(workspace.confidence(asked["features"]).output(CROSS_ENTROPIES), mmap_mode="r")
        of_class = float(entropies[members].mean())
        judged = {"cross_entropy": float(entropies[row]), "class_mean_cross_entropy": of_class}
    values = mine[column].to_numpy().astype(np.float64)
    candidates = Candidates(mine["key"].to_pylist(), values, features, seed=int(asked.get("seed") or 0))
    case = Case(
        asked,
        candidates,
        int(np.searchsorted(members, row)),
        pc.index_in(chosen, value_set=mine["key"].combine_chunks()).to_numpy().astype(np.int64),
    )
    rank, size = int(case.ranks()[case.row]), len(members)
    return {
        "key": key,
        "class": scores.summary["classes"][label]["name"],
        "selection": name,
        "picked": case.picked,
        "why": case.why(),
        "score": table["score"][row].as_py(),
        "stderr": table["stderr"][row].as_py(),
        **({} if column == "score" else {column: table[column][row].as_py()}),
        **judged,
        "class_rank": rank,
        "class_images": size,
        "class_picks": len(case.picks),
        "tenth_of_the_class": rank * 10 // size + 1,
        "nearest_picks": case.nearest(),
        "duplicate": _duplicate(workspace, key),
    }


def _meant(typed: str, known: list[str]) -> str:
    close = difflib.get_close_matches(typed, known, n=3, cutoff=0.6)
    return f"did you mean {', or '.join(close)}?" if close else ""


def _duplicate(workspace: Workspace, key: str) -> dict[str, Any] | None:
    """The image's row in the list of duplicates; None where it has none, or nobody looked."""
    found = read_table(workspace.scores.output(DUPLICATES))
    found = found.filter(pc.equal(found["key"], key)).drop(["key", "label"])
    return dict(found.to_pylist()[0]) if found.num_rows else None


def _unknown(workspace: Workspace, keys: pa.ChunkedArray, key: str) -> D2CError:
    """Why ``key`` has no score, or which keys may have been meant."""
    duplicate = _duplicate(workspace, key)
    if duplicate is not None:
        return D2CError(
            "this image was dropped before it could be selected", found=f"{key}, a duplicate of {duplicate['twin']}"
        )
    bad = read_table(workspace.scores.output(BAD_FILES))
    bad = bad.filter(pc.equal(bad["key"], key))
    if bad.num_rows:
        return D2CError("this image could not be scored", found=f"{key}: {bad['reason'][0].as_py()}")
    # A path to the file ends in its key; a bare name is the end of one.
    ends = [other for other in (key.split("/", part)[-1] for part in range(1, key.count("/") + 1)) if _has(keys, other)]
    named = keys.filter(pc.match_substring(keys, f"/{key.rsplit('/', 1)[-1]}")).slice(0, 3).to_pylist()
    start = max(0, int(pc.sum(pc.less(keys, key)).as_py()) - _CLOSE // 2)
    hint = (
        f"did you mean {', or '.join(ends or named)}?"
        if ends or named
        else _meant(key, keys.slice(start, _CLOSE).to_pylist())
    )
    return D2CError(
        "no scored image has this key",
        where=workspace.path,
        found=key,
        expected="a path below the source",
        hint=hint,
    )


def _has(keys: pa.ChunkedArray, key: str) -> bool:
    return int(pc.index(keys, key).as_py()) >= 0
