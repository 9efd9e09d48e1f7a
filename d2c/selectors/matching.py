"""Selectors that match a class's distribution: herding, moments, a Gaussian kernel, and features with difficulty.

All minimise one objective, the squared distance between the kernel means of the picks S and of the class's N images
(maximum mean discrepancy, Gretton et al. 2012, eq. 2), and differ in the kernel k:

    1/n^2 sum_{s,t in S} k(s, t) - 2/n sum_{s in S} m(s) + 1/N sum_x m(x),    m(x) = 1/N sum_y k(x, y)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from d2c.selectors.base import Candidates, Features, Rows, Values, features_of
from d2c.selectors.search import greedy, swap

AXES = 32
"""Axes of largest variance that are matched. On CIFAR-10 with 128 features 64 or all match no better."""
DIFFICULTY = 0.3
"""Measured on CIFAR-10 between 0.1 and 1: halves the distance to the class in difficulty, at no cost in features."""
SWEEPS = 5
_BLOCK = 1 << 21  # entries of a block of kernel values: 16 MiB
_SAMPLE = 1000
_NOTHING = 1e-9  # share of the scale of the data that is rounding


class Kernel(Protocol):
    """A kernel on the N candidates. ``mean`` [N]: of a candidate with all. ``diagonal`` [N]: with itself."""

    mean: Values
    diagonal: Values

    def column(self, row: int) -> Values:
        """[N] Of all candidates with candidate ``row``."""
        ...


class KernelMean:
    """The objective above, for `d2c.selectors.search`. Memory: a few [N] arrays, whatever the number of picks."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel, self._constant = kernel, float(kernel.mean.mean())
        self._chosen: set[int] = set()
        self._sums = np.zeros(len(kernel.mean))
        """Of the columns of ``_chosen``."""

    def value(self, rows: Rows) -> float:
        sums, n = self._summed(rows), len(rows)
        return float(sums[rows].sum() / n**2 - 2 * self._kernel.mean[rows].sum() / n) + self._constant

    def added(self, rows: Rows) -> Values:
        return self._with_one_more(rows, self._summed(rows))

    def swapped(self, rows: Rows, place: int) -> Values:
        return self._with_one_more(np.delete(rows, place), self._summed(rows) - self._kernel.column(int(rows[place])))

    def _with_one_more(self, rows: Rows, sums: Values) -> Values:
        kernel, n = self._kernel, len(rows) + 1
        among = sums[rows].sum() + 2 * sums + kernel.diagonal
        return np.asarray(among / n**2 - 2 * (kernel.mean[rows].sum() + kernel.mean) / n + self._constant)

    def _summed(self, rows: Rows) -> Values:
        """[N] Sums over ``rows`` of the kernel's columns: from one call to the next only few rows change."""
        wanted = set(rows.tolist())
        for row in sorted(wanted - self._chosen):
            self._sums += self._kernel.column(row)
        for row in sorted(self._chosen - wanted):
            self._sums -= self._kernel.column(row)
        self._chosen = wanted
        return self._sums


class Linear:
    """k(x, y) = x.y of points f8 [N, d]."""

    def __init__(self, points: Values) -> None:
        self._points = points
        self.mean = points @ points.mean(axis=0)
        self.diagonal = np.einsum("nd,nd->n", points, points)

    def column(self, row: int) -> Values:
        return np.asarray(self._points @ self._points[row])


class MeanAndCovariance:
    """k(x, y) = x.y + (x.y)^2 of centred points f8 [N, d]: the objective is |d mean|^2 + |d second moments|_F^2."""

    def __init__(self, points: Values) -> None:
        self._points = points
        squares = np.einsum("nd,nd->n", points, points)
        self.diagonal = squares + squares**2
        moments = points.T @ points / len(points)
        self.mean = points @ points.mean(axis=0) + np.einsum("nd,nd->n", points @ moments, points)

    def column(self, row: int) -> Values:
        products = self._points @ self._points[row]
        return np.asarray(products + products**2)


