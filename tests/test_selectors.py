"""What every selector promises, whatever it optimises."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from d2c.errors import D2CError, UsageError
from d2c.selectors import Candidates, Selector, geometry, matching, ranks
from d2c.selectors.base import best

NONE = np.zeros(0, dtype=np.int64)
BY_FEATURES: dict[str, Selector] = {
    "k-center": geometry.k_center,
    "facility-location": geometry.facility_location,
    "herding": matching.herding,
    "moments": matching.moments,
    "kernel": matching.kernel,
    "match": matching.match,
    "match-easy": partial(ranks.within, selector=matching.match, share=0.5),
}
NESTED: dict[str, Selector] = {
    "random": ranks.random,
    "random-window": ranks.random_window,
    "min": ranks.easiest,
    "max": ranks.hardest,
    "medium": ranks.medium,
    **BY_FEATURES,
}
ALL: dict[str, Selector] = {"interval": ranks.interval, **NESTED}
every = pytest.mark.parametrize("name", ALL)
every_nested = pytest.mark.parametrize("name", NESTED)
every_by_features = pytest.mark.parametrize("name", BY_FEATURES)


@st.composite
def classes(draw: st.DrawFn) -> Candidates:
    """Small classes with ties, copies and constant features."""
    size = draw(st.integers(1, 14))
    scores = draw(arrays(np.float64, size, elements=st.integers(0, 5).map(lambda i: i / 3)))
    shape = (size, draw(st.integers(1, 20)))
    features = draw(
        arrays(np.float32, shape, elements=st.integers(-2, 2).map(lambda i: i / 4 + 0.1), fill=st.just(0.1))
    )
    return Candidates([f"{i:03d}" for i in range(size)], scores, features, seed=draw(st.integers(0, 3)))


def drawn(size: int, width: int = 12, seed: int = 0) -> Candidates:
    rng = np.random.default_rng(seed)
    features = rng.gamma(1.0, 1.0, (size, width)).astype(np.float32)
    return Candidates([f"{i:04d}" for i in range(size)], rng.random(size), features)


@every
@given(candidates=classes(), budget=st.integers(1, 16))
@settings(deadline=None, max_examples=50)
def test_exactly_the_budget_or_all_there_are_and_none_twice(name: str, candidates: Candidates, budget: int) -> None:
    rows = ALL[name](candidates, budget, NONE)
    assert rows.dtype == np.int64
    assert len(rows) == min(budget, len(candidates))
    assert len(set(rows.tolist())) == len(rows)
    assert rows.min() >= 0
    assert rows.max() < len(candidates)


@every_nested
@given(candidates=classes(), data=st.data())
@settings(deadline=None, max_examples=50)
def test_what_a_smaller_budget_chose_comes_first(name: str, candidates: Candidates, data: st.DataObject) -> None:
    small = data.draw(st.integers(1, len(candidates)))
    large = data.draw(st.integers(small, len(candidates) + 1))
    taken = NESTED[name](candidates, small, NONE)
    rows = NESTED[name](candidates, large, taken)
    assert rows[:small].tolist() == taken.tolist()
    assert len(set(rows.tolist())) == len(rows) == min(large, len(candidates))


@every
def test_the_order_of_the_users_rows_changes_nothing(name: str) -> None:
    given = drawn(90)
    assert given.features is not None
    order = np.random.default_rng(1).permutation(90)
    # The user's table in another order, then sorted by key as candidates are.
    back = np.argsort([given.keys[row] for row in order])
    same = Candidates(
        [given.keys[order[i]] for i in back], given.scores[order][back], np.asfortranarray(given.features[order][back])
    )
    assert ALL[name](same, 11, NONE).tolist() == ALL[name](given, 11, NONE).tolist()


@every_by_features
def test_images_that_features_and_scores_do_not_tell_apart_are_taken_by_key(name: str) -> None:
    alike = replace(drawn(30), scores=np.ones(30), features=np.full((30, 7), 0.3, np.float32))
    assert BY_FEATURES[name](alike, 5, NONE).tolist() == [0, 1, 2, 3, 4]


@every_by_features
@pytest.mark.parametrize("width", [5, 300])
def test_of_copies_the_one_with_the_smallest_key_is_taken(name: str, width: int) -> None:
    different = drawn(40, width)
    assert different.features is not None
    copies = Candidates(
        [f"{i:04d}" for i in range(120)], np.repeat(different.scores, 3), np.repeat(different.features, 3, axis=0)
    )
    rows = BY_FEATURES[name](copies, 6, NONE)
    for row in rows:
        assert set(range(row - row % 3, row)) <= set(rows.tolist())


@every_by_features
def test_an_offset_of_all_features_changes_no_pick(name: str) -> None:
    given = drawn(60)
    assert given.features is not None
    coarse = np.round(given.features * 64) / 64  # so that the sum with 32 is exact
    plain, moved = replace(given, features=coarse), replace(given, features=coarse + 32)
    assert BY_FEATURES[name](moved, 9, NONE).tolist() == BY_FEATURES[name](plain, 9, NONE).tolist()


@every_by_features
def test_a_method_that_needs_features_says_so(name: str) -> None:
    given = drawn(8)
    with pytest.raises(UsageError, match="needs features"):
        BY_FEATURES[name](replace(given, features=None), 2, NONE)
    broken = np.ones((8, 3), np.float32)
    broken[5, 1] = np.nan
    with pytest.raises(D2CError, match=r"NaN or infinity[\s\S]*0005"):
        BY_FEATURES[name](replace(given, scores=np.arange(8.0)[::-1].copy(), features=broken), 2, NONE)


@every_by_features
def test_the_number_of_threads_changes_no_pick(name: str) -> None:
    from threadpoolctl import threadpool_limits

    given, found = drawn(400, 500), []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(BY_FEATURES[name](given, 20, NONE).tolist())
    assert found[0] == found[1]


def test_values_that_differ_by_rounding_count_as_equal() -> None:
    values: npt.NDArray[np.float64] = np.array([5.0, 1 + 2e-16, 1.0, 1.0])
    assert best(values, np.array([True, True, True, True])) == 1
    assert best(values, np.array([True, False, False, True])) == 3
    assert best(np.array([np.inf, 2.0, -1e-3, 3.0]), np.array([False, True, True, True])) == 2
