"""Feature spaces: torch-fidelity's Inception with given weights, and vision encoders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from d2c import features, metrics
from d2c.encoders import EncoderInfo
from d2c.errors import D2CError
from d2c.features import Inception, VisionSpace, activations, distance_name, open_inception

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    pixels = (data.images * (255 / 16)).round().astype(np.uint8)[..., None].repeat(3, axis=-1)
    return pixels, data.target


def test_inception_gives_torch_fidelitys_features(inception_file: Path, digits: tuple[np.ndarray, np.ndarray]) -> None:
    from torch_fidelity.utils import create_feature_extractor

    network = create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, feature_extractor_weights_path=str(inception_file), verbose=False
    )
    peer = network(torch.from_numpy(digits[0][:5].transpose(0, 3, 1, 2).copy()))[0].numpy()

    ours = Inception(inception_file, CPU, batch=2)(digits[0][:5])

    assert ours.shape == (5, 2048)
    assert ours.dtype == np.float64
    assert np.ptp(ours, axis=0).max() > 1e-3  # the random network tells the images apart
    np.testing.assert_allclose(ours, peer, rtol=1e-4, atol=1e-5 * np.abs(peer).max())


@pytest.mark.slow
def test_distance_is_torch_fidelitys_own_number(inception_file: Path, digits: tuple[np.ndarray, np.ndarray]) -> None:
    import torch_fidelity

    class Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __init__(self, pixels: np.ndarray) -> None:
            self.images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> torch.Tensor:
            return self.images[index]

    real, fake = digits[0][:12], 255 - digits[0][20:32] // 2
    peer = torch_fidelity.calculate_metrics(
        input1=Images(fake),
        input2=Images(real),
        fid=True,
        cuda=False,
        batch_size=12,
        cache=False,
        verbose=False,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_file),
        save_cpu_ram=True,
    )["frechet_inception_distance"]
    space = Inception(inception_file, CPU)
    ours = metrics.frechet_distance(metrics.statistics(space(real)), metrics.statistics(space(fake)))
    assert ours.value == pytest.approx(peer, rel=1e-6)


def test_one_pass_gives_sfids_numbers_in_tensorflows_order_and_logits_without_bias(
    inception_file: Path, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    from torch_fidelity.utils import create_feature_extractor

    network = create_feature_extractor(
        "inception-v3-compat",
        ["logits_unbiased"],
        cuda=False,
        feature_extractor_weights_path=str(inception_file),
        verbose=False,
    )
    seen: dict[str, torch.Tensor] = {}
    network.Mixed_6d.register_forward_hook(lambda _, __, output: seen.update(block=output))
    logits = network(torch.from_numpy(digits[0][:3].transpose(0, 3, 1, 2).copy()))[0].numpy()

    found = activations(Inception(inception_file, CPU, batch=2), digits[0][:3])

    assert found.spatial is not None
    assert found.spatial.shape == (3, 17 * 17 * 7)
    channels_last = seen["block"][:, :7].permute(0, 2, 3, 1).numpy()
    assert channels_last.std(axis=(1, 2)).max() > 1e-3 * channels_last.max()  # places differ, and
    assert channels_last.std(axis=3).max() > 1e-3 * channels_last.max()  # channels
    peer = channels_last.reshape(3, -1)
    np.testing.assert_allclose(found.spatial, peer, rtol=1e-4, atol=1e-5 * np.abs(peer).max())
    assert found.logits is not None
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-4 * np.abs(logits).max())
    assert activations(Inception(inception_file, CPU), digits[0][:0]).features.shape == (0, 2048)


def test_a_vision_encoder_is_a_space_of_its_class_token_or_of_its_patches() -> None:
    class Encoder:
        def __init__(self, class_token: bool) -> None:
            self.info = EncoderInfo(
                name="timm:some",
                source="",
                revision="",
                weights_xxh3="f" * 32,
                dim=2,
                tokens=4,
                layer="",
                class_token=class_token,
            )

        def encode(self, pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
            count = 5 if self.info.class_token else 4
            return (pixels[:, 0, 0, :1, None] + np.arange(count)[:, None] * [1, 10]).astype(np.float16)

    images = np.zeros((70, 8, 8, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(70)
    with_token, without = VisionSpace(Encoder(True)), VisionSpace(Encoder(False))
    np.testing.assert_array_equal(with_token(images)[:, 1], np.arange(70))
    np.testing.assert_array_equal(without(images)[[0, 69]], [[1.5, 15], [70.5, 84]])
    assert distance_name(without) == "FD (timm:some)"


def test_only_the_published_weights_are_called_fid(inception_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = Inception(inception_file, CPU)
    assert space.name == f"inception-{space.digest[:8]}"
    assert distance_name(space) == f"FD ({space.name})"
    monkeypatch.setattr(features, "INCEPTION_SHA256", space.digest[:8])
    assert distance_name(Inception(inception_file, CPU)) == "FID"


def test_missing_inception_says_where_to_put_it_and_what_else_works(tmp_path: Path) -> None:
    with pytest.raises(D2CError) as caught:
        open_inception(tmp_path / "nowhere.pth", CPU)
    message = str(caught.value)
    assert str(tmp_path / "nowhere.pth") in message
    assert "6726825d" in message
    assert "--inception FILE" in message
    assert "classifier" in message


def test_default_place_is_torch_hubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(D2CError, match=r"checkpoints/weights-inception-2015-12-05-6726825d\.pth"):
        open_inception(None, CPU)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


@pytest.mark.parametrize("content", ["text", "other network", "code"])
def test_wrong_weights_file_is_refused_and_runs_no_code(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    if content == "text":
        path.write_text("<html>not found</html>")
    else:
        torch.save({"a": torch.zeros(3)} if content == "other network" else {"a": Malicious()}, path)
    with pytest.raises(D2CError, match="does not hold weights of the 2015 Inception network"):
        Inception(path, CPU)
    assert not Path("executed").exists()


def test_the_published_weights_are_downloaded_when_asked_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    from torch_fidelity import feature_extractor_inceptionv3 as library

    served = tmp_path / "served.pth"
    served.write_bytes(b"weights")
    monkeypatch.setattr(library, "URL_INCEPTION_V3", served.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(D2CError, match=r"could not be downloaded(.|\n)*invalid hash"):
        features.fetch_inception()
    assert not list((tmp_path / "hub").rglob("*.pth"))
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(b"weights").hexdigest()[:8])
    assert features.fetch_inception().read_bytes() == b"weights"
    served.unlink()
    assert features.fetch_inception().read_bytes() == b"weights"  # not asked for twice
    features.fetch_inception().unlink()
    with pytest.raises(D2CError, match=r"could not be downloaded(.|\n)*put it at"):
        features.fetch_inception()
