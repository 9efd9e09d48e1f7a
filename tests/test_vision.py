from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2c.encoders import weights_digest
from d2c.errors import D2CError
from d2c.latents import RgbCodec
from d2c.scorers import Denoiser
from d2c.sit import SiT, model_spec
from d2c.transport import objective_for
from d2c.vision import DINOV2, open_vision

CPU = torch.device("cpu")
NO_LABELS = np.zeros(2, np.int32)


def pixels(size: int, count: int = 2, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def inputs(images: np.ndarray[Any, Any], mean: Any, std: Any, side: int) -> Tensor:
    """REPA's order, written out once more: scale, normalise, resize."""
    planes = []
    for channel in range(3):
        values = torch.from_numpy(images[..., channel].astype(np.float32)) / 255.0
        planes.append((values - mean[channel]) / std[channel])
    return F.interpolate(torch.stack(planes, dim=1), side, mode="bicubic")


def farthest_cell(changed: np.ndarray[Any, Any], original: np.ndarray[Any, Any], grid: int) -> tuple[int, int]:
    distance = np.linalg.norm(changed.astype(np.float32) - original.astype(np.float32), axis=-1)[0]
    row, column = divmod(int(distance.argmax()), grid)
    return row, column


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """test_vit is timm's own miniature: 64 wide, /16, made for 160 px; here saved at 64 px."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "tiny.safetensors"
    save_file(timm.create_model("test_vit", img_size=64, num_classes=7).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def registers_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real DINOv2 architecture with one class token and four registers, random weights, at its native 518 px."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dino") / "reg4.safetensors"
    save_file(timm.create_model("vit_small_patch14_reg4_dinov2").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-vision.json").write_text(
        '{"embed_dim": 24, "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16},'
        ' "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}}'
    )
    open_clip.add_model_config(folder / "tiny-vision.json")
    torch.manual_seed(0)
    save_file(open_clip.create_model("tiny-vision").state_dict(), folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


@pytest.mark.parametrize("size", [64, 80])
def test_timm_tokens_are_the_librarys_own_forward(tiny_file: Path, size: int) -> None:
    encoder, images = open_vision(f"timm:test_vit:{tiny_file}", 4, CPU), pixels(size)
    model: Any = timm.create_model("test_vit", img_size=64, num_classes=7, checkpoint_path=str(tiny_file)).eval()
    config = model.pretrained_cfg
    with torch.inference_mode():
        expected = model.forward_features(inputs(images, config["mean"], config["std"], 64)).numpy()
    tokens = encoder.encode(images, NO_LABELS)
    assert tokens.dtype == np.float16
    assert encoder.info.class_token
    assert tokens.shape == (2, 1 + 16, encoder.info.dim) == expected.shape
    np.testing.assert_allclose(tokens, expected, atol=1e-5, rtol=1e-3)


def test_timm_position_embeddings_are_resampled_to_another_grid(tiny_file: Path) -> None:
    images = pixels(96)
    model: Any = timm.create_model("test_vit", img_size=64, num_classes=7, checkpoint_path=str(tiny_file)).eval()
    model.set_input_size(img_size=96)
    with torch.inference_mode():
        expected = model.forward_features(inputs(images, model.pretrained_cfg["mean"], model.pretrained_cfg["std"], 96))
    tokens = open_vision(f"timm:test_vit:{tiny_file}", 6, CPU).encode(images, NO_LABELS)
    np.testing.assert_allclose(tokens, expected.numpy(), atol=1e-4, rtol=1e-2)


def test_dinov2_drops_its_registers_and_keeps_its_class_token(registers_file: Path) -> None:
    encoder = open_vision(f"timm:vit_small_patch14_reg4_dinov2:{registers_file}", 4, CPU)
    images = pixels(64)
    model: Any = timm.create_model("vit_small_patch14_reg4_dinov2", dynamic_img_size=True)
    model.load_state_dict(load_file(registers_file))
    with torch.inference_mode():
        values = inputs(images, model.pretrained_cfg["mean"], model.pretrained_cfg["std"], 56)
        everything = model.eval().forward_features(values)
    assert everything.shape == (2, 1 + 4 + 16, 384)
    tokens = encoder.encode(images, NO_LABELS)
    expected = torch.cat([everything[:, :1], everything[:, 5:]], 1).numpy()
    np.testing.assert_allclose(tokens, expected, atol=1e-4, rtol=1e-2)

    for row, column in ((0, 0), (0, 3), (3, 0), (2, 1)):
        other = images.copy()
        other[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] ^= 255
        assert farthest_cell(encoder.encode(other, NO_LABELS)[:, 1:], tokens[:, 1:], 4) == (row, column)


def test_info_says_what_the_encoder_saw(registers_file: Path) -> None:
    value = open_vision(f"timm:vit_small_patch14_reg4_dinov2:{registers_file}", 4, CPU).info.to_dict()
    assert value["weights_xxh3"] == weights_digest(load_file(registers_file))
    assert value["source"] == "file:reg4.safetensors"
    assert (value["dim"], value["grid"], value["tokens"], value["input_px"]) == (384, 4, 16, 56)
    assert value["mean"] == [0.485, 0.456, 0.406]
    assert (value["view"], value["revision"]) == ("orig", "")
    assert "bicubic" in value["resize"]


def test_timm_weights_come_from_the_hubs_cache_with_their_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, commit = "vit_tiny_patch16_224", "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / f"models--timm--{name}.augreg_in21k_ft_in1k"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    torch.manual_seed(0)
    saved = timm.create_model(name)
    save_file(saved.state_dict(), repo / "snapshots" / commit / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    own = open_vision(f"timm:{name}:hf://timm/{name}.augreg_in21k_ft_in1k/model.safetensors", 2, CPU)
    assert own.info.source == f"hf://timm/{name}.augreg_in21k_ft_in1k/model.safetensors"
    assert own.info.revision == commit
    with pytest.raises(D2CError, match="hf://OWNER/REPO/FILE"):
        open_vision(f"timm:{name}:hf://timm/{name}", 2, CPU)
    with pytest.raises(D2CError, match="neither in the local cache nor reachable"):
        open_vision(f"timm:{name}:hf://nobody/nothing/model.safetensors", 2, CPU)
    encoder = open_vision(f"timm:{name}", 2, CPU)
    assert encoder.info.weights_xxh3 == own.info.weights_xxh3
    assert encoder.info.source == f"hf://timm/{name}.augreg_in21k_ft_in1k"
    assert encoder.info.revision == commit
    assert encoder.info.weights_xxh3 == weights_digest(saved.state_dict())
    assert encoder.encode(pixels(32), NO_LABELS).shape == (2, 1 + 4, 192)


@pytest.mark.parametrize("name", ["dinov2", f"timm:{DINOV2}"])
def test_unreachable_weights_name_both_ways_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(D2CError, match="neither in the local cache nor reachable") as caught:
        open_vision(name, 16, CPU)
    assert f"--vision timm:{DINOV2}:FILE" in str(caught.value)
    assert "--vision scorer" in str(caught.value)


def test_weights_that_do_not_fill_the_model_are_an_error(tiny_file: Path, tmp_path: Path) -> None:
    state = load_file(tiny_file)
    del state["norm.weight"]
    save_file(state, tmp_path / "partial.safetensors")
    with pytest.raises(D2CError, match=r"incomplete[\s\S]*norm\.weight"):
        open_vision(f"timm:test_vit:{tmp_path / 'partial.safetensors'}", 4, CPU)
    with pytest.raises(D2CError, match="does not fit"):
        open_vision(f"timm:vit_tiny_patch16_224:{tiny_file}", 4, CPU)
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    with pytest.raises(D2CError, match="no readable weights"):
        open_vision(f"timm:test_vit:{tmp_path / 'broken.safetensors'}", 4, CPU)
    with pytest.raises(D2CError, match="no such weights file"):
        open_vision(f"timm:test_vit:{tmp_path / 'absent.safetensors'}", 4, CPU)


def test_a_weights_file_runs_no_code(tiny_file: Path, tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({**load_file(tiny_file), "planted": Planted()}, tmp_path / "planted.pth")
    with pytest.raises(D2CError, match="holds more than tensors"):
        open_vision(f"timm:test_vit:{tmp_path / 'planted.pth'}", 4, CPU)
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": load_file(tiny_file)}, tmp_path / "plain.pth")
    assert open_vision(f"timm:test_vit:{tmp_path / 'plain.pth'}", 4, CPU).info.tokens == 16


def test_tokens_with_nan_are_an_error(tiny_file: Path, tmp_path: Path) -> None:
    state = load_file(tiny_file)
    state["norm.bias"][3] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    encoder = open_vision(f"timm:test_vit:{tmp_path / 'nan.safetensors'}", 4, CPU)
    with pytest.raises(D2CError, match="NaN"):
        encoder.encode(pixels(64), NO_LABELS)


def test_models_without_a_patch_grid_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "any.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(D2CError, match="no plain vision transformer"):
        open_vision(f"timm:resnet18:{file}", 7, CPU)
    with pytest.raises(D2CError, match="knows no model"):
        open_vision(f"timm:vit_none:{file}", 7, CPU)
    with pytest.raises(D2CError, match="plain vision transformer"):
        open_vision(f"open_clip:RN50:{file}", 7, CPU)
    with pytest.raises(D2CError, match="no vision encoder 'mae'"):
        open_vision("mae", 16, CPU)


@pytest.mark.parametrize("size", [64, 48])
def test_open_clip_tokens_are_the_librarys_own_forward(clip_file: Path, size: int) -> None:
    import open_clip

    encoder, images = open_vision(f"open_clip:tiny-vision:{clip_file}", 4, CPU), pixels(size)
    visual: Any = open_clip.create_model("tiny-vision", pretrained=str(clip_file)).visual.eval()
    visual.output_tokens = True
    with torch.inference_mode():
        _, expected = visual(inputs(images, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, 64))
    tokens = encoder.encode(images, NO_LABELS)
    assert tokens.shape == (2, 1 + 16, 64) == (2, 1 + 16, encoder.info.dim)
    np.testing.assert_allclose(tokens[:, 1:], expected.numpy(), atol=1e-5, rtol=1e-3)


def test_open_clip_makes_another_grid_in_row_major_order(clip_file: Path) -> None:
    encoder, images = open_vision(f"open_clip:tiny-vision:{clip_file}", 3, CPU), pixels(48)
    tokens = encoder.encode(images, NO_LABELS)
    assert tokens.shape == (2, 1 + 9, 64)
    other = images.copy()
    other[:, :16, 32:] ^= 255
    assert farthest_cell(encoder.encode(other, NO_LABELS)[:, 1:], tokens[:, 1:], 3) == (0, 2)
    four = open_vision(f"open_clip:tiny-vision:{clip_file}", 4, CPU)
    assert encoder.info.weights_xxh3 == four.info.weights_xxh3 == weights_digest(load_file(clip_file))


class Patches:
    """A stand-in scorer: its hidden tokens are the patches of its noised input, moved by the label."""

    def __init__(self) -> None:
        self.depths: list[int] = []
        self.spec = dataclasses.replace(model_spec("sit-tiny/2", input_size=4, channels=3, num_classes=6), width=12)
        self.origin = {"kind": "run", "weights_xxh3": "ab" * 16}

    def hidden(self, latents: Tensor, t: Tensor, labels: Tensor, depth: int, noise: Tensor) -> Tensor:
        self.depths.append(depth)
        time = t.view(-1, 1, 1, 1)
        noised = (1 - time) * latents + time * noise + labels.view(-1, 1, 1, 1)
        return F.unfold(noised, 2, stride=2).transpose(1, 2)


def test_scorer_tokens_are_its_hidden_states_under_one_shared_noise() -> None:
    images, labels, scorer = pixels(4), np.array([0, 5], np.int32), Patches()
    encoder = open_vision("scorer:3@0.5", 2, CPU, scorer=scorer, codec=RgbCodec(4), seed=7)
    tokens = encoder.encode(images, labels)
    assert tokens.shape == (2, 4, 12)
    noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    latents = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    expected = F.unfold(0.5 * latents + 0.5 * noise + torch.tensor([0, 5]).view(2, 1, 1, 1), 2, stride=2)
    np.testing.assert_allclose(tokens, expected.transpose(1, 2).numpy(), atol=1e-5, rtol=1e-3)
    np.testing.assert_array_equal(encoder.encode(images[1:], labels[1:]), tokens[1:])
    assert set(scorer.depths) == {3}
    settings = encoder.info.to_dict()["settings"]
    assert settings == {"codec": "rgb", "depth": 3, "seed": 7, "timestep": 0.5}


@pytest.mark.parametrize("name", ["scorer:0", "scorer:x", "scorer:5", "scorer:2@2"])
def test_scorer_points_that_do_not_exist_are_refused(name: str) -> None:
    with pytest.raises(D2CError, match=r"block 1\.\.4|names no block and time"):
        open_vision(name, 2, CPU, scorer=Patches(), codec=RgbCodec(4))


def test_scorer_tokens_of_a_real_model() -> None:
    torch.manual_seed(0)
    spec = model_spec("sit-tiny/2", input_size=8, channels=3, num_classes=6)
    denoiser = Denoiser(SiT(spec).eval(), objective_for(spec.objective), spec, {"kind": "run"})
    images = pixels(8)
    encoder = open_vision("scorer:1", 4, CPU, scorer=denoiser, codec=RgbCodec(8))
    tokens = encoder.encode(images, NO_LABELS)
    assert tokens.shape == (2, 16, 96)
    other = images.copy()
    other[:, 6:, :2] ^= 255
    assert farthest_cell(encoder.encode(other, NO_LABELS), tokens, 4) == (3, 0)


def test_scorer_without_a_block_takes_the_alignment_depth_and_names_its_weights() -> None:
    scorer = Patches()
    encoder = open_vision("scorer", 2, CPU, scorer=scorer, codec=RgbCodec(4))
    encoder.encode(pixels(4), NO_LABELS)
    assert scorer.depths == [scorer.spec.align_depth] == [2]
    assert encoder.info.weights_xxh3 == "ab" * 16


def test_scorer_tokens_on_another_grid_keep_their_places() -> None:
    torch.manual_seed(0)
    spec = model_spec("sit-tiny/2", input_size=8, channels=3, num_classes=6)
    denoiser = Denoiser(SiT(spec).eval(), objective_for(spec.objective), spec, {"kind": "run"})
    encoder = open_vision("scorer:1", 8, CPU, scorer=denoiser, codec=RgbCodec(8))
    images = pixels(8)
    tokens = encoder.encode(images, NO_LABELS)
    assert tokens.shape == (2, 64, 96)
    assert encoder.info.resize == "tokens, bilinear, from 4 x 4"
    other = images.copy()
    other[:, 6:, :2] ^= 255
    assert farthest_cell(encoder.encode(other, NO_LABELS), tokens, 8) == (7, 0)