class Gaussian:
    """k(x, y) = exp(-|x - y|^2 / h) of points f8 [N, d]; h is the median of |x - y|^2 over pairs of them.

    N^2 d operations, in blocks: N = 50,000 needs 32 MiB beside the points.
    """

    def __init__(self, points: Values) -> None:
        points = points * np.sqrt(2 / median_square(points))
        halves = -0.5 * np.einsum("nd,nd->n", points, points)[:, None]
        ones = np.ones_like(halves)
        # One product gives -|x - y|^2 / 2.
        self._left, self._right = np.hstack([points, halves, ones]), np.hstack([points, ones, halves])
        self.diagonal, self.mean = np.ones(len(points)), np.empty(len(points))
        step = max(1, _BLOCK // len(points))
        for start in range(0, len(points), step):
            block = self._left[start : start + step] @ self._right.T
            self.mean[start : start + step] = np.exp(block, out=block).mean(axis=1)

    def column(self, row: int) -> Values:
        return np.asarray(np.exp(self._left @ self._right[row]))


def principal(features: Features, count: int) -> Values:
    """Centred features on ``count`` axes of largest variance, scaled to a mean square norm of 1: f8 [N, <= count].

    Axes without variance are left out, perhaps all of them.
    """
    from scipy.linalg import eigh

    wide = features - features.mean(axis=0, dtype=np.float64)
    short = min(wide.shape)
    table = wide.T @ wide if wide.shape[1] == short else wide @ wide.T
    variances, axes = eigh(table, subset_by_index=[max(0, short - count), short - 1])
    axes = axes[:, variances > _NOTHING * variances[-1]]
    if wide.shape[1] > short:
        axes = wide.T @ axes
        axes /= np.linalg.norm(axes, axis=0)
    points = wide @ axes
    return np.asarray(points / np.sqrt(np.einsum("nd,nd->", points, points) / len(points)))


def median_square(points: npt.NDArray[np.floating]) -> float:
    """The median squared distance between different points, of at most `_SAMPLE` of them; 1 where none differ."""
    from scipy.spatial.distance import pdist

    some = points[np.linspace(0, len(points) - 1, min(len(points), _SAMPLE)).astype(np.int64)]
    squares = pdist(some, "sqeuclidean")
    # Copies would shrink it to nothing, and after that rounding.
    apart = squares[squares > _NOTHING * squares.max(initial=0)]
    return float(np.median(apart)) if len(apart) else 1.0


def herding(candidates: Candidates, budget: int, taken: Rows) -> Rows:
    """Greedy on the distance between the mean of the picks and of the class (Welling 2009, as in iCaRL 2017)."""
    from threadpoolctl import threadpool_limits

    features = features_of(candidates)
    with threadpool_limits(1):  # sums over several threads differ from run to run
        objective = KernelMean(Linear(features - features.mean(axis=0, dtype=np.float64)))
        return greedy(objective, np.ones(len(features), dtype=bool), budget, taken)


def moments(candidates: Candidates, budget: int, taken: Rows) -> Rows:
    """Match mean and covariance on the `AXES` main axes: greedy, then swaps."""
    return _matched(candidates, budget, taken, MeanAndCovariance)


def kernel(candidates: Candidates, budget: int, taken: Rows) -> Rows:
    """Match the whole distribution on the `AXES` main axes, by a Gaussian kernel: greedy, then swaps."""
    return _matched(candidates, budget, taken, Gaussian)


def match(candidates: Candidates, budget: int, taken: Rows) -> Rows:
    """`kernel` on features and difficulty together: among easy as among hard images, picks look as the class does.

    The Gaussian of both is the product of one of the features and one of the rank by score, which has `DIFFICULTY`
    times the variance of the features.
    """
    return _matched(candidates, budget, taken, Gaussian, DIFFICULTY)


def _matched(
    candidates: Candidates, budget: int, taken: Rows, kernel: Callable[[Values], Kernel], difficulty: float = 0.0
) -> Rows:
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # sums over several threads differ from run to run
        points = principal(features_of(candidates), AXES)
        if difficulty:
            points = np.hstack([points, np.sqrt(difficulty) * _standard_ranks(candidates.scores)[:, None]])
        objective, pool = KernelMean(kernel(points)), np.ones(len(points), dtype=bool)
        return swap(objective, pool, greedy(objective, pool, budget, taken), len(taken), SWEEPS)


def _standard_ranks(scores: Values) -> Values:
    """[N] Ranks by score, 0 on average and 1 in variance; equal scores have their mean rank."""
    from scipy.stats import rankdata

    ranks = rankdata(scores) - (len(scores) + 1) / 2
    return np.asarray(ranks * np.sqrt(12) / len(scores))
