"""Selectors by rank: the paper's interval, its control, the ends and the middle, and the pool of easy images."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2c.errors import UsageError
from d2c.selectors import Candidates, Selector, ranks

NONE = np.zeros(0, dtype=np.int64)
RANDOM_OF_EIGHT = [0, 2, 7, 3, 5, 1, 6, 4]


def scored(scores: npt.ArrayLike, seed: int = 0) -> Candidates:
    values = np.asarray(scores, dtype=np.float64)
    return Candidates([f"{i:05d}" for i in range(len(values))], values, seed=seed)


def shuffled(size: int) -> Candidates:
    """Row i has the rank that `rank` gives it."""
    return scored(np.random.default_rng(size).permutation(size) / 7)


def rank(candidates: Candidates) -> npt.NDArray[np.int64]:
    return np.argsort(np.argsort(candidates.scores, kind="stable"), kind="stable")


@pytest.mark.parametrize(("budget", "k", "last"), [(10, 96, 864), (50, 16, 784), (100, 10, 990)])
def test_interval_takes_every_kth_rank_as_in_the_papers_three_settings(budget: int, k: int, last: int) -> None:
    candidates = shuffled(1300)
    rows = ranks.interval(candidates, budget, NONE, k=k)
    assert rank(candidates)[rows].tolist() == list(range(0, last + 1, k))


@pytest.mark.parametrize(
    ("size", "budget", "k"), [(1300, 10, 96), (1300, 50, 19), (5000, 10, 370), (5000, 50, 74), (5000, 100, 37)]
)
def test_interval_without_k_spans_three_quarters_of_a_class(size: int, budget: int, k: int) -> None:
    candidates = shuffled(size)
    rows = ranks.interval(candidates, budget, NONE)
    assert rank(candidates)[rows].tolist() == [i * k for i in range(budget)]


@given(size=st.integers(2, 400), share=st.floats(0.1, 1))
def test_small_steps_keep_their_fraction_and_so_the_span(size: int, share: float) -> None:
    budget = max(2, math.ceil(share * size))
    found = ranks.interval_ranks(size, budget, None)
    step = max(1.0, 0.74 * size / budget)
    assert found.tolist() == [int(i * step) for i in range(budget)]
    assert found[-1] == pytest.approx(max(0.74 * size, budget) - step, abs=1)


def test_interval_of_a_large_part_of_a_class_is_not_the_easiest() -> None:
    candidates = shuffled(60)
    rows = ranks.interval(candidates, 25, NONE)
    assert rank(candidates)[rows].tolist()[:5] == [0, 1, 3, 5, 7]
    assert rank(candidates)[rows].max() == 42
    # More than it spans: no room for steps.
    assert rank(candidates)[ranks.interval(candidates, 50, NONE)].tolist() == list(range(50))


def test_interval_shrinks_k_for_imagenets_smallest_class_and_keeps_the_budget() -> None:
    candidates = shuffled(732)  # 10 picks at k = 96 would need rank 864
    rows = ranks.interval(candidates, 10, NONE, k=96)
    assert rank(candidates)[rows].tolist() == [0, 81, 162, 243, 324, 405, 486, 567, 648, 729]


def test_interval_refuses_nested_budgets() -> None:
    with pytest.raises(UsageError, match="several budgets"):
        ranks.interval(shuffled(20), 5, np.array([3]))


def test_the_ends_and_the_middle() -> None:
    candidates = scored([5.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    assert ranks.easiest(candidates, 3, NONE).tolist() == [5, 1, 3]
    assert ranks.hardest(candidates, 3, NONE).tolist() == [0, 2, 4]
    assert ranks.medium(candidates, 4, NONE).tolist() == [3, 4, 1, 2]
    assert ranks.medium(scored([2.0, 0.0, 1.0]), 3, NONE).tolist() == [2, 1, 0]


@pytest.mark.parametrize("selector", [ranks.interval, ranks.easiest, ranks.hardest])
def test_equal_scores_are_ordered_by_key(selector: Selector) -> None:
    assert selector(scored([1.0] * 300), 300, NONE).tolist() == list(range(300))
    halves = selector(scored([2.0, 1.0] * 150), 300, NONE)
    assert sorted([halves[:150].tolist(), halves[150:].tolist()]) == [[*range(0, 300, 2)], [*range(1, 300, 2)]]


def test_random_orders_by_a_hash_of_seed_and_key_alone() -> None:
    # Written down once: a selection of last year must come out the same.
    candidates = scored(np.zeros(8), seed=3)
    assert ranks.random(candidates, 8, NONE).tolist() == RANDOM_OF_EIGHT
    assert ranks.random(scored(np.arange(8.0), seed=3), 8, NONE).tolist() == RANDOM_OF_EIGHT
    assert ranks.random(scored(np.zeros(8), seed=4), 8, NONE).tolist() != RANDOM_OF_EIGHT


@given(size=st.integers(1, 60), budget=st.integers(1, 70), share=st.floats(0.01, 1))
def test_a_pool_holds_the_easiest_share_and_never_fewer_than_the_budget(size: int, budget: int, share: float) -> None:
    candidates = shuffled(size)
    pool = ranks.easy_pool(candidates, budget, share)
    assert pool.sum() == min(size, max(budget, round(share * size)))
    assert sorted(rank(candidates)[pool]) == list(range(pool.sum()))


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match="share"):
        ranks.random_window(shuffled(10), 2, NONE, share=share)


def test_random_window_draws_evenly_from_the_easiest_share_only() -> None:
    candidates = shuffled(1000)
    rows = ranks.random_window(candidates, 370, NONE)
    picked = rank(candidates)[rows]
    assert picked.max() < 740
    # Mean of 370 of 0..739 without replacement: sd is 214 / sqrt(370) * sqrt(0.5) = 7.9 about 369.5.
    assert abs(picked.mean() - 369.5) < 30


def test_a_pool_restricts_any_selector_and_gives_it_everything_of_its_images() -> None:
    rng = np.random.default_rng(0)
    candidates = Candidates(
        [f"{i:02d}" for i in range(20)], rng.random(20), rng.random((20, 3), dtype=np.float32), rng.random(20), seed=9
    )
    easy = np.sort(np.argsort(candidates.scores)[:10])

    def last(given: Candidates, budget: int, taken: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        assert given.keys == [candidates.keys[row] for row in easy]
        assert given.features is not None
        assert given.confusion is not None
        assert candidates.features is not None
        assert candidates.confusion is not None
        np.testing.assert_array_equal(given.features, candidates.features[easy])
        np.testing.assert_array_equal(given.confusion, candidates.confusion[easy])
        assert given.seed == 9
        return np.concatenate([taken, np.setdiff1d(np.arange(10), taken)[::-1]])[:budget]

    assert ranks.within(candidates, 3, NONE, selector=last, share=0.5).tolist() == easy[[9, 8, 7]].tolist()
    assert ranks.within(candidates, 3, easy[[4, 1]], selector=last, share=0.5).tolist() == easy[[4, 1, 9]].tolist()


def test_what_was_taken_stays_though_it_is_out_of_the_pool() -> None:
    candidates = scored(np.arange(10.0))
    medium = partial(ranks.within, selector=ranks.medium, share=0.4)
    assert medium(candidates, 3, np.array([8])).tolist() == [8, 2, 1]


def test_interval_of_all_imagenet_takes_seconds() -> None:
    import time

    sizes = np.full(1000, 1281)
    keys = [f"{i:04d}" for i in range(1281)]
    scores = np.random.default_rng(0).random((len(sizes), 1281))
    start = time.process_time()
    for row in scores:
        ranks.interval(Candidates(keys, row), 10, NONE)
    assert time.process_time() - start < 1.5
