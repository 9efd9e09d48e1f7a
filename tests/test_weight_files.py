"""Weight files that are damaged, hostile or another model's: what is refused, in which words, and that nothing runs."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_scorers import random_model, save_diffusers
from torch import Tensor

from d2c import checkpoint
from d2c.errors import D2CError
from d2c.scorers import load_denoiser
from d2c.transport import Velocity

torch.set_num_threads(1)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return dict(random_model("dit-tiny/2").state_dict())


def refused(path: Path, match: str) -> None:
    with pytest.raises(D2CError, match=match) as raised:
        load_denoiser(path)
    assert str(path) in str(raised.value)


class Code:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("name", ["DiT.pt", "DiT.pth", "diffusers"])
def test_code_in_a_file_is_not_run(name: str, as_zip: bool, state: dict[str, Tensor], tmp_path: Path) -> None:
    canary, path = tmp_path / "ran", tmp_path / name
    if name == "diffusers":
        save_diffusers(random_model("dit-tiny/2"), tmp_path)
        (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
        path = tmp_path / "diffusion_pytorch_model.bin"
    torch.save({**state, "args": Code(canary)}, path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(D2CError, match=r"refused(.|\n)*found: (posix|os)\.system") as raised:
        load_denoiser(tmp_path if name == "diffusers" else path)
    assert "save its tensors alone as .safetensors" in str(raised.value)
    assert not canary.exists()


def test_a_command_line_with_other_objects_is_refused_and_a_plain_one_read(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "dit.pt"
    torch.save({"ema": state, "args": argparse.Namespace(model="DiT-XL/2", epochs=1400, ckpt=None)}, path)
    assert load_denoiser(path).spec.objective == "eps"
    torch.save({"ema": state, "args": argparse.Namespace(results=Path("results"))}, path)
    refused(path, r"refused(.|\n)*found: pathlib.PosixPath(.|\n)*\.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_cut_anywhere_is_refused(suffix: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"dit{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    for length in (0, 1, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "damaged|no readable weights")


def test_missing_unknown_and_misshapen_tensors_are_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "dit.pt"
    del state["blocks.1.attn.qkv.bias"]
    state["blocks.2.attn.q_norm.weight"] = torch.zeros(32)
    state["blocks.3.mlp.fc1.weight"] = torch.zeros(2, 2)
    torch.save(state, path)
    refused(
        path,
        r"1 missing: blocks\.1\.attn\.qkv\.bias \(288,\)\. 1 unknown: blocks\.2\.attn\.q_norm\.weight \(32,\)\. "
        r"1 of another shape: blocks\.3\.mlp\.fc1\.weight \(2, 2\), not \(384, 96\)",
    )


def test_any_tensor_of_any_other_shape_is_a_known_failure(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "dit.safetensors"
    for name in (name for name in state if not name.startswith(("blocks.1", "blocks.2", "blocks.3"))):
        for shape in ((), (0,), (1, 1), (1, 0, 5, 1)):
            save_file({**state, name: torch.zeros(shape)}, path)
            refused(path, "do not fit|neither a SiT nor a DiT")


def test_a_block_number_out_of_thin_air_costs_no_time(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({**state, "blocks.999999999.mlp.fc1.bias": torch.zeros(1)}, tmp_path / "dit.pt")
    refused(tmp_path / "dit.pt", "neither a SiT nor a DiT")


@pytest.mark.parametrize(
    "fields",
    [
        {"_class_name": "PixArtTransformer2DModel"},
        {"_class_name": "Transformer2DModel", "norm_type": "layer_norm"},
        {"_class_name": "Transformer2DModel", "activation_fn": None},
        {"activation_fn": "gelu"},
        {"num_attention_heads": 7},
        {"patch_size": 0},
        {"sample_size": "8"},
        {"sample_size": 1},
    ],
)
def test_diffusers_folders_that_describe_another_model(fields: dict[str, Any], tmp_path: Path) -> None:
    save_diffusers(random_model("dit-tiny/2"), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    with pytest.raises(D2CError, match=r"no DiT|impossible|neither a SiT"):
        load_denoiser(tmp_path)


def test_diffusers_tensors_that_are_missing_or_unknown_are_named(tmp_path: Path) -> None:
    theirs = save_diffusers(random_model("dit-tiny/2"), tmp_path).state_dict()
    theirs.pop("pos_embed.pos_embed", None)
    path, part = tmp_path / "diffusion_pytorch_model.safetensors", "transformer_blocks.1.attn1.to_k.weight"
    for changed, match in (
        ({**theirs, "caption_projection.weight": torch.zeros(2)}, r"caption_projection\.weight \(2,\)"),
        ({name: value for name, value in theirs.items() if name != part}, r"blocks\.1\.attn\.k\.weight \(0,\)"),
        ({**theirs, part: torch.zeros(5, 5)}, r"blocks\.1\.attn\.k\.weight \(5, 5\)"),
        (
            {name: value for name, value in theirs.items() if "proj_out_2.bias" not in name},
            r"final_layer\.linear\.bias",
        ),
    ):
        save_file({name: value.clone() for name, value in changed.items()}, path)
        with pytest.raises(D2CError, match=match):
            load_denoiser(tmp_path)


def test_the_averaged_weights_of_a_run_of_ours_keep_their_direction_of_time_on_their_own(tmp_path: Path) -> None:
    model = random_model("sit-tiny/2")
    checkpoint.save_tensors(tmp_path / "sit-pets.safetensors", model.state_dict(), {"step": 100})
    save_file(model.state_dict(), tmp_path / "sit-theirs.safetensors")
    ours = load_denoiser(tmp_path / "sit-pets.safetensors")
    assert isinstance(ours.objective, Velocity)
    assert not ours.reverse_time
    assert load_denoiser(tmp_path / "sit-theirs.safetensors").reverse_time


def test_the_training_state_of_a_run_is_no_scorer(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "00000500.safetensors"
    tensors = {**checkpoint.prefixed(state, "ema"), "opt.0.step": torch.ones(1)}
    checkpoint.save_tensors(path, tensors, {"step": 500})
    refused(path, "training state of a run(.|\n)*give its folder")
