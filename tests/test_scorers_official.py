"""Files of exactly the published layouts, with one or two blocks, against the papers' formulas and diffusers.

The formulas are float64; the bar is 1e-5 of the largest value.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from test_scorers import save_diffusers
from test_sit import published
from torch import Tensor

from d2c.scorers import Denoiser, load_denoiser
from formats.files import read_json, write_json

torch.set_num_threads(1)

CLASSES, S, XL = 1000, 384, 1152  # S is quick to compute; its files differ in width and depth alone
HEADS = {S: 6, XL: 16}
State = dict[str, Tensor]


def official(rows: int, width: int = S, depth: int = 2, projector: bool = False) -> State:
    """Random tensors under the names and with the shapes of ``DiT-XL-2-256x256.pt`` and its kin."""
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (width, 4, 2, 2),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.2.weight": (width, width),
        "final_layer.linear.weight": (rows, width),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
    }
    for block in range(depth):
        shapes |= {
            f"blocks.{block}.attn.qkv.weight": (3 * width, width),
            f"blocks.{block}.attn.proj.weight": (width, width),
            f"blocks.{block}.mlp.fc1.weight": (4 * width, width),
            f"blocks.{block}.mlp.fc2.weight": (width, 4 * width),
            f"blocks.{block}.adaLN_modulation.1.weight": (6 * width, width),
        }
    if projector:
        shapes |= {f"projectors.0.{i}.weight": shape for i, shape in ((0, (2048, width)), (4, (768, 2048)))}
        shapes["projectors.0.2.weight"] = (2048, 2048)
    shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    shapes["y_embedder.embedding_table.weight"] = (CLASSES + 1, width)  # the last row is the null class
    generator = torch.Generator().manual_seed(rows)
    state = {name: torch.randn(*shape, generator=generator) * 0.03 for name, shape in shapes.items()}
    return {"pos_embed": positions(width), **state}


def positions(width: int) -> Tensor:
    """Sines and cosines of the column, then of the row, of each of 16 x 16 tokens: [1, 256, width]."""
    place = torch.arange(16, dtype=torch.float64)
    angles = place[:, None] * 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    axis = torch.cat([angles.sin(), angles.cos()], 1)  # [16, width / 2]
    column, row = axis[None].expand(16, 16, -1), axis[:, None].expand(16, 16, -1)
    return torch.cat([column, row], 2).reshape(1, 256, width).float()


def flat(state: State) -> dict[str, Any]:
    return dict(state)


def training(state: State) -> dict[str, Any]:
    """What the trainers of DiT, SiT and REPA save, with weights that the average is not."""
    model = {name: value + 1 for name, value in state.items()}
    moments = {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    opt = {"state": moments, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}]}
    args = argparse.Namespace(model="SiT-XL/2", num_classes=1000, ckpt=None, path_type="Linear")
    return {"model": model, "ema": state, "opt": opt, "args": args, "steps": 400000}


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 2, 4, 32, 32, generator=generator)
    return latents, noise, torch.tensor([0.25, 0.9995]), torch.tensor([207, 999])


def close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() < 1e-5 * want.abs().max())


def reference(denoiser: Denoiser, state: State, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """DiT's network, by its formulas, on the file's own tensors: float64, the first 4 channels."""
    width = state["x_embedder.proj.bias"].shape[0]
    assert (denoiser.spec.heads, denoiser.spec.width, denoiser.spec.num_classes) == (HEADS[width], width, CLASSES)
    return published(state, denoiser.spec, z, t, labels)


@pytest.fixture(scope="module")
def dit() -> State:
    return official(32)


@pytest.mark.parametrize(("width", "depth"), [(S, 2), (XL, 1)])
def test_dit_is_scored_by_its_noise_at_whole_steps(width: int, depth: int, tmp_path: Path) -> None:
    dit = official(32, width, depth)
    torch.save(flat(dit), tmp_path / "DiT-XL-2-256x256.pt")
    denoiser = load_denoiser(tmp_path / "DiT-XL-2-256x256.pt")
    assert (denoiser.spec.objective, denoiser.spec.learn_sigma, denoiser.reverse_time) == ("eps", True, False)
    latents, noise, t, labels = batch()
    steps = torch.tensor([250, 999])
    betas = torch.tensor([1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)], dtype=torch.float64)
    kept = torch.stack([(1 - betas[: step + 1]).prod() for step in steps])[:, None, None, None]
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    want = reference(denoiser, dit, noisy, steps, labels)
    assert close(denoiser(noisy.float(), steps, labels), want)
    loss = (want - noise).square().mean((1, 2, 3))
    assert close(denoiser.loss(latents, noise, t, labels), loss)


@pytest.mark.parametrize("save", [flat, training])
def test_sit_is_scored_by_its_velocity_towards_the_data(save: Any, tmp_path: Path) -> None:
    """Official SiT: ``x_t = t x + (1 - t) noise`` and ``v = x - noise``; t = 1 is data."""
    state = official(32)
    torch.save(save(state), tmp_path / "SiT-XL-2-256.pt")
    denoiser = load_denoiser(tmp_path / "SiT-XL-2-256.pt")
    assert (denoiser.spec.objective, denoiser.spec.learn_sigma, denoiser.reverse_time) == ("velocity", True, True)
    latents, noise, t, labels = batch()
    theirs = 1 - t.double()
    mix = theirs[:, None, None, None]
    z = mix * latents + (1 - mix) * noise
    velocity = reference(denoiser, state, z, theirs, labels)
    assert close(denoiser(z.float(), t, labels), -velocity)
    assert close(denoiser.loss(latents, noise, t, labels), (velocity - (latents - noise)).square().mean((1, 2, 3)))


def test_repa_is_scored_by_its_velocity_towards_the_noise(tmp_path: Path) -> None:
    """REPA: ``x_t = (1 - t) x + t noise`` and ``v = noise - x``; 16 output rows and a projector beside them."""
    state = official(16, projector=True)
    torch.save(training(state), tmp_path / "0400000.pt")
    denoiser = load_denoiser(tmp_path / "0400000.pt")
    assert (denoiser.spec.objective, denoiser.spec.learn_sigma, denoiser.reverse_time) == ("velocity", False, False)
    latents, noise, t, labels = batch()
    mix = t.double()[:, None, None, None]
    z = (1 - mix) * latents + mix * noise
    velocity = reference(denoiser, state, z, t.double(), labels)
    assert close(denoiser.loss(latents, noise, t, labels), (velocity - (noise - latents)).square().mean((1, 2, 3)))


def test_the_last_row_of_the_table_is_the_null_class(dit: State, tmp_path: Path) -> None:
    torch.save(flat(dit), tmp_path / "DiT-XL-2-256x256.pt")
    denoiser = load_denoiser(tmp_path / "DiT-XL-2-256x256.pt")
    latents, _, _, labels = batch()
    steps = torch.tensor([10, 600])
    want = reference(denoiser, dit, latents, steps, torch.tensor([1000, 999]))
    assert close(denoiser(latents, steps, labels, null=torch.tensor([True, False])), want)


@pytest.mark.parametrize("kind", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_diffusers_computes_what_the_official_file_does(kind: str, dit: State, tmp_path: Path) -> None:
    torch.save(flat(dit), tmp_path / "DiT-XL-2-256x256.pt")
    ours = load_denoiser(tmp_path / "DiT-XL-2-256x256.pt")
    place = tmp_path / "DiT-XL-2-256" / "transformer"
    theirs = save_diffusers(ours.model, place).double()
    # The published folder was written before diffusers had a class of its own for DiT.
    write_json(place / "config.json", {**read_json(place / "config.json"), "_class_name": kind})
    read = load_denoiser(tmp_path / "DiT-XL-2-256")
    assert read.origin["weights_xxh3"] == ours.origin["weights_xxh3"]
    latents, _, _, labels = batch()
    steps = torch.tensor([250, 999])

    def predict() -> Tensor:
        with torch.no_grad():
            sample: Tensor = theirs(latents.double(), timestep=steps, class_labels=labels).sample
        return sample[:, :4]

    assert not close(ours(latents, steps, labels), predict())  # diffusers spaces the frequencies of t by 127, not 128
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert close(ours(latents, steps, labels), predict())
    assert close(read(latents, steps, labels), predict())
