"""Selectors that look at ranks by score only, and the pool of easy images that any selector can be restricted to.

Candidates come sorted by key, so a stable sort by score breaks ties by key.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from d2c.errors import UsageError
from d2c.selectors.base import Candidates, Rows, Selector, mask
from formats.hashing import xxh3

PAPER_SPAN = 0.74
"""Part of a class that the paper's three ImageNet settings span: n*k/1300 is 0.74, 0.62 and 0.77 (its Appendix C)."""
WHOLE = 10.0
"""Distances of so many ranks and more are whole numbers, as the paper's k are (96, 16 and 10). Of a smaller one the
fraction is much: at 25 of 60 images the distance is 1.8, and with 1 the picks would be the easiest images."""


def interval(candidates: Candidates, budget: int, taken: Rows, *, k: int | None = None) -> Rows:
    """Ranks 0, k, 2k, ... from the easiest (paper, section 3.2); None: so that they span `PAPER_SPAN`.

    Raises:
        UsageError: there is something in ``taken``: another budget has another k.
    """
    if len(taken):
        raise UsageError(
            "interval selections of several budgets do not lie inside each other",
            found=f"{len(taken)} images chosen before",
            expected="one budget",
            hint="select each budget on its own, or with another method",
        )
    return _easiest_first(candidates)[interval_ranks(len(candidates), budget, k)]


def interval_ranks(size: int, budget: int, k: int | None) -> Rows:
    """Ranks 0, k, 2k, ... of the ``budget`` picks in a class of ``size`` images (paper, section 3.2).

    Where ``k`` overruns a small class it shrinks to the largest that fits, so that the class gives
    ``min(budget, size)`` images and never fewer. None: the k whose picks span `PAPER_SPAN` of the class, a whole number
    from `WHOLE` on, and at least 1; ranks are then rounded down.
    """
    count = min(budget, size)
    if count <= 1:
        return np.zeros(count, dtype=np.int64)
    places = np.arange(count, dtype=np.int64)
    if k is None:
        step = max(1.0, PAPER_SPAN * size / count)
        spread: Rows = np.floor(places * (step if step < WHOLE else int(step))).astype(np.int64)
        return spread
    return places * max(1, min(k, (size - 1) // (count - 1)))


def random(candidates: Candidates, budget: int, taken: Rows) -> Rows:
    """In the order of a hash of seed and key: an image's place depends on no other image."""
    draws = [xxh3(f"random\0{candidates.seed}\0{key}".encode()) for key in candidates.keys]
    return _first(np.argsort(np.array(draws, dtype="U32"), kind="stable"), budget, taken)


def random_window(candidates: Candidates, budget: int, taken: Rows, *, share: float = PAPER_SPAN) -> Rows:
    """Random among the easiest ``share``: the control of `interval`, which covers the same window in equal steps."""
    return within(candidates, budget, taken, selector=random, share=share)


def easiest(candidates: Candidates, budget: int, taken: Rows) -> Rows:
    """By score, the smallest first."""
    return _first(_easiest_first(candidates), budget, taken)


def hardest(candidates: Candidates, budget: int, taken: Rows) -> Rows:
    """By score, the largest first."""
    return _first(np.argsort(-candidates.scores, kind="stable"), budget, taken)


def medium(candidates: Candidates, budget: int, taken: Rows) -> Rows:
    """By distance in ranks from the median; of two equally far the easier first."""
    order = _easiest_first(candidates)
    away = np.abs(2 * np.arange(len(order)) - (len(order) - 1))
    return _first(order[np.argsort(away, kind="stable")], budget, taken)


def easy_pool(candidates: Candidates, budget: int, share: float) -> npt.NDArray[np.bool_]:
    """Bool [N]: the easiest ``share`` of the candidates, but at least ``budget`` of them.

    Raises:
        UsageError: ``share`` is none.
    """
    if not 0 < share <= 1:
        raise UsageError("a pool is a share of a class", found=share, expected="0 < share <= 1")
    return mask(len(candidates), _easiest_first(candidates)[: pool_size(len(candidates), budget, share)])


def pool_size(size: int, budget: int, share: float) -> int:
    """Images in the `easy_pool` of ``size`` candidates."""
    return min(size, max(budget, round(share * size)))


def within(candidates: Candidates, budget: int, taken: Rows, *, selector: Selector, share: float) -> Rows:
    """``selector``, given only the easiest ``share`` of the candidates, and ``taken``.

    Raises:
        UsageError: ``share`` is none.
    """
    rows = np.flatnonzero(easy_pool(candidates, budget, share) | mask(len(candidates), taken))
    pool = replace(
        candidates,
        keys=[candidates.keys[row] for row in rows],
        scores=candidates.scores[rows],
        features=None if candidates.features is None else candidates.features[rows],
        confusion=None if candidates.confusion is None else candidates.confusion[rows],
    )
    return rows[selector(pool, budget, np.searchsorted(rows, taken))]


def _easiest_first(candidates: Candidates) -> Rows:
    return np.argsort(candidates.scores, kind="stable")


def _first(order: Rows, budget: int, taken: Rows) -> Rows:
    """``taken``, then the first others of ``order`` until there are ``budget``, or all."""
    others = order[~mask(len(order), taken)[order]]
    return np.concatenate([taken, others[: max(0, budget - len(taken))]])
