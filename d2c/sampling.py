"""From noise to latents: which solver, classifier-free guidance, and noise that belongs to an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from d2c import runtime, solvers
from d2c.errors import UsageError
from d2c.transport import STEPS, Objective

Method = Literal["euler", "heun", "sde", "dopri5", "ddim", "ddpm"]
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
METHODS: dict[str, tuple[Method, ...]] = {"velocity": ("euler", "heun", "sde", "dopri5"), "eps": ("ddim", "ddpm")}
"""The samplers of each kind of model."""
GUIDANCE = 1.5
"""The scale where nobody asks for another."""


class Predictor(Protocol):
    """What the samplers call: a ``SiT`` or a ``Denoiser``."""

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
    ) -> Tensor: ...


def precision_on(device: torch.device, name: str = "auto") -> str:
    """``auto`` is what the official samplers compute in: tf32 on a GPU, fp32 on a CPU."""
    if name != "auto":
        return name
    return "tf32" if device.type == "cuda" else "fp32"


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How samples are drawn; all of it changes FID, so all of it belongs in a report.

    Raises:
        UsageError: a value is impossible.
    """

    method: Method = "euler"  # sde: Euler-Maruyama as REPA has it; euler of an eps model: see `resolved`
    steps: int = 50  # dopri5 takes what it needs; heun evaluates the model twice a step, all others once
    guidance: float | None = None  # 1 = off; None: `GUIDANCE`, or off where the model knows no null class: see `guided`
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # guide only where lo <= t <= hi (t = 1 is noise)
    guidance_channels: Literal["all", 3] = "all"  # official DiT and SiT guide 3 of 4, REPA guides all
    precision: str = "fp32"  # of the model; the state is float64
    last_step: float = 0.04  # sde: size of the last step, which is without noise
    atol: float = 1e-6  # dopri5: absolute and relative tolerance, SiT's
    rtol: float = 1e-3

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        if self.method not in get_args(Method):
            raise UsageError("unknown sampler", found=self.method, expected=", ".join(get_args(Method)))
        if not 1 <= self.steps <= STEPS:
            raise UsageError("the number of sampling steps is out of range", found=self.steps, expected=f"1..{STEPS}")
        if not 0 <= low <= high <= 1:
            raise UsageError(
                "the guidance interval is not one", found=self.guidance_interval, expected="0 <= low <= high <= 1"
            )
        if self.guidance_channels not in ("all", 3):
            raise UsageError("unknown guidance channels", found=self.guidance_channels, expected="all or 3")
        if self.precision not in PRECISIONS:
            raise UsageError("unknown precision", found=self.precision, expected=", ".join(PRECISIONS))
        if not 0 < self.last_step < 1:
            raise UsageError("the last step is out of range", found=self.last_step, expected="between 0 and 1")
        if not (self.atol >= 0 and self.rtol >= 0 and self.atol + self.rtol > 0):
            raise UsageError("a tolerance is not negative", found=f"atol {self.atol:g}, rtol {self.rtol:g}")

    def resolved(self, objective: Literal["velocity", "eps"]) -> SamplerConfig:
        """As it is run on a model of this objective. DDIM is Euler's method for an eps model, and gets its own name.

        Raises:
            UsageError: the method is for models of the other kind.
        """
        if objective == "eps" and self.method == "euler":
            return replace(self, method="ddim")
        if self.method not in METHODS[objective]:
            other = "a velocity model" if objective == "eps" else "an eps model"
            raise UsageError(
                f"{self.method} needs {other}",
                found=f"{'an eps' if objective == 'eps' else 'a velocity'} model",
                hint=f"use {' or '.join(METHODS[objective])}",
            )
        return self

    @property
    def scale(self) -> float:
        """Of the guidance."""
        return GUIDANCE if self.guidance is None else self.guidance

    def guided(self, class_dropout: float | None) -> SamplerConfig:
        """As it is run on a model that was trained with this probability of the null class; None: nobody knows.

        Raises:
            UsageError: a model that never saw the null class is to be guided by it.
        """
        if class_dropout != 0:
            return replace(self, guidance=self.scale)
        if self.guidance not in (None, 1):
            raise UsageError(
                "this run cannot be guided: it never learnt to draw without a class",
                found=f"--guidance {self.scale:g} for a run with class_dropout=0",
                expected="--guidance 1, which is off",
                hint="leave --guidance out, or train with --set class_dropout=0.1",
            )
        return replace(self, guidance=1.0)

    @property
    def grid(self) -> list[float]:
        """Times from 1 to 0 between which euler, heun and sde step."""
        if self.method == "sde":
            stride = (1 - self.last_step) / max(1, self.steps - 1)
            return [*(1 - stride * index for index in range(self.steps)), 0.0]
        return [1 - index / self.steps for index in range(self.steps + 1)]

    def evaluations(self) -> int | None:
        """Model evaluations that an image takes, both branches of guidance counted; None for dopri5: it depends."""
        if self.method == "dopri5":
            return None
        times = self.grid[:-1]
        if self.method == "heun":
            times += self.grid[1:]
        if self.method in METHODS["eps"]:
            times = [solvers.diffusion_time(step) for step in solvers.diffusion_steps(self.steps)]
        low, high = self.guidance_interval
        return len(times) + (self.scale != 1) * sum(low <= t <= high for t in times)


