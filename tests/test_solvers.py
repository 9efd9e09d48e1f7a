"""Solvers where the answer is known: Gaussian data, whose velocity and noise are exact; SciPy and diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from d2c.errors import D2CError, UsageError
from d2c.sampling import ImageNoise, Method, SamplerConfig, noise_for, sample
from d2c.sit import SiT, model_spec
from d2c.solvers import diffusion_steps, diffusion_time, dopri5
from d2c.transport import Eps, Objective, Velocity, alpha_bars, spread

torch.set_num_threads(1)
SHAPE = (4, 4, 4)
MEAN, SIGMA = 0.8, 0.5
VELOCITY_METHODS: tuple[Method, ...] = ("euler", "heun", "sde", "dopri5")
EPS_METHODS: tuple[Method, ...] = ("ddim", "ddpm")


@dataclass
class Exact:
    """What a perfect model of data N(MEAN + class, SIGMA^2) predicts: E[noise - x | z_t], or E[noise | z_t]."""

    eps: bool = False
    calls: list[int] = field(default_factory=list)

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
        self.calls.append(len(latents))
        z, times = latents.double(), spread(t.double(), latents)
        kept = spread(alpha_bars(latents.device)[t], latents) if self.eps else None
        alpha, sigma = (1 - times, times) if kept is None else (kept.sqrt(), (1 - kept).sqrt())
        mean = MEAN + spread(labels if null is None else labels * ~null, latents)
        residual = (z - alpha * mean) / (alpha**2 * SIGMA**2 + sigma**2)
        noise, data = sigma * residual, mean + alpha * SIGMA**2 * residual
        return (noise if self.eps else noise - data).float()


def draw(count: int, method: Method, steps: int, *, batch: int = 512, **options: Any) -> Tensor:
    eps = method in EPS_METHODS
    config = SamplerConfig(method=method, steps=steps, guidance=1.0, **options)
    objective: Objective = Eps() if eps else Velocity()
    labels = torch.arange(count) % 2
    return sample(Exact(eps), objective, SHAPE, labels, list(range(count)), config, batch=batch).double()


@pytest.mark.parametrize("method", [*VELOCITY_METHODS, *EPS_METHODS])
def test_every_sampler_lands_on_the_mean_and_the_variance_of_its_class(method: Method) -> None:
    found = draw(512, method, 1000 if method == "ddpm" else 250)  # ddpm's lower bound of the variance needs many
    for label in (0, 1):
        mine = found[label::2]
        # 256 x 64 values: standard errors are 0.004 for the mean and 0.003 for the deviation.
        assert mine.mean().item() == pytest.approx(MEAN + label, abs=0.016)
        assert mine.std().item() == pytest.approx(SIGMA, abs=0.014)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_the_flow_to_a_gaussian_is_met_with_the_order_of_the_method(method: Method, order: int) -> None:
    exact = MEAN + SIGMA * noise_for([0], SHAPE).double()  # the flow keeps each value's rank
    errors = [(draw(1, method, steps) - exact).abs().max().item() for steps in (32, 64)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_without_noise_the_sde_s_drift_is_repas() -> None:
    """REPA, samplers.py: drift v - t * score with the score from the velocity; then sqrt(2 t dt) noise."""
    model, noise = Exact(), ImageNoise([3], SHAPE)
    z, times = noise.draw().double(), [1 - 0.9 * i / 4 for i in range(5)]
    for now, after in zip(times, [*times[1:], 0.0], strict=True):
        v = model(z.float(), torch.tensor([now]), torch.tensor([0])).double()
        score = (-(1 - now) * v - z) / now
        drift = v - now * score
        spread_of = math.sqrt(2 * now) * math.sqrt(now - after)
        z = z + (after - now) * drift + (spread_of * noise.draw().double() if after else 0)
    got = sample(
        Exact(),
        Velocity(),
        SHAPE,
        torch.tensor([0]),
        [3],
        SamplerConfig(method="sde", steps=5, last_step=0.1, guidance=1.0),
    )
    assert torch.allclose(got.double(), z, atol=1e-5)


def test_dopri5_takes_the_steps_that_scipy_takes() -> None:
    from scipy.integrate import RK45

    start = noise_for([7], SHAPE).double()

    for atol, rtol in ((1e-6, 1e-3), (1e-4, 1e-5)):
        times: dict[str, list[float]] = {"mine": [], "theirs": []}

        def velocity(z: Tensor, t: Tensor, seen: list[float]) -> Tensor:
            seen.append(t.item())
            return torch.sin(5 * z) * spread(1 + t, z)

        def flat(t: float, values: np.ndarray[Any, Any], seen: list[float] = times["theirs"]) -> np.ndarray[Any, Any]:
            z = torch.from_numpy(values).view(1, *SHAPE)
            return velocity(z, torch.tensor([t], dtype=torch.float64), seen).flatten().numpy()

        theirs = RK45(flat, 1.0, start.flatten().numpy(), 0.0, atol=atol, rtol=rtol)
        while theirs.status == "running":
            theirs.step()
        got = dopri5(partial(velocity, seen=times["mine"]), start, atol, rtol)
        assert len(times["theirs"]) > 20
        assert times["mine"] == pytest.approx(times["theirs"], abs=1e-9)
        assert np.abs(got.flatten().numpy() - theirs.y).max() < 1e-9


def test_dopri5_meets_its_tolerance() -> None:
    exact = MEAN + SIGMA * noise_for([0], SHAPE).double()
    assert (draw(1, "dopri5", 1, atol=1e-6, rtol=1e-6) - exact).abs().max() < 2e-5


def test_every_image_of_dopri5_has_steps_of_its_own() -> None:
    """One field turns a hundred times faster: alone or beside it, the other image comes out bit for bit the same."""
    rates = torch.tensor([1.0, 100.0], dtype=torch.float64)

    def velocity(rate: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda z, t: spread(rate, z) * torch.cos(spread(rate * t, z))

    start = noise_for([0, 1], SHAPE).double()
    both = dopri5(velocity(rates), start, 1e-6, 1e-6)
    for index in (0, 1):
        one = slice(index, index + 1)
        assert torch.equal(dopri5(velocity(rates[one]), start[one], 1e-6, 1e-6), both[one])
    assert torch.allclose(both, start - spread(torch.sin(rates), start), atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_dopri5_gives_up_where_the_field_is_no_number(bad: float) -> None:
    start = noise_for([0], SHAPE).double()
    with pytest.raises(D2CError, match="cannot hold its tolerance"):
        dopri5(lambda z, t: torch.full_like(z, bad), start, 1e-6, 1e-3)
    with pytest.raises(D2CError, match="cannot hold its tolerance"):
        dopri5(lambda z, t: torch.where(spread(t, z) < 0.5, bad, z), start, 1e-6, 1e-3)


@pytest.mark.parametrize("method", [*VELOCITY_METHODS, *EPS_METHODS])
def test_an_image_does_not_depend_on_its_batch(method: Method) -> None:
    spec = model_spec("dit-tiny/2" if method in EPS_METHODS else "sit-tiny/2", 4, 4, 3)
    model = SiT(spec).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.05, generator=generator)
    objective: Objective = Eps() if method in EPS_METHODS else Velocity()
    labels, seeds = torch.tensor([0, 1, 2, 0, 1]), [10, 11, 12, 13, 14]
    config = SamplerConfig(method=method, steps=10, guidance=2.0, guidance_interval=(0.2, 0.9))
    together = sample(model, objective, SHAPE, labels, seeds, config)
    # Rounding moves dopri5's steps over the jump at the interval's ends; a grey level is 8e-3.
    allowed = 4e-3 if method == "dopri5" else 1e-4
    for batch in (1, 2):
        again = sample(model, objective, SHAPE, labels, seeds, config, batch=batch)
        assert torch.allclose(again, together, atol=allowed)
    other = sample(model, objective, SHAPE, labels, [*seeds[:4], 99], config)
    assert torch.allclose(other[:4], together[:4], atol=allowed)
    assert not torch.allclose(other[4], together[4], atol=1e-1)


def test_ddpm_is_that_of_diffusers() -> None:
    import diffusers

    spec = model_spec("dit-tiny/2", 4, 4, 3)
    model = SiT(spec).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.05, generator=generator)
    labels, seeds = torch.tensor([0, 2]), [3, 4]
    got = sample(model, Eps(), SHAPE, labels, seeds, SamplerConfig(method="ddpm", steps=20, guidance=1.0))
    untyped: Any = diffusers
    scheduler = untyped.DDPMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        variance_type="fixed_small",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == diffusion_steps(20)
    noise = ImageNoise(seeds, SHAPE)
    state = noise.draw()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        scheduling: Any = __import__("diffusers.schedulers.scheduling_ddpm", fromlist=["randn_tensor"])
        patch.setattr(scheduling, "randn_tensor", lambda *_, **__: noise.draw())
        for step in scheduler.timesteps:
            state = scheduler.step(model(state, step.expand(2), labels), int(step), state).prev_sample
    assert torch.allclose(got, state, rtol=1e-3, atol=1e-3 * state.abs().max().item())


def test_the_time_of_a_step_is_that_step_to_the_model() -> None:
    times = torch.tensor([diffusion_time(step) for step in range(1000)], dtype=torch.float64)
    assert Eps().model_time(times.float()).tolist() == list(range(1000))


@pytest.mark.parametrize("method", ["euler", "heun", "sde", "ddim", "ddpm"])
def test_the_evaluations_that_are_announced_are_those_that_are_made(method: Method) -> None:
    model = Exact(eps=method in EPS_METHODS)
    config = SamplerConfig(method=method, steps=8, guidance=2.0, guidance_interval=(0.3, 0.75))
    objective: Objective = Eps() if method in EPS_METHODS else Velocity()
    sample(model, objective, SHAPE, torch.tensor([1]), [0], config)
    assert sum(model.calls) == config.evaluations()
    assert config.evaluations() != SamplerConfig(method=method, steps=8, guidance=2.0).evaluations()
    assert SamplerConfig(method="dopri5").evaluations() is None


def test_bf16_moves_the_images_a_little_and_is_part_of_the_config() -> None:
    model = SiT(model_spec("sit-tiny/2", 4, 4, 3)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.05, generator=generator)
    labels = torch.tensor([0, 1])
    fp32, bf16 = (
        sample(model, Velocity(), SHAPE, labels, [1, 2], SamplerConfig(steps=4, precision=precision))
        for precision in ("fp32", "bf16")
    )
    assert bf16.dtype == torch.float32
    assert 0 < (fp32 - bf16).abs().max() < 0.05
    assert SamplerConfig(precision="bf16") != SamplerConfig()


@pytest.mark.parametrize(
    ("objective", "method"), [("eps", "heun"), ("eps", "sde"), ("eps", "dopri5"), ("velocity", "ddim")]
)
def test_a_sampler_of_the_other_kind_of_model_is_refused(objective: Any, method: Method) -> None:
    with pytest.raises(UsageError, match=f"{method} needs"):
        SamplerConfig(method=method).resolved(objective)
    assert SamplerConfig().resolved("eps").method == "ddim"
    assert SamplerConfig().resolved("velocity").method == "euler"


@pytest.mark.parametrize(
    "wrong", [{"method": "rk4"}, {"precision": "fp8"}, {"last_step": 0.0}, {"atol": -1.0}, {"atol": 0.0, "rtol": 0.0}]
)
def test_impossible_settings_name_themselves(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SamplerConfig(**wrong)
