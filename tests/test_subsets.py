"""Subsets against all images: statistics in blocks, quotas of random ones, coverage by its definition, and charts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c import charts, metrics, subsets
from d2c.errors import D2CError
from d2c.subsets import Clusters, FullSet, beside, random_like


def blobs(count: int, dim: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    labels[: 2 * classes] = np.repeat(np.arange(classes), 2)
    features = rng.normal(size=(classes, dim))[labels] * 3 + rng.normal(size=(count, dim)) + 50
    return features.astype(np.float32), labels


@pytest.mark.parametrize("block", [7, 4096])
def test_statistics_read_in_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(subsets, "_BLOCK", block)
    features, labels = blobs(200, 6, 4)
    rows = random_like(labels, np.full(4, 5), 0)
    full = FullSet.of(features, labels, 4, len(rows))
    whole = metrics.statistics(features)
    np.testing.assert_allclose(full.stats.mu, whole.mu, rtol=1e-12)
    np.testing.assert_allclose(full.stats.sigma, whole.sigma, rtol=1e-9, atol=1e-9)
    found = full.measure(features[rows], labels[rows])
    expected = metrics.frechet_distance(metrics.statistics(features[rows]), whole)
    assert found.distance == pytest.approx(expected.value, rel=1e-8)
    by_class = metrics.class_frechet(features, labels, features[rows], labels[rows])
    assert by_class.covariance == "diagonal"
    np.testing.assert_allclose(found.by_class, [by_class.per_class[c] for c in range(4)], rtol=1e-9)
    assert found.class_distance == pytest.approx(by_class.value)
    assert found.worst == pytest.approx(max(by_class.per_class.values()))


def test_all_images_are_no_distance_from_all_images() -> None:
    features, labels = blobs(120, 5, 3)
    found = FullSet.of(features, labels, 3, len(features)).measure(features, labels)
    assert found.distance == pytest.approx(0, abs=1e-9)
    assert (found.recall, found.coverage) == (1.0, 1.0)
    assert found.worst == pytest.approx(0, abs=1e-9)


def test_coverage_is_the_share_of_images_with_a_pick_among_their_nearest() -> None:
    features, labels = blobs(90, 3, 3)
    rows = random_like(labels, np.full(3, 4), 1)
    full = FullSet.of(features, labels, 3, len(rows))
    apart = np.linalg.norm(features[:, None].astype(np.float64) - features, axis=2)
    near = np.argsort(apart, axis=1)[:, : full.nearest + 1]
    expected = np.isin(near, rows).any(axis=1).mean()
    assert full.nearest == 15
    assert full.measure(features[rows], labels[rows]).coverage == pytest.approx(expected)


def test_a_class_with_one_pick_has_no_distance_and_spoils_no_other() -> None:
    features, labels = blobs(60, 3, 3)
    rows = random_like(labels, np.array([1, 4, 0]), 0)
    found = FullSet.of(features, labels, 3, len(rows)).measure(features[rows], labels[rows])
    assert np.isnan(found.by_class).tolist() == [True, False, True]
    assert found.worst == pytest.approx(found.by_class[1])


@given(st.lists(st.integers(0, 12), min_size=3, max_size=3), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_random_subsets_have_the_quotas_of_the_selection(quotas: list[int], seed: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], 12))
    rows = random_like(labels, np.array(quotas), seed)
    assert np.bincount(labels[rows], minlength=3).tolist() == quotas
    assert len(np.unique(rows)) == len(rows)
    assert rows.tolist() == random_like(labels, np.array(quotas), seed).tolist()


def test_random_subsets_differ_by_seed_and_every_image_has_its_chance() -> None:
    labels = np.zeros(50, dtype=np.int64)
    seen = np.bincount(np.concatenate([random_like(labels, np.array([10]), seed) for seed in range(200)]), minlength=50)
    # 40 draws each on average, sd 5.7
    assert 18 < seen.min() <= seen.max() < 64


def test_clusters_without_a_pick_are_counted() -> None:
    features, labels = blobs(300, 4, 6)
    stats = metrics.statistics(features)
    clusters = Clusters(features, stats, 60)
    assert clusters.count == 30
    assert clusters.covered(features) == 1.0
    assert clusters.covered(features[labels == 0]) < 0.5


def test_z_is_in_standard_deviations_of_the_random_ones() -> None:
    assert beside(5.0, [1.0, 2.0, 3.0]) == {"value": 5.0, "random_mean": 2.0, "random_sd": 1.0, "z": 3.0}
    assert beside(2.0, [2.0, 2.0])["z"] is None
    assert beside(None, [1.0, 2.0])["z"] is None


def test_features_that_are_no_numbers_are_refused() -> None:
    features, labels = blobs(60, 3, 3)
    features[17, 1] = np.nan
    with pytest.raises(D2CError, match="NaN"):
        FullSet.of(features, labels, 3, 6)


def test_bars_have_short_ticks_and_a_height_for_nothing() -> None:
    assert [charts._round_up(value) for value in (0, 0.03, 7, 10, 100, 101)] == [1, 0.04, 8, 12, 120, 120]
    assert charts.bars(np.zeros(3), label="none", x_unit="x", y_unit="y").count("<rect") == 3


def test_a_histogram_counts_every_image_and_a_far_one_does_not_squeeze_the_others() -> None:
    values = np.append(np.linspace(0, 1, 4000), 1e6)
    svg = charts.histogram(values, values[:5], label="scores", unit="score")
    assert "1e+06" not in svg
    assert "all 4,001 images" in svg
    # Images that are all alike have a histogram too.
    assert "<polygon" in charts.histogram(np.ones(9), np.ones(3), label="scores", unit="score")
