"""Partial transport: its value against a plain Sinkhorn, and a search that only ever improves."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from threadpoolctl import threadpool_limits

from d2c.errors import D2CError, UsageError
from d2c.selectors import METHODS, Candidates, search
from d2c.selectors import ot as module
from d2c.selectors.base import mask
from d2c.selectors.ot import PartialTransport, Search, Weights, ot

NONE = np.zeros(0, dtype=np.int64)
LOOSE = Weights(epsilon=2.0, iterations=7, capacity=1.3, moments=0.7, confusion=3.0)
Points = npt.NDArray[np.float32]


def reference(points: Points, confusion: npt.NDArray[np.float64] | None, rows: list[int], weights: Weights) -> float:
    """The formulas of GADC one by one, in float64, with the dummy's cost at 0.05 of the median as there."""
    x = points.astype(np.float64)
    chosen, n, m = x[rows], len(x), len(rows)
    cost = ((chosen[:, None] - x[None]) ** 2).sum(axis=2)
    dummy = np.full((1, n), 0.05 * np.sort(cost.ravel())[(cost.size - 1) // 2])
    kernel = np.exp(-np.vstack([cost, dummy]) / weights.epsilon)
    supply = np.append(np.full(m, 1 / m), weights.capacity - 1)
    v = np.ones(n)
    for _ in range(weights.iterations):
        u = supply / (kernel @ v)
        v = weights.capacity / n / (kernel.T @ u)
    transport = ((u[:, None] * kernel * v)[:m] * cost).sum()
    variance = chosen.var(axis=0, ddof=1) if m > 1 else np.zeros(x.shape[1])
    goal = x.var(axis=0, ddof=1)
    moments = 1.25 * ((chosen.mean(axis=0) - x.mean(axis=0)) ** 2).sum()
    moments += (variance + goal - 2 * np.sqrt(variance * goal + 1e-20)).sum()
    confidence = 0.0 if confusion is None else confusion[rows].mean()
    return float(transport + weights.moments * moments + weights.confusion * confidence)


def clustered(count: int, width: int = 12, seed: int = 0) -> Candidates:
    """Median squared distance about 150."""
    rng = np.random.default_rng(seed)
    points = 5 * rng.normal(size=(4, width))[rng.integers(0, 4, count)] + rng.normal(size=(count, width))
    return placed(points.astype(np.float32), rng.exponential(size=count))


def placed(points: Points, confusion: npt.NDArray[np.float64] | None = None) -> Candidates:
    return Candidates([f"{i:05d}" for i in range(len(points))], np.zeros(len(points)), points, confusion)


def objective(candidates: Candidates, weights: Weights = LOOSE) -> PartialTransport:
    assert candidates.features is not None
    return PartialTransport(candidates.features, candidates.confusion, np.arange(len(candidates)), weights)


def points(least: int = 2, largest: int = 10) -> st.SearchStrategy[Points]:
    """Whole numbers: many ties, many copies."""
    shapes = st.tuples(st.integers(least, largest), st.integers(1, 3))
    return arrays(np.float32, shapes, elements=st.integers(-3, 3).map(float))


@pytest.mark.parametrize("weights", [Weights(), LOOSE, Weights(epsilon=5, capacity=1.0), Weights(moments=0)])
@pytest.mark.parametrize("rows", [[3], [5, 1], [0, 7, 11, 30], list(range(0, 40, 3))])
def test_the_value_is_that_of_the_plain_formulas(weights: Weights, rows: list[int]) -> None:
    candidates = clustered(40)
    found = objective(candidates, weights).value(np.array(rows))
    assert candidates.features is not None
    assert found == pytest.approx(reference(candidates.features, candidates.confusion, rows, weights), rel=1e-9)


@given(points(), st.data())
@settings(deadline=None)
def test_the_value_is_that_of_the_formulas_with_copies_and_flat_dimensions(
    features: Points, data: st.DataObject
) -> None:
    some = data.draw(st.permutations(range(len(features))))[: data.draw(st.integers(1, len(features)))]
    found = objective(placed(features)).value(np.array(some))
    # Roots of variances that are 0 but for rounding are what differs.
    assert found == pytest.approx(reference(features, None, list(some), LOOSE), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("rows", [[], [4], [9, 2, 25, 14, 3]])
def test_one_more_and_one_other_agree_with_fresh_values(rows: list[int]) -> None:
    candidates = clustered(30)
    candidates.features[7] = candidates.features[4]  # type: ignore[index]
    judge, chosen = objective(candidates, Weights()), np.array(rows, dtype=np.int64)
    others = np.setdiff1d(np.arange(30), chosen)
    fresh = [judge.value(np.append(chosen, row)) for row in others]
    np.testing.assert_allclose(judge.added(chosen)[others], fresh, rtol=1e-9)
    for place in range(len(rows)):
        fresh = [judge.value(np.array([*rows[:place], row, *rows[place + 1 :]])) for row in others]
        np.testing.assert_allclose(judge.swapped(chosen, place)[others], fresh, rtol=1e-9)


@pytest.mark.parametrize("epsilon", [20.0, 2.0])
def test_what_is_compared_first_is_near_the_value(epsilon: float) -> None:
    judge, rows = objective(clustered(60), Weights(epsilon=epsilon)), np.array([3, 40, 22, 8])
    others = np.setdiff1d(np.arange(60), rows)
    exact = judge.exact(rows, others)
    np.testing.assert_allclose(judge.exact(rows, others, judge.quick), exact, rtol=1e-5)
    assert np.all(judge.cheap(rows)[others] < exact)


@given(points(), st.integers(1, 4))
@settings(deadline=None)
def test_of_few_candidates_each_addition_is_the_best(features: Points, budget: int) -> None:
    judge = objective(placed(features))
    found = Search(judge, len(features), NONE)
    for _ in range(min(budget, len(features))):
        before = found.rows
        found.add()
        values = np.where(mask(len(features), before), np.inf, judge.added(before))
        assert found.value <= values.min() + 2e-6 * abs(values.min()) + 1e-9
        assert found.rows[:-1].tolist() == before.tolist()


@given(points(least=4), st.integers(1, 3), st.integers(0, 5))
@settings(deadline=None)
def test_neither_swaps_nor_restarts_raise_the_value(features: Points, budget: int, seed: int) -> None:
    judge, rng = objective(placed(features)), np.random.default_rng(seed)
    found = Search(judge, len(features), NONE)
    for _ in range(budget):
        found.add()
    steps = [found.value]
    found.swap()
    steps.append(found.value)
    for _ in range(3):
        found.kick(rng)
        steps.append(found.value)
    assert steps == sorted(steps, reverse=True)
    assert len(set(found.rows.tolist())) == budget
    assert found.value == pytest.approx(judge.value(found.rows), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_all_subsets_is_found_among_few(seed: int) -> None:
    candidates = clustered(12, seed=seed)
    judge = objective(candidates, Weights())
    least = min(judge.value(np.array(some)) for some in combinations(range(12), 3))
    assert judge.value(ot(candidates, 3, NONE)) == pytest.approx(least, rel=1e-9)


def test_what_is_passed_over_costs_nothing() -> None:
    candidates = clustered(150, seed=5)
    judge, everywhere = objective(candidates, Weights()), np.ones(150, dtype=bool)
    added = search.greedy(judge, everywhere, 6, NONE)
    every = search.swap(judge, everywhere, added, 0, 30)
    assert judge.value(ot(candidates, 6, NONE)) <= judge.value(every) * (1 + 1e-9)


def test_transport_alone_is_minimised_too() -> None:
    candidates, weights = clustered(80, seed=6), Weights(moments=0, confusion=0)
    judge, rng = objective(candidates, weights), np.random.default_rng(0)
    drawn = [judge.value(rng.permutation(80)[:4]) for _ in range(200)]
    assert judge.value(ot(candidates, 4, NONE, weights=weights)) < min(drawn)


def test_smaller_choices_stay_first_in_larger_ones() -> None:
    candidates = clustered(50)
    small = ot(candidates, 4, NONE)
    large = ot(candidates, 9, small)
    assert large[:4].tolist() == small.tolist()
    assert len(set(large.tolist())) == 9
    assert ot(candidates, 4, small).tolist() == small.tolist()


def test_restarts_leave_what_was_taken() -> None:
    taken = np.array([40, 3])
    found = Search(objective(clustered(50)), 50, taken)
    for _ in range(3):
        found.add()
    first = found.value
    found.kick(np.random.default_rng(0))
    assert found.value < first
    assert found.rows[:2].tolist() == [40, 3]
    assert len(set(found.rows.tolist())) == 5


def test_large_budgets_without_restarts_are_swapped_as_far_as_it_goes() -> None:
    candidates = clustered(120, width=6)
    judge = objective(candidates, Weights())
    added = search.greedy(judge, np.ones(120, dtype=bool), 45, NONE)
    every = search.swap(judge, np.ones(120, dtype=bool), added, 0, 30)
    rows = ot(candidates, 45, NONE)
    assert len(set(rows.tolist())) == 45
    gain = judge.value(added) - judge.value(every)
    assert judge.value(rows) < judge.value(added) - 0.9 * gain


@pytest.mark.parametrize("free", [1, 2, 3])
@pytest.mark.parametrize("taken", [[], [5, 2]])
def test_a_class_that_gives_nearly_all_it_has_gives_its_whole_budget(free: int, taken: list[int]) -> None:
    # A restart puts in no more images than are left out, and so may take no more out.
    for seed in range(3):
        points = np.random.default_rng(seed).normal(size=(12, 3)).astype(np.float32)
        rows = ot(placed(points), 12 - free, np.array(taken, dtype=np.int64))
        assert len(set(rows.tolist())) == len(rows) == 12 - free
        assert rows[: len(taken)].tolist() == taken


@pytest.mark.parametrize("budget", [6, 7, 100])
def test_a_budget_beyond_the_class_takes_all_of_it(budget: int) -> None:
    rows = ot(clustered(6), budget, np.array([4, 2]))
    assert rows[:2].tolist() == [4, 2]
    assert sorted(rows.tolist()) == list(range(6))


def test_a_class_of_one_image() -> None:
    assert ot(clustered(1), 3, NONE).tolist() == [0]
    assert ot(clustered(1), 0, NONE).tolist() == []


def test_a_class_of_copies_gives_different_rows() -> None:
    rows = ot(placed(np.ones((9, 4), np.float32)), 3, NONE)
    assert len(set(rows.tolist())) == 3


def test_of_two_copies_the_smaller_row_comes_first() -> None:
    candidates = clustered(40)
    assert candidates.features is not None
    first = int(ot(candidates, 1, NONE)[0])
    twice = np.vstack([candidates.features[first], candidates.features])
    assert candidates.confusion is not None
    confusion = np.append(candidates.confusion[first], candidates.confusion)
    # A copy moves the mean a little, hence the comparison with the copy at the other end.
    turned = ot(placed(twice[::-1].copy(), confusion[::-1].copy()), 1, NONE)[0]
    rows = ot(placed(twice, confusion), 1, NONE)
    np.testing.assert_array_equal(twice[rows[0]], twice[::-1][turned])
    assert rows[0] == 0 or not np.array_equal(twice[rows[0]], twice[0])


def test_the_order_of_the_input_and_the_number_of_threads_change_nothing() -> None:
    candidates = clustered(200, seed=3)
    assert candidates.features is not None
    assert candidates.confusion is not None
    with threadpool_limits(1):
        chosen = ot(candidates, 6, NONE)
    with threadpool_limits(2):
        assert ot(candidates, 6, NONE).tolist() == chosen.tolist()
    turn = np.random.default_rng(0).permutation(200)
    shuffled = placed(candidates.features[turn], candidates.confusion[turn])
    judge, turned = objective(candidates, Weights()), objective(shuffled, Weights())
    assert turned.value(np.argsort(turn)[chosen]) == pytest.approx(judge.value(chosen), rel=1e-9)
    back = np.argsort(np.array(candidates.keys)[turn])
    again = placed(candidates.features[turn][back], candidates.confusion[turn][back])
    assert ot(again, 6, NONE).tolist() == chosen.tolist()


def test_a_large_class_is_shipped_to_images_that_the_seed_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = clustered(90, seed=4)
    whole = objective(candidates, Weights())
    exact = ot(candidates, 5, NONE)
    monkeypatch.setattr(module, "TARGETS", 45)
    rows = ot(candidates, 5, NONE)
    assert rows.tolist() == ot(candidates, 5, NONE).tolist()
    assert whole.value(rows) < 1.2 * whole.value(exact)


def test_features_that_epsilon_does_not_suit_are_an_error() -> None:
    candidates = clustered(20)
    with pytest.raises(D2CError, match="too far apart") as caught:
        ot(candidates, 3, NONE, weights=Weights(epsilon=1e-3))
    assert "raise epsilon" in str(caught.value.hint)


def test_wrong_input_is_an_error() -> None:
    with pytest.raises(UsageError, match="features"):
        ot(Candidates(["a"], np.zeros(1)), 1, NONE)
    with pytest.raises(UsageError, match="out of range"):
        Weights(capacity=0.9)
    with pytest.raises(D2CError, match="cross-entropies"):
        ot(placed(np.eye(4, dtype=np.float32), np.full(4, np.nan)), 2, NONE)


def test_the_scale_of_the_features_changes_no_selection() -> None:
    features = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    keys = [f"{row:02d}" for row in range(40)]
    picks = [
        METHODS["ot"].select(Candidates(keys, np.zeros(40), features * scale), 5, np.zeros(0, dtype=np.int64)).tolist()
        for scale in (np.float32(1), np.float32(2**-10), np.float32(2**10))
    ]
    assert picks[0] == picks[1] == picks[2]


def test_an_outlier_does_not_keep_the_command_from_choosing() -> None:
    candidates = clustered(60)
    features = np.array(candidates.features)
    features[7] += 60 * features.std()
    rows = METHODS["ot"].select(replace(candidates, features=features), 5, NONE)
    assert len(set(rows.tolist())) == 5
