"""REG's class token: in the model, in its training, in the samplers, and refused where it cannot be."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import pack_request
from safetensors.torch import save_file
from test_training import config, train

from d2c import pipeline, training
from d2c.entangled import Entangled, draw
from d2c.errors import D2CError, UsageError
from d2c.generator import Generator
from d2c.runs import WEIGHTS, Run
from d2c.sampling import SamplerConfig
from d2c.scorers import infer_spec, load_denoiser
from d2c.sit import SiT, model_spec
from d2c.transport import Velocity

CPU = torch.device("cpu")
REG: dict[str, Any] = {"class_token": 0.03}


@pytest.fixture(scope="module")
def enriched(tmp_path_factory: pytest.TempPathFactory, scored: Path) -> Path:
    """An artifact with the tokens and class tokens of a small ViT with random weights."""
    folder = tmp_path_factory.mktemp("reg")
    shutil.copytree(scored, folder / "workspace")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", img_size=64, num_classes=7).state_dict(), folder / "vit.safetensors")
    vision = f"timm:test_vit:{folder / 'vit.safetensors'}"
    pipeline.pack(pack_request(folder / "workspace", folder / "shards", per_class=4, vision=vision))
    return folder / "shards"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, enriched: Path) -> Path:
    return train(config(enriched, tmp_path_factory.mktemp("run") / "run", numbers=REG)).path


def small(**options: Any) -> SiT:
    torch.manual_seed(0)
    model = SiT(model_spec("sit-tiny/2", 8, 3, 4, align_dim=5, class_dim=6, **options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def inputs(model: SiT) -> tuple[torch.Tensor, ...]:
    latents, token = torch.randn(2, 3, 8, 8), torch.randn(2, 6)
    return latents, torch.rand(2), torch.tensor([0, 3]), token


def test_the_forward_is_reg_s_formulas() -> None:
    model = small()
    latents, t, labels, token = inputs(model)
    output, projected, predicted = model(latents, t, labels, return_tokens=True, class_token=token)
    state = model.state_dict()
    # An independent reading: the token is mapped, normalised, put first, and given no position.
    first = torch.nn.functional.layer_norm(
        token @ state["cls_projectors2.weight"].T + state["cls_projectors2.bias"],
        (96,), state["wg_norm.weight"], state["wg_norm.bias"], 1e-6,
    )  # fmt: skip
    x = torch.cat([first[:, None], model.x_embedder(latents)], 1) + state["pos_embed"]
    condition = model.condition(t, labels)
    for number, block in enumerate(model.blocks, 1):
        x = block(x, condition)
        if number == model.spec.align_depth:
            torch.testing.assert_close(projected, model.projectors[0](x))
    layer = model.final_layer
    shift, scale = layer.adaLN_modulation(condition).chunk(2, 1)
    tokens = layer.norm_final(x) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(predicted, tokens[:, 0] @ state["final_layer.linear_cls.weight"].T
                               + state["final_layer.linear_cls.bias"])  # fmt: skip
    torch.testing.assert_close(output, model._unpatchify(layer.linear(tokens[:, 1:])))
    assert projected.shape == (2, 17, 5)


def test_the_class_token_lies_nowhere_and_starts_by_changing_nothing() -> None:
    fresh = SiT(model_spec("sit-tiny/2", 8, 3, 4, class_dim=6))
    assert torch.equal(fresh.pos_embed[0, 0], torch.zeros(96))
    output, predicted = fresh(*inputs(fresh)[:3], class_token=torch.randn(2, 6))
    assert not predicted.any()
    assert not output.any()


def test_its_shapes_are_read_off_a_weight_file(tmp_path: Path) -> None:
    spec = infer_spec(small().state_dict(), "velocity", tmp_path)
    assert (spec.class_dim, spec.input_size, spec.channels) == (6, 8, 3)


def test_model_and_input_must_agree() -> None:
    model = small()
    latents, t, labels, _ = inputs(model)
    with pytest.raises(ValueError, match="do not agree on a class token"):
        model(latents, t, labels)
    with pytest.raises(D2CError, match="no place for a class token"):
        small(projector="conv")


def test_training_learns_the_class_token_and_resumes_to_the_byte(enriched: Path, run: Path, tmp_path: Path) -> None:
    plain = train(config(enriched, tmp_path / "plain")).path
    assert Run(run).stats()[0]["alignment"] != Run(plain).stats()[0]["alignment"]
    train(config(enriched, tmp_path / "run", steps=8, numbers=REG))
    train(config(enriched, tmp_path / "run", steps=12, numbers=REG))
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()
    long = train(config(enriched, tmp_path / "long", steps=60, log_every=10, numbers={**REG, "align": True})).path
    assert Run(long).stats()[-1]["alignment"] < Run(long).stats()[0]["alignment"]


def test_two_ranks_meet_the_same_noise(enriched: Path, run: Path, tmp_path: Path) -> None:
    two = train(config(enriched, tmp_path / "run", gpus=2, numbers=REG)).path
    for one, other in zip(Run(run).stats(), Run(two).stats(), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)


def test_images_are_drawn_with_their_class_tokens(run: Path) -> None:
    generator = Generator.open(run, CPU)
    assert generator.denoiser.spec.class_dim == 64
    labels = np.arange(3)
    together = generator.pixels(labels, [0, 1, 2], SamplerConfig(steps=4))
    assert together.shape == (3, 8, 8, 3)
    alone = generator.pixels(labels[1:2], [1], SamplerConfig(steps=4))
    assert np.abs(alone[0].astype(int) - together[1].astype(int)).max() <= 1
    with pytest.raises(UsageError, match="guided in all channels"):
        generator.pixels(labels, [0, 1, 2], SamplerConfig(steps=2, guidance_channels=3))


class Known:
    """Knows both parts' exact velocity: the latent moves to 1, the token to 2."""

    def __call__(self, latents: Any, t: Any, labels: Any, *_: Any, null: Any, class_token: Any) -> Any:
        away = t.clamp(min=1e-6)
        return (latents - 1) / away[:, None, None, None], (class_token - 2) / away[:, None]


