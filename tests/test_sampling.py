"""Samplers on fields with a known solution, and against diffusers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from d2c.errors import UsageError
from d2c.runtime import autocast
from d2c.sampling import SamplerConfig, noise_for, precision_on, sample
from d2c.sit import SiT, model_spec
from d2c.solvers import diffusion_steps
from d2c.transport import Eps, Velocity

torch.set_num_threads(1)
SHAPE = (4, 4, 4)


@dataclass
class Field:
    """A stand-in model: ``slope * z``, plus the class on every channel where the class was not dropped."""

    slope: float = 1.0
    counts: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def __call__(
        self,
        latents: Tensor,
        t: Tensor,
        labels: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        /,
        *,
        null: Tensor | None = None,
    ) -> Tensor:
        assert latents.dtype == torch.float32
        self.counts.append(len(latents))
        self.times.append(t[0].item())
        kept = labels if null is None else labels * ~null
        return self.slope * latents + kept[:, None, None, None]


def labels_zero(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.long)


def test_euler_on_a_linear_field_has_its_closed_form() -> None:
    model = Field(slope=0.7)
    config = SamplerConfig(steps=10, guidance=1.0)
    got = sample(model, Velocity(), SHAPE, labels_zero(3), [1, 2, 3], config)
    want = noise_for([1, 2, 3], SHAPE).double() * (1 - 0.07) ** 10
    assert torch.allclose(got.double(), want, rtol=1e-5)
    assert model.times == pytest.approx([1 - i / 10 for i in range(10)])
    assert got.dtype == torch.float32


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_order_of_the_method(method: str, order: int) -> None:
    exact = noise_for([5], SHAPE).double() * math.exp(-1)
    errors = []
    for steps in (8, 16):
        config = SamplerConfig(method="heun" if method == "heun" else "euler", steps=steps, guidance=1.0)
        got = sample(Field(), Velocity(), SHAPE, labels_zero(1), [5], config)
        errors.append((got.double() - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_an_image_does_not_depend_on_its_batch() -> None:
    spec = model_spec("sit-tiny/2", 4, 4, 3)
    model = SiT(spec).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.05)
    labels, seeds = torch.tensor([0, 1, 2, 0, 1]), [10, 11, 12, 13, 14]
    config = SamplerConfig(steps=4, guidance=2.0)
    together = sample(model, Velocity(), SHAPE, labels, seeds, config)
    for batch in (1, 2):
        assert torch.allclose(sample(model, Velocity(), SHAPE, labels, seeds, config, batch=batch), together, atol=1e-5)
    alone = sample(model, Velocity(), SHAPE, labels[3:4], seeds[3:4], config)
    assert torch.allclose(alone[0], together[3], atol=1e-5)
    assert torch.equal(noise_for(seeds, SHAPE)[3], noise_for([13], SHAPE)[0])


def test_ddim_is_that_of_diffusers() -> None:
    import diffusers

    spec = model_spec("dit-tiny/2", 4, 4, 3)
    model = SiT(spec).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.05)
    labels, seeds = torch.tensor([0, 2]), [3, 4]
    got = sample(model, Eps(), SHAPE, labels, seeds, SamplerConfig(steps=20, guidance=1.0))
    untyped: Any = diffusers
    scheduler = untyped.DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == diffusion_steps(20)
    state = noise_for(seeds, SHAPE)
    with torch.no_grad():
        for step in scheduler.timesteps:
            state = scheduler.step(model(state, step.expand(2), labels), int(step), state).prev_sample
    assert torch.allclose(got, state, rtol=1e-3, atol=1e-3 * state.abs().max().item())


@pytest.mark.parametrize("count", [1, 7, 50, 999, 1000])
def test_ddim_steps_start_at_pure_noise_and_fall(count: int) -> None:
    steps = diffusion_steps(count)
    assert steps[0] == 999
    assert len(set(steps)) == count
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] >= 0


def test_guidance_extrapolates_in_one_forward_pass() -> None:
    model = Field(slope=0.0)
    labels = torch.tensor([1, 2])
    config = SamplerConfig(steps=2, guidance=3.0)
    got = sample(model, Velocity(), SHAPE, labels, [1, 2], config)
    moved = noise_for([1, 2], SHAPE) - got  # unconditional 0 + 3 * (class - 0)
    assert torch.allclose(moved, 3.0 * labels[:, None, None, None].expand(2, *SHAPE), atol=1e-5)
    assert model.counts == [4, 4]


def test_three_guided_channels_leave_the_fourth_conditional() -> None:
    config = SamplerConfig(steps=2, guidance=3.0, guidance_channels=3)
    got = sample(Field(slope=0.0), Velocity(), SHAPE, torch.tensor([2]), [1], config)
    moved = (noise_for([1], SHAPE) - got)[0].mean((1, 2))
    assert moved.tolist() == pytest.approx([6, 6, 6, 2], abs=1e-5)


def test_outside_its_interval_guidance_is_off_and_costs_nothing() -> None:
    model = Field(slope=0.0)
    config = SamplerConfig(steps=4, guidance=3.0, guidance_interval=(0.3, 0.8))
    got = sample(model, Velocity(), SHAPE, torch.tensor([1]), [1], config)
    assert model.counts == [1, 2, 2, 1]  # t = 1, .75, .5, .25
    assert (noise_for([1], SHAPE) - got).mean().item() == pytest.approx((1 + 3 + 3 + 1) / 4, abs=1e-5)


def test_text_follows_its_image_into_both_branches() -> None:
    spec = model_spec("sit-tiny/4", 4, 4, 3, text_dim=5, text_tokens=2)
    model = SiT(spec).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.05)
    labels, seeds, text = torch.tensor([0, 0, 1]), [1, 1, 2], torch.randn(3, 2, 5)
    config = SamplerConfig(steps=2, guidance=2.0)
    got = sample(model, Velocity(), SHAPE, labels, seeds, config, text=text, text_mask=torch.ones(3, 2), batch=2)
    alone = sample(model, Velocity(), SHAPE, labels[2:], seeds[2:], config, text=text[2:], text_mask=torch.ones(1, 2))
    assert torch.allclose(got[2], alone[0], atol=1e-5)
    assert not torch.allclose(got[0], got[1], atol=1e-3)  # same seed and class, other text


def test_impossible_requests_name_their_reason() -> None:
    with pytest.raises(UsageError, match="heun needs a velocity model"):
        sample(Field(), Eps(), SHAPE, labels_zero(1), [1], SamplerConfig(method="heun"))
    with pytest.raises(ValueError, match="differ in number"):
        sample(Field(), Velocity(), SHAPE, labels_zero(2), [1], SamplerConfig())
    with pytest.raises(UsageError, match="0 <= low"):
        SamplerConfig(guidance_interval=(0.8, 0.2))
    with pytest.raises(UsageError, match="steps"):
        SamplerConfig(steps=0)


def test_a_gpu_samples_in_tf32_as_the_official_samplers_do_and_leaves_no_setting_behind() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [precision_on(gpu), precision_on(cpu), precision_on(gpu, "fp32")] == ["tf32", "fp32", "fp32"]
    before = torch.get_float32_matmul_precision()
    with autocast("tf32", gpu):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    for precision, device in (("fp32", gpu), ("tf32", cpu)):
        with autocast(precision, device):
            assert torch.get_float32_matmul_precision() == before
