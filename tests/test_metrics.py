"""Distances between feature sets, against closed forms, brute force and torch-fidelity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from d2c import metrics
from d2c.errors import D2CError
from d2c.metrics import (
    Stats,
    class_frechet,
    copy_rate,
    density_coverage,
    frechet_distance,
    nearest,
    nearest_either,
    precision_recall,
    statistics,
)


def features(seed: int, n: int, d: int = 16, mean: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mix = np.random.default_rng(7).standard_normal((d, d)) / np.sqrt(d)
    return generator.standard_normal((n, d)) @ mix + mean


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


def brute(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
    def radii(x: np.ndarray) -> np.ndarray:
        return np.sort(cdist(x, x), axis=1)[:, k]

    across, real_radii, fake_radii = cdist(fake, real), radii(real), radii(fake)
    in_real, in_fake = across - real_radii <= 0, across.T - fake_radii <= 0
    return in_real.any(1).mean(), in_fake.any(1).mean(), in_real.sum() / (k * len(fake)), in_real.any(0).mean()


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(8, 120), m=st.integers(8, 120), k=st.integers(1, 6), shift=st.floats(0, 2), seed=st.integers(0, 99)
)
def test_manifold_metrics_equal_brute_force(n: int, m: int, k: int, shift: float, seed: int) -> None:
    real, fake = features(seed, n, d=5), features(seed + 1000, m, d=5, mean=shift)
    pr, dc = precision_recall(real, fake, k), density_coverage(real, fake, k)
    assert (pr.precision, pr.recall, dc.density, dc.coverage) == pytest.approx(brute(real, fake, k))


def test_manifold_metrics_do_not_depend_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = features(0, 150), features(1, 130, mean=0.3)
    whole = precision_recall(real, fake), density_coverage(real, fake)
    for tile in (2, 37):
        monkeypatch.setattr(metrics, "_TILE", tile)
        assert (precision_recall(real, fake), density_coverage(real, fake)) == whole


def test_precision_and_recall_of_a_collapsed_generator_and_of_a_copy() -> None:
    real = features(0, 300)
    centre = real[np.argmin(np.linalg.norm(real - real.mean(0), axis=1))]
    collapsed = precision_recall(real, np.tile(centre, (200, 1)) + 1e-6 * features(1, 200))
    assert collapsed.precision == 1
    assert collapsed.recall < 0.01
    assert density_coverage(real, np.tile(centre, (200, 1))).coverage < 0.35  # the balls around one point
    copy = precision_recall(real, real)
    assert (copy.precision, copy.recall) == (1, 1)
    assert density_coverage(real, real).coverage == 1


def test_nearest_is_exact_for_pixels_and_duplicates(small_tiles: None) -> None:
    generator = np.random.default_rng(0)
    references = generator.integers(0, 256, (90, 48), dtype=np.uint8)
    queries = np.concatenate([generator.integers(0, 256, (40, 48), dtype=np.uint8), references[[5, 88]]])
    distance, index = nearest(queries, references)
    peer = cdist(queries.astype(float), references.astype(float))
    np.testing.assert_allclose(distance, peer.min(1), rtol=1e-12)
    np.testing.assert_array_equal(index, peer.argmin(1))
    assert (distance[-2:] == 0).all()


def test_nearest_either_finds_the_mirrored_image() -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 6, 6), dtype=np.uint8)
    query = images[[3, 4]].copy()
    query[1] = query[1][:, ::-1]
    distance, index, flipped = nearest_either(
        query.reshape(2, -1), query[:, :, ::-1].reshape(2, -1), images.reshape(30, -1)
    )
    assert distance.tolist() == [0, 0]
    assert index.tolist() == [3, 4]
    assert flipped.tolist() == [False, True]


def test_copy_rate_flags_a_memoriser_and_not_a_good_generator() -> None:
    train, held_out, good = features(0, 400), features(1, 400), features(2, 500)
    picks = np.random.default_rng(3).integers(0, 400, 500)
    memoriser = train[picks] + 0.05 * features(4, 500)

    caught = copy_rate(memoriser, train, held_out)
    assert caught.rate > 0.95
    assert caught.flagged
    assert (caught.index == picks).mean() > 0.99
    assert caught.held_out_rate == pytest.approx(0.01, abs=0.003)
    closest = caught.closest(5)
    assert caught.distance[closest].tolist() == sorted(caught.distance)[:5]

    clean = copy_rate(good, train, held_out)
    assert clean.rate < 0.03
    assert not clean.flagged
    assert clean.threshold == caught.threshold


def test_copy_rate_sees_mirrored_copies_only_when_given_both_orientations() -> None:
    train, held_out = (features(seed, 300, d=36).reshape(-1, 6, 6) for seed in (0, 1))
    copies = train[:200, :, ::-1]
    flat = [x.reshape(len(x), -1) for x in (copies, train, held_out)]
    mirrored = {
        "flipped_generated": train[:200].reshape(200, -1),
        "flipped_held_out": held_out[:, :, ::-1].reshape(300, -1),
    }
    assert copy_rate(*flat).rate < 0.1
    both = copy_rate(*flat, **mirrored)
    assert both.rate == 1
    assert both.flipped.all()
    with pytest.raises(ValueError, match="both"):
        copy_rate(*flat, flipped_generated=mirrored["flipped_generated"])


def test_copies_are_caught_even_where_the_held_out_set_leaks_from_training() -> None:
    train, held_out = features(0, 300), features(1, 300)
    held_out[:30] = train[:30]
    caught = copy_rate(train[:100], train, held_out)
    assert caught.threshold == 0
    assert caught.rate == 1
    assert caught.held_out_rate == 0.1


@pytest.mark.parametrize(
    ("copies", "total", "flagged"),
    [
        (40, 500, True),
        (1, 20, False),  # five times the held-out rate, but one image proves nothing
        (80, 10_000, False),  # beyond chance, but not even twice the held-out rate
    ],
)
def test_flag_needs_both_size_and_evidence(copies: int, total: int, flagged: bool) -> None:
    train, held_out, mixed = features(0, 300), features(1, 10_000), features(2, total)
    mixed[:copies] = train[:copies]
    result = copy_rate(mixed, train, held_out)
    assert result.rate > 1.5 * result.held_out_rate
    assert result.flagged is flagged


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_names_the_row(value: float) -> None:
    x = features(0, 20)
    x[7, 3] = value
    with pytest.raises(D2CError, match="1 of 20 rows, first 7"):
        statistics(x)


def test_too_few_rows_and_other_widths_are_refused() -> None:
    with pytest.raises(D2CError, match="n >= 2"):
        statistics(features(0, 1))
    with pytest.raises(D2CError, match="n >= 4"):
        precision_recall(features(0, 3), features(1, 10))
    with pytest.raises(D2CError, match="different feature spaces"):
        frechet_distance(statistics(features(0, 9, d=3)), statistics(features(0, 9, d=4)))
    with pytest.raises(D2CError, match="different feature spaces"):
        nearest(features(0, 9, d=3), features(0, 9, d=4))
