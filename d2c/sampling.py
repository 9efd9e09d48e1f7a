"""From noise to latents: Euler and Heun on the velocity field, DDIM for eps models, classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from d2c.errors import UsageError
from d2c.transport import STEPS, Objective, alpha_bars


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


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How samples are drawn; all of it changes FID, so all of it belongs in a report.

    Raises:
        UsageError: a value is impossible.
    """

    method: Literal["euler", "heun"] = "euler"  # eps models: "euler" is deterministic DDIM
    steps: int = 50  # model evaluations per branch; heun takes two a step
    guidance: float = 1.5  # 1 = off
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # guide only where lo <= t <= hi (t = 1 is noise)
    guidance_channels: Literal["all", 3] = "all"  # official DiT and SiT guide 3 of 4, REPA guides all

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        if self.method not in ("euler", "heun"):
            raise UsageError("unknown sampler", found=self.method, expected="euler or heun")
        if not 1 <= self.steps <= STEPS:
            raise UsageError("the number of sampling steps is out of range", found=self.steps, expected=f"1..{STEPS}")
        if not 0 <= low <= high <= 1:
            raise UsageError(
                "the guidance interval is not one", found=self.guidance_interval, expected="0 <= low <= high <= 1"
            )
        if self.guidance_channels not in ("all", 3):
            raise UsageError("unknown guidance channels", found=self.guidance_channels, expected="all or 3")


@dataclass(frozen=True)
class _Batch:
    """Images drawn together, and what steers them."""

    model: Predictor
    config: SamplerConfig
    labels: Tensor
    text: Tensor | None
    mask: Tensor | None

    def predict(self, z: Tensor, model_t: Tensor, t: float) -> Tensor:
        """Guided prediction float64 for ``z`` float64 [n, C, H, W]; ``t`` is ``model_t`` (0-d) as 0..1."""
        config, x, count = self.config, z.float(), len(z)
        low, high = config.guidance_interval
        if config.guidance == 1.0 or not low <= t <= high:
            return self.model(x, model_t.expand(count), self.labels, self.text, self.mask).double()
        null = torch.arange(2 * count, device=z.device) >= count
        text, mask = (None if given is None else torch.cat([given, given]) for given in (self.text, self.mask))
        both = self.model(
            torch.cat([x, x]), model_t.expand(2 * count), self.labels.repeat(2), text, mask, null=null
        ).double()
        conditional, unconditional = both.chunk(2)
        guided = torch.lerp(unconditional, conditional, config.guidance)
        if config.guidance_channels == 3:
            return torch.cat([guided[:, :3], conditional[:, 3:]], dim=1)
        return guided


def noise_for(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Starting noise float32 [len(seeds), C, H, W] on the CPU; image i depends on ``seeds[i]`` alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(
    model: Predictor,
    objective: Objective,
    shape: tuple[int, int, int],
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
        shape: C, H, W of one latent.
        labels: integers [n].
        seeds: n seeds; an image does not depend on what it is batched with, up to rounding in the model.
        config: method, steps, guidance.
        text: attached text of each image [n, K, D].
        text_mask: [n, K].
        device: where the model is.
        batch: images at once; a guided forward pass holds twice as many.

    Raises:
        UsageError: heun was asked of an eps model.
        ValueError: labels, text and seeds differ in number.
    """
    if objective.name == "eps" and config.method == "heun":
        raise UsageError("heun needs a velocity model", found="an eps model", hint="use euler, which is DDIM here")
    sizes = {len(given) for given in (labels, seeds, text, text_mask) if given is not None}
    if len(sizes) != 1:
        raise ValueError(f"labels, seeds, text and mask differ in number: {sorted(sizes)}")
    draw = _ddim if objective.name == "eps" else _ode
    latents = torch.empty(len(seeds), *shape, device=device)
    for start in range(0, len(seeds), batch):
        part = slice(start, start + batch)
        text_part, mask_part = (None if given is None else given[part].to(device) for given in (text, text_mask))
        job = _Batch(model, config, labels[part].to(device), text_part, mask_part)
        latents[part] = draw(job, noise_for(seeds[part], shape).to(device).double()).float()
    return latents


def _ode(job: _Batch, z: Tensor) -> Tensor:
    """Integrate ``dz/dt = velocity`` from t = 1 to 0 in equal steps."""
    steps = job.config.steps

    def velocity(state: Tensor, t: float) -> Tensor:
        return job.predict(state, torch.tensor(t, dtype=torch.float32, device=state.device), t)

    for index in range(steps):
        t, following = 1 - index / steps, 1 - (index + 1) / steps
        slope = velocity(z, t)
        ahead = z + (following - t) * slope
        if job.config.method == "heun":
            ahead = z + (following - t) * (slope + velocity(ahead, following)) / 2
        z = ahead
    return z


def ddim_steps(count: int) -> list[int]:
    """The ``count`` integer steps that DDIM visits, from 999 down in equal strides ("trailing" spacing)."""
    return [round(STEPS - index * STEPS / count) - 1 for index in range(count)]


def _ddim(job: _Batch, z: Tensor) -> Tensor:
    """Deterministic DDIM (Song et al., equation 12 with sigma = 0); the last step lands on the data."""
    kept = alpha_bars(z.device)
    visited = ddim_steps(job.config.steps)
    for step, following in zip(visited, [*visited[1:], None], strict=True):
        now = kept[step]
        after = kept.new_ones(()) if following is None else kept[following]
        eps = job.predict(z, torch.tensor(step, device=z.device), (step + 0.5) / STEPS)
        x0 = (z - (1 - now).sqrt() * eps) / now.sqrt()
        z = after.sqrt() * x0 + (1 - after).sqrt() * eps
    return z
