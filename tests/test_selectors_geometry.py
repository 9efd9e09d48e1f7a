"""k-center and facility location: against brute force on tiny sets, and what a cover must do."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from d2c.selectors import Candidates, Selector, geometry

NONE = np.zeros(0, dtype=np.int64)
Points = npt.NDArray[np.float32]


def placed(features: npt.ArrayLike) -> Candidates:
    points = np.asarray(features, dtype=np.float32)
    return Candidates([f"{i:05d}" for i in range(len(points))], np.zeros(len(points)), points)


def squared(points: Points) -> npt.NDArray[np.float64]:
    wide = points.astype(np.float64)
    return np.asarray(((wide[:, None] - wide[None]) ** 2).sum(axis=2))


def points(largest: int = 9) -> st.SearchStrategy[Points]:
    """Whole numbers: many ties, many copies."""
    shapes = st.tuples(st.integers(2, largest), st.integers(1, 3))
    return arrays(np.float32, shapes, elements=st.integers(-4, 4).map(float))


@given(points(), st.integers(1, 4))
def test_k_center_is_within_twice_the_best_radius(features: Points, budget: int) -> None:
    distances = np.sqrt(squared(features))
    rows = geometry.k_center(placed(features), budget, NONE)
    radius = distances[rows].min(axis=0).max()
    least = min(
        distances[list(some)].min(axis=0).max() for some in combinations(range(len(features)), min(budget, len(rows)))
    )
    assert radius <= 2 * least + 1e-9


@given(points(12), st.integers(2, 6))
def test_k_center_starts_at_the_mean_and_goes_on_to_the_farthest(features: Points, budget: int) -> None:
    rows = geometry.k_center(placed(features), budget, NONE).tolist()
    away = ((features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)) ** 2).sum(axis=1)
    assert away[rows[0]] <= away.min() + 1e-9
    for count in range(1, len(rows)):
        nearest = squared(features)[rows[:count]].min(axis=0)
        nearest[rows[:count]] = -1
        assert rows[count] == int(np.argmax(nearest))


@given(points(10), st.integers(1, 5), st.integers(0, 2))
@settings(deadline=None)
def test_facility_location_adds_the_image_that_lowers_the_mean_distance_most(
    features: Points, budget: int, before: int
) -> None:
    taken = np.arange(len(features))[::-1][: min(before, budget)].astype(np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "_BATCH", 2)  # or all of a tiny set is evaluated at once
        rows = geometry.facility_location(placed(features), budget, taken).tolist()
    assert rows[: len(taken)] == taken.tolist()
    distances = np.sqrt(squared(features))
    for count in range(len(taken), len(rows)):
        sums = [distances[[*rows[:count], row]].min(axis=0).sum() for row in range(len(features))]
        free = [row for row in range(len(features)) if row not in rows[:count]]
        assert sums[rows[count]] <= min(sums[row] for row in free) + 1e-4


def test_of_equally_good_images_the_one_with_the_smaller_key_is_chosen() -> None:
    square = placed([[1, 1], [-1, 1], [1, -1], [-1, -1], [0, 0]])
    assert geometry.k_center(square, 5, NONE).tolist() == [4, 0, 1, 2, 3]
    assert geometry.facility_location(square, 5, NONE).tolist() == [4, 0, 1, 2, 3]


@pytest.mark.parametrize("selector", [geometry.k_center, geometry.facility_location])
def test_of_copies_the_first_is_chosen_and_no_second_before_all_else(selector: Selector) -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        width, copies = int(rng.integers(3, 900)), int(rng.integers(3, 8))
        different = rng.normal(size=(12, width)).astype(np.float32)
        rows = selector(placed(np.repeat(different, copies, axis=0)), 14, NONE)
        assert sorted(rows[:12].tolist()) == list(range(0, 12 * copies, copies))
        assert rows[12:].tolist() == [1, 2]


def test_facility_location_finds_every_cluster_and_k_center_the_outliers() -> None:
    rng = np.random.default_rng(1)
    centres = np.array([[0, 0], [10, 0], [0, 10], [10, 10]])
    clusters = np.repeat(centres, 50, axis=0) + rng.normal(scale=0.3, size=(200, 2))
    outliers = np.array([[5, 30], [30, 5]])
    candidates = placed(np.concatenate([clusters, outliers]))
    assert {200, 201} <= set(geometry.k_center(candidates, 4, NONE).tolist())
    rows = geometry.facility_location(candidates, 6, NONE)
    assert set(rows[rows < 200] // 50) == {0, 1, 2, 3}


def test_a_large_class_needs_no_table_of_all_distances_and_any_of_it_can_be_picked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import tracemalloc

    monkeypatch.setattr(geometry, "ANCHORS", 300)
    features = np.random.default_rng(0).normal(size=(7000, 8)).astype(np.float32)
    tracemalloc.start()
    rows = geometry.facility_location(placed(features), 20, NONE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(rows.tolist())) == 20
    assert peak < 20e6  # all distances would be 196e6

    def mean_distance(some: npt.NDArray[np.int64]) -> float:
        return float(np.linalg.norm(features[:, None] - features[some], axis=2).min(axis=1).mean())

    draws = np.random.default_rng(1)
    assert mean_distance(rows) < min(mean_distance(draws.choice(7000, 20, replace=False)) for _ in range(10))
    assert len(set(rows.tolist()) - set(np.linspace(0, 6999, 300).astype(int).tolist())) > 10
