"""A classifier of one's own, to measure with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from d2c.classifier import Classifier, train_classifier
from d2c.errors import D2CError
from d2c.features import distance_name
from formats.errors import IntegrityError
from formats.files import read_json

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    pixels = (data.images * (255 / 16)).round().astype(np.uint8)[..., None].repeat(3, axis=-1)
    return pixels, data.target


@pytest.fixture(scope="module")
def classifier(digits: tuple[np.ndarray, np.ndarray]) -> Classifier:
    return train_classifier(*digits, device=CPU, seed=1)


def test_classifier_learns_the_digits(classifier: Classifier, digits: tuple[np.ndarray, np.ndarray]) -> None:
    pixels, labels = digits
    assert classifier.info.accuracy > 0.95
    assert np.mean(classifier.predict(pixels) == labels) > 0.97
    space = classifier(pixels[:300])
    assert space.shape == (300, classifier.dim)
    assert space.dtype == np.float64
    np.testing.assert_allclose(space[:7], classifier(pixels[:7]), rtol=1e-4, atol=1e-5)
    assert distance_name(classifier) == "FD (classifier)"


def test_classifier_saves_and_loads_bit_for_bit(
    classifier: Classifier, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    classifier.save(tmp_path)
    again = Classifier.load(tmp_path, CPU)
    assert again.digest == classifier.digest
    assert again.info == classifier.info
    np.testing.assert_array_equal(again(digits[0][:50]), classifier(digits[0][:50]))
    again.save(tmp_path / "copy")
    for name in ("classifier.safetensors", "classifier.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "copy" / name).read_bytes()


def test_changed_weights_are_refused(classifier: Classifier, tmp_path: Path) -> None:
    classifier.save(tmp_path)
    path = tmp_path / "classifier.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=read_json(tmp_path / "classifier.json")["digest"]):
        Classifier.load(tmp_path, CPU)
    with pytest.raises(D2CError, match="no classifier here"):
        Classifier.load(tmp_path / "nowhere", CPU)


def test_same_seed_same_bytes_whatever_the_global_generator(digits: tuple[np.ndarray, np.ndarray]) -> None:
    pixels, labels = digits[0][:200], digits[1][:200]
    digests = []
    for seed in (0, 0, 1):
        torch.rand(3)
        digests.append(train_classifier(pixels, labels, device=CPU, seed=seed, steps=8).digest)
    assert digests[0] == digests[1] != digests[2]


def test_training_leaves_the_global_generator_alone(digits: tuple[np.ndarray, np.ndarray]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train_classifier(digits[0][:100], digits[1][:100], device=CPU, steps=2)
    assert torch.rand(1) == expected


def test_large_images_are_seen_at_64_pixels(digits: tuple[np.ndarray, np.ndarray]) -> None:
    small, labels = digits[0][:40], digits[1][:40] + 100
    large = small.repeat(16, axis=1).repeat(16, axis=2)  # 128 px
    trained = train_classifier(large, labels, device=CPU, steps=2, batch=8)
    assert trained.info.side == 64
    np.testing.assert_array_equal(trained(large), trained(large[:, ::2, ::2]))
    assert set(trained.predict(large)) <= set(range(100, 110))


@pytest.mark.parametrize(("count", "classes"), [(100, 1), (19, 10)])
def test_too_little_to_train_on_names_the_alternative(
    count: int, classes: int, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    with pytest.raises(D2CError, match="--inception FILE"):
        train_classifier(digits[0][:count], np.arange(count) % classes, device=CPU)


def test_wrong_pixels_are_refused(classifier: Classifier) -> None:
    with pytest.raises(D2CError, match="RGB"):
        classifier(np.zeros((2, 8, 8, 3), np.float32))
    with pytest.raises(D2CError, match="RGB"):
        classifier(np.zeros((2, 3, 8, 8), np.uint8))