@dataclass(frozen=True)
class _Guided:
    """The guided prediction for images that are drawn together."""

    model: Predictor
    objective: Objective
    config: SamplerConfig
    labels: Tensor
    text: Tensor | None
    mask: Tensor | None

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        """``z`` float64 [n, C, H, W] and times float64 [n] in 0..1 -> float64 [n, C, H, W]."""
        config, count = self.config, len(z)
        low, high = config.guidance_interval
        inside = (t >= low) & (t <= high) & (config.scale != 1.0)
        guided = inside.nonzero()[:, 0]
        # Every image with its condition, then those to be guided without: one forward pass.
        rows = torch.cat([torch.arange(count, device=z.device), guided])
        null = torch.arange(len(rows), device=z.device) >= count if len(guided) else None
        text, mask = (None if given is None else given[rows] for given in (self.text, self.mask))
        model_t = self.objective.model_time(t.float())
        with runtime.autocast(config.precision, z.device):
            both = self.model(z.float()[rows], model_t[rows], self.labels[rows], text, mask, null=null).double()
        prediction, unconditional = both[:count], both[count:]
        channels = slice(None if config.guidance_channels == "all" else config.guidance_channels)
        if len(guided):
            mixed = torch.lerp(unconditional[:, channels], prediction[guided][:, channels], config.scale)
            prediction[guided, channels] = mixed
        return prediction


class ImageNoise:
    """Standard normal noise, one stream an image: image i's depends on ``seeds[i]`` alone."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._shape = shape

    def draw(self) -> Tensor:
        """The next of every stream, float32 [len(seeds), C, H, W] on the CPU; the first starts the image."""
        return torch.stack([torch.randn(self._shape, generator=generator) for generator in self._generators])


def noise_for(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Starting noise float32 [len(seeds), C, H, W] on the CPU; image i depends on ``seeds[i]`` alone."""
    return ImageNoise(seeds, shape).draw()


@torch.no_grad()
def sample(
    model: Predictor,
    objective: Objective,
    shape: tuple[int, ...],
    labels: Tensor,
    seeds: Sequence[int],
    config: SamplerConfig,
    *,
    text: Tensor | None = None,
    text_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    batch: int = 64,
) -> Tensor:
    """Draw one latent per seed -> float32 [n, C, H, W] on ``device``.

    The state is float64, the model sees float32. Both guidance branches run in one forward pass.

    Args:
        model: in eval mode, on ``device``.
        objective: the model's own.
        shape: C, H, W of one latent, or any other shape of what the model predicts.
        labels: integers [n].
        seeds: n seeds; an image does not depend on what it is batched with, up to rounding in the model.
        config: method, steps, guidance, precision.
        text: attached text of each image [n, K, D].
        text_mask: [n, K].
        device: where the model is.
        batch: images at once; a guided forward pass holds twice as many.

    Raises:
        UsageError: the method is for models of another objective.
        D2CError: dopri5 cannot hold its tolerance.
        ValueError: labels, text and seeds differ in number.
    """
    config = config.resolved(objective.name)
    sizes = {len(given) for given in (labels, seeds, text, text_mask) if given is not None}
    if len(sizes) != 1:
        raise ValueError(f"labels, seeds, text and mask differ in number: {sorted(sizes)}")
    latents = torch.empty(len(seeds), *shape, device=device)
    for start in range(0, len(seeds), batch):
        part = slice(start, start + batch)
        text_part, mask_part = (None if given is None else given[part].to(device) for given in (text, text_mask))
        field = _Guided(model, objective, config, labels[part].to(device), text_part, mask_part)
        latents[part] = _solve(field, ImageNoise(seeds[part], shape), torch.device(device)).float()
    return latents


def _solve(field: _Guided, noise: ImageNoise, device: torch.device) -> Tensor:
    config = field.config

    def draw() -> Tensor:
        return noise.draw().to(device, torch.float64)

    solve = {
        "euler": partial(solvers.euler, grid=config.grid),
        "heun": partial(solvers.heun, grid=config.grid),
        "sde": partial(solvers.euler_maruyama, grid=config.grid, draw=draw),
        "dopri5": partial(solvers.dopri5, atol=config.atol, rtol=config.rtol),
        "ddim": partial(solvers.diffusion, count=config.steps),
        "ddpm": partial(solvers.diffusion, count=config.steps, draw=draw),
    }[config.method]
    return solve(field, draw())
