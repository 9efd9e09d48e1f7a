"""Noising, targets and losses against their formulas and against diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from d2c.transport import (
    Eps,
    Objective,
    Velocity,
    alignment_loss,
    alpha_bars,
    interpolate,
    objective_for,
    velocity_target,
)

torch.set_num_threads(1)
OBJECTIVES: list[Objective] = [Velocity(), Eps()]


def pair(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 2, 3, 3, generator=generator)
    return latents, torch.randn(count, 2, 3, 3, generator=generator)


def test_alphas_are_those_of_diffusers() -> None:
    import diffusers

    untyped: Any = diffusers
    scheduler = untyped.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    assert torch.allclose(alpha_bars(torch.device("cpu")).float(), scheduler.alphas_cumprod, rtol=2e-5)
    latents, noise = pair(3)
    t = torch.tensor([0.0, 0.5005, 1.0])
    want = scheduler.add_noise(latents, noise, torch.tensor([0, 500, 999]))
    assert torch.allclose(Eps().corrupt(latents, noise, t), want, atol=1e-5)


def test_steps_cover_the_discrete_process() -> None:
    t = (torch.arange(1000) + 0.5) / 1000
    assert torch.equal(Eps().model_time(t), torch.arange(1000))
    assert Eps().model_time(torch.tensor([0.0, 1.0])).tolist() == [0, 999]
    assert torch.equal(Velocity().model_time(t), t)


def test_linear_path_and_its_derivative() -> None:
    latents, noise = pair()
    zero, one = torch.zeros(4), torch.ones(4)
    assert torch.equal(interpolate(latents, noise, zero), latents)
    assert torch.equal(interpolate(latents, noise, one), noise)
    t = torch.rand(4, dtype=torch.float64)
    step = 1e-6
    slope = interpolate(latents.double(), noise.double(), t + step) - interpolate(latents.double(), noise.double(), t)
    assert torch.allclose(slope / step, velocity_target(latents, noise).double(), atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_a_perfect_prediction_has_no_loss_and_converts_back(objective: Objective) -> None:
    latents, noise = (value.double() for value in pair())
    t = torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=torch.float64)
    perfect = objective.target(latents, noise, t)
    assert objective.loss(perfect, latents, noise, t).tolist() == [0, 0, 0, 0]
    read = objective.convert(perfect, objective.corrupt(latents, noise, t), t)
    assert torch.allclose(read.x0, latents)
    assert torch.allclose(read.eps, noise)
    assert torch.allclose(read.velocity, noise - latents)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_loss_is_the_mean_of_each_image_in_float32(objective: Objective) -> None:
    latents, noise = pair()
    t = torch.rand(4)
    prediction = torch.randn_like(latents).bfloat16()
    loss = objective.loss(prediction, latents, noise, t)
    target = noise if objective.name == "eps" else noise - latents
    want = [F.mse_loss(prediction[i].float(), target[i]).item() for i in range(4)]
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_times_are_uniform_and_repeatable(objective: Objective) -> None:
    t = objective.sample_t(20_000, torch.Generator().manual_seed(3))
    assert torch.equal(t, objective.sample_t(20_000, torch.Generator().manual_seed(3)))
    assert t.min() >= 0
    assert t.max() < 1
    counts = torch.histc(t, bins=10, min=0, max=1)
    assert (counts - 2000).abs().max() < 5 * (2000 * 0.9) ** 0.5
    assert objective_for(objective.name) == objective


def test_alignment_is_minus_the_mean_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(2, 5, 7, generator=generator)
    tokens = torch.randn(2, 5, 7, generator=generator)
    cosines = [
        (projected[i, j] @ tokens[i, j] / (projected[i, j].norm() * tokens[i, j].norm())).item()
        for i in range(2)
        for j in range(5)
    ]
    assert alignment_loss(projected, tokens).item() == pytest.approx(-sum(cosines) / 10, abs=1e-6)
    assert alignment_loss(3 * tokens, tokens).item() == pytest.approx(-1, abs=1e-6)
    assert alignment_loss(projected.bfloat16(), tokens.half()).dtype == torch.float32
    with pytest.raises(ValueError, match="attached tokens"):
        alignment_loss(projected, tokens[:, :4])


def test_tables_cached_while_scoring_serve_training() -> None:
    alpha_bars.cache_clear()
    with torch.inference_mode():
        Eps().corrupt(*pair(), torch.rand(4))
    prediction = torch.zeros(4, 2, 3, 3, requires_grad=True)
    x0 = Eps().convert(prediction, pair()[0], torch.rand(4)).x0
    (gradient,) = torch.autograd.grad(x0.sum(), prediction)
    assert gradient.all()
