"""The classifier whose confidence `ot` weighs: what scikit-learn's says, and judged by images that it has not seen."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from threadpoolctl import threadpool_limits

from d2c import discriminant
from d2c.discriminant import LARGEST, Discriminant, fit, judge
from d2c.errors import D2CError


def blobs(counts: list[int], dim: int = 12, apart: float = 1.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Classes of one covariance that is no multiple of 1, in columns of very different scale; not sorted by class."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    mix = rng.normal(size=(dim, dim))
    features = (rng.normal(size=(len(counts), dim)) * apart)[labels] @ mix + rng.normal(size=(len(labels), dim)) @ mix
    return (features * np.geomspace(0.01, 100, dim) + 3).astype(np.float32), labels


class Known:
    """A covariance estimator for scikit-learn that knows the answer."""

    def __init__(self, covariance: np.ndarray | None = None) -> None:
        self.covariance = covariance

    def fit(self, _: np.ndarray) -> None:
        self.covariance_ = self.covariance

    def get_params(self, deep: bool = False) -> dict[str, object]:
        return {"covariance": self.covariance}


@pytest.mark.parametrize("block", [7, 2048])
@pytest.mark.parametrize("counts", [[200, 300, 250], [9, 14, 8, 1]])
def test_it_is_scikit_learns_discriminant_analysis(
    counts: list[int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discriminant, "_BLOCK", block)
    features, labels = blobs(counts)
    x = features.astype(np.float64)
    found = fit(features, labels, np.arange(len(labels)))
    means = np.stack([x[labels == label].mean(axis=0) for label in range(len(counts))])
    inside = x - means[labels]
    scale = inside.std(axis=0)
    covariance, shrinkage = ledoit_wolf(inside / scale, assume_centered=True)
    assert found.shrinkage == pytest.approx(shrinkage, rel=1e-9)
    assert 0 < shrinkage < 1
    peer = LinearDiscriminantAnalysis(
        solver="lsqr",
        priors=np.full(len(counts), 1 / len(counts)),
        covariance_estimator=Known((covariance + 1e-6 * np.eye(len(scale))) * np.outer(scale, scale)),
    )
    peer.fit(x, labels)
    # scikit-learn adds the smallest normal number before its logarithm; none of these is that small.
    np.testing.assert_allclose(found.log_posteriors(x), peer.predict_log_proba(x), rtol=1e-6, atol=1e-8)


def test_wide_features_of_few_images_are_judged_as_well_as_by_scikit_learns_own_shrinkage() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 80)) * 0.35
    labels, truth = np.repeat(np.arange(5), 12), np.repeat(np.arange(5), 60)
    features, new = (centres[own] + rng.normal(size=(len(own), 80)) for own in (labels, truth))
    peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(features, labels)
    found = fit(features, labels, np.arange(60)).log_posteriors(new).argmax(axis=1)
    assert (found == truth).mean() > 0.9 * peer.score(new, truth) > 0.5


def test_an_image_is_judged_by_what_was_fitted_without_it() -> None:
    # Labels that have nothing to do with the features: whoever has seen them can learn them by heart.
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(300, 120)), rng.integers(0, 3, 300)
    seen = fit(features, labels, np.arange(300)).log_posteriors(features).argmax(axis=1)
    assert (seen == labels).mean() > 0.6
    found = judge(features, labels)
    assert found.accuracy == pytest.approx(1 / 3, abs=0.1)
    # Nor is it surer than it may be: guessing costs log 3.
    assert found.cross_entropies.mean() == pytest.approx(np.log(3), abs=0.05)


def test_confident_images_are_those_near_their_class() -> None:
    rng = np.random.default_rng(1)
    features = np.concatenate([rng.normal(-2, 1, size=(400, 1)), rng.normal(2, 1, size=(400, 1))])
    labels = np.repeat([4, 9], 400)  # Not every label has images.
    found = judge(features, labels)
    assert found.classes == 2
    # Two Gaussians 4 deviations apart: the error is that of 2 deviations, 2.3 %; log(1 + exp(-+4x)) is the entropy.
    assert found.accuracy == pytest.approx(0.977, abs=0.015)
    exact = np.log1p(np.exp(-4 * np.where(labels == 9, 1, -1) * features[:, 0]))
    np.testing.assert_allclose(found.cross_entropies, exact, atol=0.35, rtol=0.35)


def test_the_temperature_leaves_no_better_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Heavier tails than a Gaussian's make the posteriors too sure of themselves.
    rng = np.random.default_rng(2)
    labels = np.repeat(np.arange(3), 300)
    features = (rng.normal(size=(3, 20)) * 0.9)[labels] + rng.standard_t(2.5, size=(900, 20))
    found = judge(features, labels)
    assert found.temperature > 1.1
    mean = found.cross_entropies.mean()
    for other in (0.8 * found.temperature, 1.25 * found.temperature):
        monkeypatch.setattr(discriminant, "_temperature", lambda *_, t=other: t)
        assert judge(features, labels).cross_entropies.mean() > mean


def test_classes_of_one_image_and_long_tails() -> None:
    features, labels = blobs([200, 40, 5, 2, 1, 1])
    found = judge(features, labels)
    assert found.classes == 6
    assert found.accuracy is not None
    assert np.isfinite(found.cross_entropies).all()
    assert found.cross_entropies.min() >= 0
    assert found.cross_entropies.max() <= LARGEST
    # Fitted with them, it knows them.
    assert found.cross_entropies[labels >= 4].max() < found.cross_entropies.max()


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [2, 2, 2], [1, 2], [3, 1]])
def test_hardly_any_images(counts: list[int]) -> None:
    found = judge(*blobs(counts))
    assert np.isfinite(found.cross_entropies).all()
    assert (found.accuracy is None) == (max(counts) == 1)


def test_of_one_class_everybody_is_sure() -> None:
    found = judge(*blobs([30]))
    assert not found.cross_entropies.any()
    assert found.accuracy is None


def test_features_that_never_differ() -> None:
    features, labels = blobs([40, 50])
    features[:, 3], features[:, 4] = 0, 0.1
    features[:, 5] = labels  # Constant inside each class.
    found = judge(features, labels)
    assert found.accuracy == 1
    same = judge(np.ones((40, 6), np.float16), np.arange(40) % 2)
    np.testing.assert_allclose(same.cross_entropies, np.log(2), rtol=1e-9)


def test_a_fit_takes_as_many_of_each_class_as_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discriminant, "FITTED", 60)
    taken: list[np.ndarray] = []

    def noted(features: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Discriminant:
        taken.append(np.bincount(labels[rows]))
        return fit(features, labels, rows)

    monkeypatch.setattr(discriminant, "fit", noted)
    features, labels = blobs([400, 100, 10, 1])
    found = judge(features, labels)
    assert found.fitted == 60
    assert [one.tolist() for one in taken] == [[26, 25, 8, 1]] * 5
    assert found.accuracy is not None
    assert found.accuracy > 0.9


def test_neither_threads_nor_a_memory_map_change_a_bit(tmp_path: object) -> None:
    features, labels = blobs([500, 400, 300], dim=64)
    with threadpool_limits(1):
        one = judge(features, labels).cross_entropies
    with threadpool_limits(2):
        two = judge(features, labels).cross_entropies
    assert one.tobytes() == two.tobytes()
    np.save(f"{tmp_path}/features.npy", features)
    mapped = np.load(f"{tmp_path}/features.npy", mmap_mode="r")
    assert judge(mapped, labels).cross_entropies.tobytes() == one.tobytes()


def test_features_that_are_no_numbers_are_an_error() -> None:
    features, labels = blobs([20, 20])
    features[7, 2] = np.nan
    with pytest.raises(D2CError, match="NaN"):
        judge(features, labels)
