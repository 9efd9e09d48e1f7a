from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from d2c.encoders import weights_digest
from d2c.errors import D2CError
from d2c.latents import LatentSpec, open_codec, to_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import diffusers

    torch.manual_seed(0)
    untyped: Any = diffusers
    model = untyped.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.125,
    )
    folder = tmp_path_factory.mktemp("vae") / "tiny-vae"
    model.save_pretrained(folder)
    return folder


def pixels(count: int, size: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_rgb_round_trip_is_exact(count: int, size: int, seed: int) -> None:
    codec = open_codec("rgb", size, CPU)
    images = pixels(count, size, seed)
    raw = codec.encode(images)
    assert raw.shape == (count, 1, 3, size, size)
    assert raw.dtype == np.uint8
    latents = to_model(torch.from_numpy(raw), codec.spec)
    assert float(latents.abs().max()) <= 1
    np.testing.assert_array_equal(codec.decode(latents), images)


def test_rgb_reads_every_grey_level_and_rounds_to_nearest() -> None:
    codec = open_codec("rgb", 16, CPU)
    levels = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), 3, axis=3)
    latents = to_model(torch.from_numpy(codec.encode(levels)), codec.spec)
    np.testing.assert_array_equal(codec.decode(latents + 0.45 / 127.5), levels)
    assert codec.decode(latents * 9).max() == 255
    with pytest.raises(D2CError, match="NaN"):
        codec.decode(latents * float("nan"))


def test_vae_moments_and_images_are_diffusers_own(vae_folder: Path) -> None:
    import diffusers

    codec, images = open_codec(str(vae_folder), 16, CPU), pixels(2, 16)
    untyped: Any = diffusers
    reference = untyped.AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False).eval()
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        posterior = reference.encode(inputs).latent_dist
        raw = codec.encode(images)
        assert raw.shape == (2, 2, 4, 8, 8)
        assert raw.dtype == np.float16
        np.testing.assert_allclose(raw[:, 0], posterior.mean.numpy(), atol=1e-5, rtol=1e-3)
        np.testing.assert_allclose(raw[:, 1], posterior.std.numpy(), atol=1e-5, rtol=1e-3)
        latents = to_model(torch.from_numpy(raw), codec.spec)
        decoded = reference.decode(torch.from_numpy(raw[:, 0]).float()).sample
    expected = np.clip(np.rint((decoded.numpy().transpose(0, 2, 3, 1) + 1) * 127.5), 0, 255)
    assert np.abs(codec.decode(latents).astype(int) - expected).max() <= 1


def test_vae_latents_use_the_configs_scale_and_shift_and_the_given_noise(vae_folder: Path) -> None:
    codec = open_codec(str(vae_folder), 16, CPU)
    raw = torch.from_numpy(codec.encode(pixels(2, 16)))
    noise = torch.randn(2, 4, 8, 8)
    mean, std = raw[:, 0].float(), raw[:, 1].float()
    torch.testing.assert_close(to_model(raw, codec.spec), (mean - 0.125) * 0.5)
    torch.testing.assert_close(to_model(raw, codec.spec, noise), (mean + std * noise - 0.125) * 0.5)


def test_spec_survives_its_dict_and_names_no_folder(vae_folder: Path) -> None:
    spec = open_codec(str(vae_folder), 16, CPU).spec
    value = spec.to_dict()
    assert LatentSpec.from_dict({**value, "later": 1}) == spec
    assert value["encoder"] == "tiny-vae"
    assert (spec.size, spec.downsample, spec.pixels) == (8, 2, 16)
    del value["scale"]
    with pytest.raises(D2CError, match="scale"):
        LatentSpec.from_dict(value)


def test_weights_digest_sees_values_names_and_dtypes_and_not_order(vae_folder: Path) -> None:
    state = load_file(vae_folder / "diffusion_pytorch_model.safetensors")
    spec = open_codec(str(vae_folder), 16, CPU).spec
    assert spec.weights_xxh3 == weights_digest(dict(reversed(state.items())))
    name = next(iter(state))
    changed = state[name].clone()
    changed.view(-1)[0] += 1
    assert weights_digest({**state, name: changed}) != spec.weights_xxh3
    assert weights_digest({**state, name: state[name].half()}) != spec.weights_xxh3
    assert weights_digest({f"{k}.": v for k, v in state.items()}) != spec.weights_xxh3
    assert len(weights_digest({"scalar": torch.tensor(1.0), "b": torch.zeros(2, dtype=torch.bfloat16)})) == 32


def test_vae_comes_from_the_hubs_cache_with_its_revision(
    vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, commit = tmp_path / "models--stabilityai--sd-vae-ft-ema", "0123456789abcdef0123456789abcdef01234567"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    (repo / "snapshots" / commit).symlink_to(vae_folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    spec = open_codec("vae", 16, CPU).spec
    assert (spec.encoder, spec.revision) == ("stabilityai/sd-vae-ft-ema", commit)


@pytest.mark.parametrize("name", ["vae", "someone/some-vae"])
def test_unreachable_vae_names_both_ways_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(D2CError, match="neither in the local cache nor reachable") as caught:
        open_codec(name, 256, CPU)
    assert "--codec FOLDER" in str(caught.value)
    assert "--codec rgb --size 64" in str(caught.value)


def test_bad_folders_and_sizes_are_explained(vae_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(D2CError, match="no such file or folder"):
        open_codec(str(tmp_path / "absent"), 16, CPU)
    with pytest.raises(D2CError, match="no AutoencoderKL"):
        open_codec(str(tmp_path), 16, CPU)
    with pytest.raises(D2CError, match="does not divide"):
        open_codec(str(vae_folder), 15, CPU)
    with pytest.raises(D2CError, match="do not fit the codec"):
        open_codec("rgb", 8, CPU).encode(pixels(1, 9))

    state = load_file(vae_folder / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_bytes((vae_folder / "config.json").read_bytes())
    del state["quant_conv.weight"]
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(D2CError, match=r"incomplete[\s\S]*quant_conv"):
        open_codec(str(tmp_path), 16, CPU)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(D2CError, match="no AutoencoderKL"):
        open_codec(str(tmp_path), 16, CPU)


def test_vae_latents_too_large_for_float16_are_an_error(vae_folder: Path, tmp_path: Path) -> None:
    state = load_file(vae_folder / "diffusion_pytorch_model.safetensors")
    state["quant_conv.bias"] = state["quant_conv.bias"] + 1e6
    (tmp_path / "config.json").write_bytes((vae_folder / "config.json").read_bytes())
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(D2CError, match="too large for float16"):
        open_codec(str(tmp_path), 16, CPU).encode(pixels(1, 16))
