"""Who is near whom: precision, recall, density, coverage and nearest images, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from features_fixture import features
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from d2c import neighbours
from d2c.errors import D2CError
from d2c.neighbours import manifold, nearest, nearest_either, squared_radii


def brute(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
    def radii(x: np.ndarray, k: int) -> np.ndarray:
        return np.sort(cdist(x, x), axis=1)[:, k]

    across = cdist(fake, real)
    in_real, in_fake, balls = across <= radii(real, 3), radii(fake, 3) >= across.T, across <= radii(real, k)
    return in_real.any(1).mean(), in_fake.any(1).mean(), balls.sum() / (k * len(fake)), balls.any(0).mean()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_TILE", 37)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(8, 120), m=st.integers(8, 120), k=st.integers(1, 6), shift=st.floats(0, 2), seed=st.integers(0, 99)
)
def test_manifold_metrics_equal_brute_force(n: int, m: int, k: int, shift: float, seed: int) -> None:
    real, fake = features(seed, n, d=5), features(seed + 1000, m, d=5, mean=shift)
    found = manifold(real, fake, k=k)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(brute(real, fake, k))


def test_manifold_metrics_do_not_depend_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = features(0, 150), features(1, 130, mean=0.3)
    whole = manifold(real, fake)
    for tile in (2, 37):
        monkeypatch.setattr(neighbours, "_TILE", tile)
        tiled = manifold(real, fake)
        for name in ("inside", "recalled", "balls", "covered"):
            np.testing.assert_array_equal(getattr(tiled, name), getattr(whole, name))


def test_precision_and_recall_of_a_collapsed_generator_and_of_a_copy() -> None:
    real = features(0, 300)
    centre = real[np.argmin(np.linalg.norm(real - real.mean(0), axis=1))]
    collapsed = manifold(real, np.tile(centre, (200, 1)) + 1e-6 * features(1, 200))
    assert collapsed.precision == 1
    assert collapsed.recall < 0.01
    assert collapsed.coverage < 0.35  # the balls around one point
    copy = manifold(real, real)
    assert (copy.precision, copy.recall, copy.coverage) == (1, 1, 1)


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


def test_radii_equal_brute_force_in_any_tiling(small_tiles: None) -> None:
    x = features(0, 130).astype(np.float32)
    peer = np.sort(cdist(x.astype(float), x.astype(float)), axis=1)[:, [3, 5]] ** 2
    np.testing.assert_allclose(squared_radii(x, (3, 5)), peer, rtol=1e-9)


def test_precision_and_recall_are_torch_fidelitys() -> None:
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    real, fake = features(0, 300), features(1, 250, mean=0.3)
    peer = calculate_precision_recall_part(torch.from_numpy(fake), torch.from_numpy(real))
    found = manifold(real, fake)
    assert (found.precision, found.recall) == pytest.approx(peer)


def test_the_nearest_but_itself(small_tiles: None) -> None:
    x = features(0, 90)
    distance, index = nearest(x, x, but_itself=True)
    apart = cdist(x, x)
    np.fill_diagonal(apart, np.inf)
    np.testing.assert_array_equal(index, apart.argmin(1))
    np.testing.assert_allclose(distance, apart.min(1), rtol=1e-9)


def test_too_few_rows_and_other_widths_are_refused() -> None:
    with pytest.raises(D2CError, match="n >= 6"):
        manifold(features(0, 5), features(1, 10))
    with pytest.raises(D2CError, match="n >= 4"):
        manifold(features(0, 10), features(1, 3))
    with pytest.raises(D2CError, match="different feature spaces"):
        nearest(features(0, 9, d=3), features(0, 9, d=4))


def test_copies_lie_on_the_edges_that_they_make_to_the_last_bit() -> None:
    """Every real image is generated too: the third nearest lies exactly on the ball, at distance 1,000 from 0."""
    real = features(0, 120) + 1000
    found = manifold(real.astype(np.float32), real[::-1].astype(np.float32))
    x = real.astype(np.float32).astype(float)
    apart = cdist(x, x)
    radii = np.sort(apart, axis=1)[:, 5]
    assert found.balls[::-1].tolist() == (apart <= radii * (1 + 1e-9)).sum(axis=1).tolist()
