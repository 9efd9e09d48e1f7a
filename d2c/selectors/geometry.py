"""Selectors that cover a class in feature space: no image far from a pick, or all near one on average."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2c.selectors.base import ROUNDING, Candidates, Features, Rows, Values, best, features_of, mask

_BLOCK = 4096
ANCHORS = 6000
"""All distances between so many images take 144 MB."""
_BATCH = 64


def k_center(candidates: Candidates, budget: int, taken: Rows) -> Rows:
    """Farthest first (Gonzalez 1985): the image nearest to the mean, then each time the one farthest from all picks.

    Without ``taken``, no image is farther from its nearest pick than twice the least that any choice could reach.
    """
    features = features_of(candidates)
    count = min(budget, len(features))
    rows = list(taken.tolist())
    free = ~mask(len(features), taken)
    nearest = np.full(len(features), np.inf)
    for row in rows:
        nearest = np.minimum(nearest, _squared_distances(features, features[row]))
    while len(rows) < count:
        if rows:
            row = best(-nearest, free)
        else:
            row = best(_squared_distances(features, features.mean(axis=0, dtype=np.float64)), free)
        rows.append(row)
        free[row] = False
        nearest = np.minimum(nearest, _squared_distances(features, features[row]))
    return np.array(rows, dtype=np.int64)


def _squared_distances(features: Features, point: npt.NDArray[np.floating]) -> Values:
    """[N] from every row to ``point``, by differences: a copy of it is at 0, whatever the row's place."""
    found = np.empty(len(features))
    for start in range(0, len(features), _BLOCK):
        away = features[start : start + _BLOCK] - point
        found[start : start + _BLOCK] = np.einsum("nd,nd->n", away, away, dtype=np.float64)
    return found


def facility_location(candidates: Candidates, budget: int, taken: Rows) -> Rows:
    """Greedy on the mean distance of the class's images to their nearest pick (that of k-medians).

    With the similarity ``c - distance``, c at least the largest distance, this is the facility location function, and c
    changes no pick. Measured on CIFAR-10: squared distances, cosines and a Gaussian give sets farther from the class.
    What can no longer be the best is not evaluated (Minoux 1978). Of more than `ANCHORS` images so many, evenly by
    key, stand for all where distances are averaged; any image can be picked.
    """
    from threadpoolctl import threadpool_limits

    features = features_of(candidates)
    centred = features - features.mean(axis=0, dtype=np.float64)
    with threadpool_limits(1):  # sums over several threads differ from run to run
        anchors = np.linspace(0, len(features) - 1, min(len(features), ANCHORS)).astype(np.int64)
        return _lazy_greedy(_Distances(centred, anchors), min(budget, len(features)), taken)


class _Distances:
    """Distances from rows of features f8 [N, D] to A anchors: kept where all are anchors, else computed when asked."""

    def __init__(self, features: Values, anchors: Rows) -> None:
        self._features, self._anchors = features, features[anchors]
        self.squares, self._anchor_squares = (np.einsum("nd,nd->n", x, x) for x in (features, self._anchors))
        self._dense = self._compute(anchors) if len(anchors) == len(features) else None

    def __call__(self, rows: Rows) -> Features:
        """f4 [len(rows), A]."""
        return self._compute(rows) if self._dense is None else self._dense[rows]

    def _compute(self, rows: Rows) -> Features:
        found = np.empty((len(rows), len(self._anchors)), np.float32)
        for start in range(0, len(rows), _BATCH):
            part = rows[start : start + _BATCH]
            sums = self.squares[part, None] + self._anchor_squares
            block = sums - 2 * (self._features[part] @ self._anchors.T)
            # Copies are at 0, not at the root of what rounding leaves.
            found[start : start + _BATCH] = np.sqrt(np.where(block > ROUNDING * sums, block, 0))
        return found


def _lazy_greedy(distances: _Distances, count: int, taken: Rows) -> Rows:
    size = len(distances.squares)
    rows, free = taken.tolist(), ~mask(size, taken)
    farther_than_any = 2 * np.sqrt(distances.squares.max())
    nearest = distances(taken).min(axis=0, initial=farther_than_any)
    # A gain never grows with further picks: an old one is a bound of the new one.
    bounds = np.full(size, np.inf)
    while len(rows) < count:
        fresh = np.zeros(size, dtype=bool)
        while True:
            stale = np.flatnonzero(free & ~fresh)
            if not len(stale) or bounds[stale].max() < bounds[fresh].max(initial=-np.inf):
                break
            if len(stale) > _BATCH:
                stale = stale[np.argpartition(-bounds[stale], _BATCH)[:_BATCH]]
            bounds[stale] = np.maximum(nearest - distances(stale), 0).sum(axis=1, dtype=np.float64)
            fresh[stale] = True
        rows.append(best(-bounds, fresh))
        free[rows[-1]] = False
        nearest = np.minimum(nearest, distances(np.array(rows[-1:]))[0])
    return np.array(rows, dtype=np.int64)
