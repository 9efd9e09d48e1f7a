"""Distribution matching: the objective against dense sums, searches against brute force, and what is matched."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from d2c.selectors import Candidates, Selector, matching
from d2c.selectors.matching import Gaussian, Kernel, KernelMean, Linear, MeanAndCovariance
from d2c.selectors.search import greedy, swap

NONE = np.zeros(0, dtype=np.int64)
Matrix = npt.NDArray[np.float64]


def plain_linear(points: Matrix) -> Matrix:
    return points @ points.T


def plain_moments(points: Matrix) -> Matrix:
    seconds = np.array([np.outer(point, point).ravel() for point in points])
    return points @ points.T + seconds @ seconds.T


def plain_gaussian(points: Matrix) -> Matrix:
    squares = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    apart = squares[np.triu_indices(len(points), 1)]
    apart = apart[apart > 1e-9]
    return np.asarray(np.exp(-squares / (np.median(apart) if len(apart) else 1)))


Pair = tuple[Callable[[Matrix], Kernel], Callable[[Matrix], Matrix]]
KERNELS: list[Pair] = [(Linear, plain_linear), (MeanAndCovariance, plain_moments), (Gaussian, plain_gaussian)]
each_kernel = pytest.mark.parametrize(("kernel", "plain"), KERNELS)


def points(largest: int) -> st.SearchStrategy[Matrix]:
    """Quarters: ties, copies, constant columns and far points all occur."""
    shapes = st.tuples(st.integers(2, largest), st.integers(1, 4))
    return arrays(np.float64, shapes, elements=st.integers(-8, 8).map(lambda i: i / 4))


def plain_value(table: Matrix, rows: list[int]) -> float:
    return float(table[np.ix_(rows, rows)].mean() - 2 * table[rows].mean() + table.mean())


@each_kernel
@given(data=st.data(), features=points(10))
@settings(deadline=None)
def test_the_incremental_objective_is_the_dense_one(
    kernel: Callable[[Matrix], Kernel], plain: Callable[[Matrix], Matrix], data: st.DataObject, features: Matrix
) -> None:
    objective, table, size = KernelMean(kernel(features)), plain(features), len(features)
    close = {"rel": 1e-6, "abs": 1e-12 * max(1.0, float(np.abs(table).max()))}
    subsets = st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True)
    for rows in data.draw(st.lists(subsets, min_size=1, max_size=4)):  # in any order, from one state to the next
        chosen = np.array(rows, dtype=np.int64)
        others = [row for row in range(size) if row not in rows]
        assert objective.value(chosen) == pytest.approx(plain_value(table, rows), **close)
        place = data.draw(st.integers(0, len(rows) - 1))
        added, swapped = objective.added(chosen), objective.swapped(chosen, place)
        for row in others:
            assert added[row] == pytest.approx(plain_value(table, [*rows, row]), **close)
            instead = [*rows[:place], row, *rows[place + 1 :]]
            assert swapped[row] == pytest.approx(plain_value(table, instead), **close)
    assert objective.added(NONE) == pytest.approx([plain_value(table, [row]) for row in range(size)], **close)


@each_kernel
@given(data=st.data(), features=points(9), budget=st.integers(1, 5))
@settings(deadline=None)
def test_greedy_adds_the_best_and_swaps_end_where_none_helps(
    kernel: Callable[[Matrix], Kernel],
    plain: Callable[[Matrix], Matrix],
    data: st.DataObject,
    features: Matrix,
    budget: int,
) -> None:
    size, table = len(features), plain(features)
    slack = 1e-9 * max(1.0, float(np.abs(table).max()))
    pool = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    taken = np.array(
        data.draw(st.lists(st.integers(0, size - 1), max_size=min(2, budget), unique=True)), dtype=np.int64
    )
    objective = KernelMean(kernel(features))
    rows = greedy(objective, pool, budget, taken).tolist()
    free = set(np.flatnonzero(pool)) - set(taken.tolist())
    assert len(rows) == min(budget, len(taken) + len(free))
    assert rows[: len(taken)] == taken.tolist()
    for count in range(len(taken), len(rows)):
        values = {row: plain_value(table, [*rows[:count], row]) for row in free - set(rows[:count])}
        assert values[rows[count]] <= min(values.values()) + slack
    if not rows:
        return
    better = swap(objective, pool, np.array(rows), len(taken), 50).tolist()
    assert better[: len(taken)] == taken.tolist()
    assert len(set(better)) == len(rows)
    assert set(better) <= free | set(taken.tolist())
    value = plain_value(table, better)
    assert value <= plain_value(table, rows) + slack
    for place in range(len(taken), len(better)):
        for row in free - set(better):
            assert plain_value(table, [*better[:place], row, *better[place + 1 :]]) >= value - 2 * slack


def candidates(features: npt.ArrayLike, scores: npt.ArrayLike | None = None) -> Candidates:
    given = np.asarray(features, dtype=np.float32)
    values = np.zeros(len(given)) if scores is None else np.asarray(scores, dtype=np.float64)
    return Candidates([f"{i:05d}" for i in range(len(given))], values, given)


def skewed(size: int, width: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Two unequal clusters with long tails, as classes are."""
    rng = np.random.default_rng(seed)
    far = np.where(rng.random((size, 1)) < 0.2, 4.0, 0.0)
    return (rng.gamma(1.0, 1.0, (size, width)) * 0.8 ** np.arange(width) + far).astype(np.float32)


