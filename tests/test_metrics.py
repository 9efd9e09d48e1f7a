"""Distances between feature sets, against closed forms, brute force and torch-fidelity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from features_fixture import features

from d2c import metrics
from d2c.errors import D2CError
from d2c.metrics import (
    InceptionScore,
    Moments,
    Stats,
    class_frechet,
    frechet_distance,
    kernel_distance,
    statistics,
)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_TILE", 37)


def test_statistics_are_numpys_own_in_any_tiling(small_tiles: None) -> None:
    x = features(0, 200).astype(np.float32)
    stats = statistics(x)
    np.testing.assert_allclose(stats.mu, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)
    assert stats.mu.dtype == stats.sigma.dtype == np.float64
    assert stats.n == 200


def test_statistics_in_chunks_do_not_depend_on_the_chunks(small_tiles: None) -> None:
    x = features(0, 200) + 1e3
    found = []
    for size in (1, 37, 64, 200):
        moments = Moments()
        for start in range(0, 200, size):
            moments.add(x[start : start + size])
        found.append(moments.stats())
    for one in found[1:]:
        np.testing.assert_array_equal(one.mu, found[0].mu)
        np.testing.assert_array_equal(one.sigma, found[0].sigma)
    np.testing.assert_allclose(found[0].sigma, np.cov(x, rowvar=False), rtol=1e-9)


@pytest.mark.parametrize("n", [12, 500])  # fewer images than features, and many
def test_distance_of_a_set_to_itself_is_zero(n: int) -> None:
    stats = statistics(features(1, n, d=40, mean=3.0))
    distance = frechet_distance(stats, stats)
    assert 0 <= distance.value < 1e-10
    assert distance.rank_deficient == (n <= 40)


def test_distance_of_known_gaussians() -> None:
    # Commuting covariances: |mu|^2 + sum (sqrt(a) - sqrt(b))^2 over the shared eigenvectors.
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))
    a, b = np.array([4.0, 1, 9, 0.25, 0]), np.array([1.0, 1, 4, 4, 1])
    x = Stats(np.zeros(5), turn @ np.diag(a) @ turn.T, 1000)
    y = Stats(np.full(5, 2.0), turn @ np.diag(b) @ turn.T, 1000)
    distance = frechet_distance(x, y)
    assert distance.mean_part == pytest.approx(20)
    assert distance.covariance_part == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum())
    assert distance.value == pytest.approx(frechet_distance(y, x).value)


def test_distance_equals_torch_fidelity() -> None:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    a, b = statistics(features(0, 900, d=64)), statistics(features(1, 700, d=64, mean=0.1) * 1.3)
    peer = fid_statistics_to_metric({"mu": a.mu, "sigma": a.sigma}, {"mu": b.mu, "sigma": b.sigma}, False)
    assert frechet_distance(a, b).value == pytest.approx(peer[KEY_METRIC_FID], rel=1e-9)


def test_class_frechet_sees_swapped_classes_that_the_whole_set_does_not() -> None:
    x = np.concatenate([features(0, 50), features(1, 50, mean=5.0)])
    labels = np.repeat([3, 8], 50)
    swapped = class_frechet(x, labels, x, labels[::-1])
    assert frechet_distance(statistics(x), statistics(x)).value < 1e-10
    assert swapped.value > 100
    assert class_frechet(x, labels, x, labels).value < 1e-10
    assert set(swapped.per_class) == {3, 8}


def test_class_frechet_uses_one_definition_and_names_it() -> None:
    x, labels = features(0, 60, d=4), np.repeat([0, 1, 2], 20)
    full = class_frechet(x, labels, x + 1, labels)
    assert full.covariance == "full"
    assert full.value == pytest.approx(4)
    keep = np.array([*range(40), 40, 41, 42])  # class 2 is left with three images
    small = class_frechet(x, labels, (x + 1)[keep], labels[keep])
    assert small.covariance == "diagonal"
    assert small.skipped == ()
    deviations = x[40:].std(0, ddof=1) - x[40:43].std(0, ddof=1)
    means = x[40:].mean(0) - x[40:43].mean(0) - 1
    assert small.per_class[2] == pytest.approx((deviations**2).sum() + (means**2).sum())
    one = class_frechet(x, labels, (x + 1)[:41], labels[:41])
    assert one.skipped == (2,)
    assert set(one.per_class) == {0, 1}


def test_class_frechet_without_common_images_says_so() -> None:
    x = features(0, 8)
    with pytest.raises(D2CError, match="no class has two images on both sides"):
        class_frechet(x, np.zeros(8), x, np.ones(8))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_names_the_row(value: float) -> None:
    x = features(0, 20)
    x[7, 3] = value
    with pytest.raises(D2CError, match="1 of 20 rows, first 7"):
        statistics(x)


def test_too_few_rows_and_other_widths_are_refused() -> None:
    with pytest.raises(D2CError, match="n >= 2"):
        statistics(features(0, 1))
    with pytest.raises(D2CError, match="different feature spaces"):
        frechet_distance(statistics(features(0, 9, d=3)), statistics(features(0, 9, d=4)))
    with pytest.raises(D2CError, match="different feature spaces"):
        kernel_distance(features(0, 9, d=3), features(0, 9, d=4))
    one = Moments()
    one.add(features(0, 1))
    with pytest.raises(D2CError, match="1 images"):
        one.stats()


def test_distance_to_a_gaussian_of_known_moments_is_the_closed_form() -> None:
    x = features(0, 400, d=6)
    mean, spread = x.mean(0), np.cov(x, rowvar=False)
    gaussian = Stats(mean + 2, 4 * spread, 0)
    # Covariances S and 4 S: tr(S + 4 S - 2 * 2 S) = tr S; means 2 apart in each of 6 directions.
    assert frechet_distance(statistics(x), gaussian).value == pytest.approx(24 + np.trace(spread))
    assert not gaussian.rank_deficient


def test_inception_score_is_what_a_hand_computes_without_shuffling() -> None:
    certain = np.array([[50.0, 0, 0], [0, 50, 0], [0, 0, 50], [0, 50, 0]])
    # Split 1: two classes seen equally often, each image certain: exp(ln 2). Split 2: the same. In another order, not.
    assert score_of(certain, 2) == pytest.approx(2)
    assert score_of(certain[[0, 2, 1, 3]], 2) == pytest.approx((2 + 1) / 2)
    # A last split of one image has score 1.
    assert score_of(certain[:3], 2) == pytest.approx((2 + 1) / 2)
    logits = np.random.default_rng(0).normal(size=(60, 7))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    by_hand = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in (p[:25], p[25:50], p[50:])]
    assert score_of(logits, 25, chunk=7) == pytest.approx(np.mean(by_hand), rel=1e-12)


def score_of(logits: np.ndarray, split: int, chunk: int = 1) -> float | None:
    score = InceptionScore(split)
    for start in range(0, len(logits), chunk):
        score.add(logits[start : start + chunk])
    return score.value()


def test_inception_score_equals_torch_fidelitys_without_its_shuffling() -> None:
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    logits = np.random.default_rng(1).normal(size=(100, 12)) * 3
    peer = isc_features_to_metric(torch.from_numpy(logits), splits=5, shuffle=False)[KEY_METRIC_ISC_MEAN]
    assert score_of(logits, 20, chunk=33) == pytest.approx(peer, rel=1e-12)


def test_kernel_distance_equals_torch_fidelity_in_any_tiling(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity.metric_kid import kernel_mmd

    a, b = features(0, 90, d=8), features(1, 90, d=8, mean=0.2)
    peer = kernel_mmd(a, b)
    assert kernel_distance(a, b) == pytest.approx(peer, rel=1e-9)
    monkeypatch.setattr(metrics, "_TILE", 37)
    assert kernel_distance(a, b) == pytest.approx(peer, rel=1e-9)
    assert abs(kernel_distance(a, features(2, 70, d=8))) < 0.3 * peer