@pytest.mark.parametrize("method", ["euler", "heun", "sde", "dopri5"])
def test_both_parts_of_the_state_are_integrated(method: Any) -> None:
    spec = replace(model_spec("sit-tiny/2", 4, 3, 4), class_dim=5)
    sampler = SamplerConfig(method=method, steps=50, guidance=1.0)
    latents = draw(Known(), spec, Velocity(), torch.zeros(2, dtype=torch.long), [0, 1], sampler)
    assert latents.shape == (2, 3, 4, 4)
    assert torch.allclose(latents, torch.ones_like(latents), atol=1e-3 if method in ("euler", "dopri5") else 0.2)
    joint = Entangled(Known(), spec)
    both = joint(torch.randn(2, 53), torch.ones(2), torch.zeros(2, dtype=torch.long))
    assert both.shape == (2, 53)


def refusals(enriched: Path, packed: Path, images: Path) -> Iterator[tuple[Any, str]]:
    yield config(packed, enriched.parent / "no", numbers=REG), "holds no class tokens"
    yield config(enriched, enriched.parent / "no", numbers={**REG, "align": False}), "holds no class tokens"
    yield config(enriched, enriched.parent / "no", numbers=REG, held_out=str(images)), "leave --held-out out"
    yield config(enriched, enriched.parent / "no", numbers={**REG, "projector": "conv"}), "projector mlp"


def test_what_cannot_be_is_refused(enriched: Path, packed: Path, image_folder: Path, run: Path) -> None:
    for asked, message in refusals(enriched, packed, image_folder):
        with pytest.raises(D2CError, match=message):
            training.plan(asked)
    scorer = load_denoiser(str(run), device=CPU)
    with pytest.raises(D2CError, match="cannot judge images"):
        scorer.loss(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), 0.5, torch.zeros(1, dtype=torch.long))