def apart(features: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Distance of the means and of the covariances of some rows and all."""
    some, wide = features[rows].astype(np.float64), features.astype(np.float64)
    return (
        float(np.linalg.norm(some.mean(axis=0) - wide.mean(axis=0))),
        float(np.linalg.norm(np.cov(some.T, bias=True) - np.cov(wide.T, bias=True))),
    )


@pytest.mark.parametrize("selector", [matching.moments, matching.kernel, matching.match])
def test_matched_picks_are_twice_as_near_to_their_class_as_random_ones(selector: Selector) -> None:
    features = skewed(600, 40)
    rows = selector(candidates(features, np.random.default_rng(1).random(600)), 40, NONE)
    draws = np.random.default_rng(2)
    drawn = np.median([apart(features, draws.choice(600, 40, replace=False)) for _ in range(20)], axis=0)
    assert (np.array(apart(features, rows)) < 0.5 * drawn).all()


def test_herding_matches_the_mean_and_moments_the_covariance_too() -> None:
    features = skewed(600, 40)
    herded = apart(features, matching.herding(candidates(features), 40, NONE))
    matched = apart(features, matching.moments(candidates(features), 40, NONE))
    assert herded[0] < 0.3
    assert matched[0] < 0.3
    assert matched[1] < 0.5 * herded[1]


def test_the_gaussian_kernel_matches_a_shape_that_moments_leave_open() -> None:
    normal = np.random.default_rng(0).normal(size=(500, 1)).astype(np.float32)
    quantiles = np.quantile(normal, (np.arange(50) + 0.5) / 50)

    def off(rows: npt.NDArray[np.int64]) -> float:
        return float(np.abs(np.sort(normal[rows, 0]) - quantiles).mean())

    draws = np.random.default_rng(1)
    assert off(matching.kernel(candidates(normal), 50, NONE)) < min(
        off(draws.choice(500, 50, replace=False)) for _ in range(20)
    )
    # Two heaps at one standard deviation on both sides have the same mean and variance.
    assert off(matching.moments(candidates(normal), 50, NONE)) > 0.4


def test_match_picks_every_difficulty_though_features_do_not_tell_it() -> None:
    found = {matching.match: 0.0, matching.kernel: 0.0}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        features, scores = rng.normal(size=(800, 20)).astype(np.float32), rng.gamma(1.0, 1.0, 800)
        share = (np.argsort(np.argsort(scores)) + 0.5) / 800
        for selector in found:
            rows = selector(candidates(features, scores), 20, NONE)
            found[selector] += float(np.abs(np.sort(share[rows]) - (np.arange(20) + 0.5) / 20).mean())
    assert found[matching.match] < 0.7 * found[matching.kernel]


def test_match_looks_at_ranks_and_not_at_the_scale_of_scores() -> None:
    features, scores = skewed(200, 5), np.random.default_rng(3).random(200)
    plain = matching.match(candidates(features, scores), 12, NONE)
    np.testing.assert_array_equal(matching.match(candidates(features, np.exp(20 * scores)), 12, NONE), plain)


@pytest.mark.parametrize("shape", [(300, 40), (60, 200)])
def test_main_axes_keep_the_largest_variances(shape: tuple[int, int]) -> None:
    features = (np.random.default_rng(0).normal(size=shape) * 0.9 ** np.arange(shape[1]) + 7).astype(np.float32)
    points = matching.principal(features, 8)
    singular = np.linalg.svd(features - features.mean(axis=0, dtype=np.float64), compute_uv=False)
    own = np.linalg.svd(points, compute_uv=False)
    np.testing.assert_allclose(own / own[0], singular[:8] / singular[0], rtol=1e-5)
    assert (points**2).sum(axis=1).mean() == pytest.approx(1)


def test_a_large_class_needs_no_table_of_all_pairs() -> None:
    import tracemalloc

    features = np.random.default_rng(0).normal(size=(8000, 4))
    tracemalloc.start()
    kernel = Gaussian(features)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # all pairs would be 512e6
    for row in (0, 4000, 7999):
        assert kernel.mean[row] == pytest.approx(kernel.column(row).mean())
