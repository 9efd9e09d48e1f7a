"""The two noising processes, what a model predicts under each, and the losses.

Time runs from 0 (data) to 1 (noise) everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 1000  # length of the discrete process (DDPM, section 4)
BETA_FIRST, BETA_LAST = 1e-4, 0.02


class Prediction(NamedTuple):
    """One model output read three ways, each [N, C, H, W]."""

    x0: Tensor
    eps: Tensor
    velocity: Tensor  # eps - x0


class Objective(Protocol):
    """A noising process with its training target. Latents and noise are [N, C, H, W], times float [N]."""

    @property
    def name(self) -> Literal["velocity", "eps"]:
        """As in ``ModelSpec.objective``."""
        ...

    def sample_t(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform times float32 [count] in [0, 1), on the generator's device."""
        ...

    def model_time(self, t: Tensor) -> Tensor:
        """What the model is given for ``t``: itself, or the integer step."""
        ...

    def corrupt(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``z_t``."""
        ...

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model should predict from ``z_t``."""
        ...

    def loss(self, prediction: Tensor, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mean squared error of each image, float32 [N]."""
        ...

    def convert(self, prediction: Tensor, z_t: Tensor, t: Tensor) -> Prediction:
        """A model output at ``z_t`` as data, noise and velocity."""
        ...


def spread(t: Tensor, like: Tensor) -> Tensor:
    """``t`` [N] shaped to broadcast over ``like`` [N, ...]."""
    return t.view(-1, *[1] * (like.ndim - 1))


def interpolate(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The linear path ``(1 - t) latents + t noise`` (SiT, equation 5 with t = 1 as noise)."""
    mix = spread(t, latents)
    return (1 - mix) * latents + mix * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """``dz/dt`` of the linear path: ``noise - latents``."""
    return noise - latents


def per_sample_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over all but the first axis of the squared difference, float32 [N]."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def alignment_loss(projected: Tensor, tokens: Tensor) -> Tensor:
    """Minus the mean cosine between two sets of tokens [N, T, D], float32 scalar (REPA, equation 8)."""
    if projected.shape != tokens.shape:
        raise ValueError(f"projected tokens are {tuple(projected.shape)}, attached tokens {tuple(tokens.shape)}")
    return -F.cosine_similarity(projected.float(), tokens.float(), dim=-1).mean()


def spatial_norm(tokens: Tensor, share: float) -> Tensor:
    """``tokens`` [N, T, D] less ``share`` of each image's mean token, over their standard deviation in the image.

    iREPA's (2512.10794) normalisation of the targets: what all of an image's tokens have in common hides where they
    differ.
    """
    values = tokens.float()
    spread = values.std(dim=1, keepdim=True)
    return (values - share * values.mean(dim=1, keepdim=True)) / (spread + 1e-6)


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device)


@dataclass(frozen=True)
class Velocity:
    """The linear path of SiT and REPA; the model predicts ``noise - data``."""

    name: Literal["velocity"] = "velocity"

    def sample_t(self, count: int, generator: torch.Generator) -> Tensor:
        """See :class:`Objective`."""
        return _uniform(count, generator)

    def model_time(self, t: Tensor) -> Tensor:
        """See :class:`Objective`."""
        return t

    def corrupt(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """See :class:`Objective`."""
        return interpolate(latents, noise, t)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """See :class:`Objective`."""
        return velocity_target(latents, noise)

    def loss(self, prediction: Tensor, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """See :class:`Objective`."""
        return per_sample_mse(prediction, self.target(latents, noise, t))

    def convert(self, prediction: Tensor, z_t: Tensor, t: Tensor) -> Prediction:
        """See :class:`Objective`."""
        mix = spread(t, z_t)
        return Prediction(z_t - mix * prediction, z_t + (1 - mix) * prediction, prediction)


@lru_cache(maxsize=8)
def alpha_bars(device: torch.device) -> Tensor:
    """Share of signal variance left after each of the 1,000 steps, float64 [1000] (DDPM, linear betas)."""
    betas = torch.linspace(BETA_FIRST, BETA_LAST, STEPS, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0).to(device)


@dataclass(frozen=True)
class Eps:
    """The 1,000-step process of DiT; the model predicts the noise."""

    name: Literal["eps"] = "eps"

    def sample_t(self, count: int, generator: torch.Generator) -> Tensor:
        """See :class:`Objective`; uniform times are uniform steps."""
        return _uniform(count, generator)

    def model_time(self, t: Tensor) -> Tensor:
        """Step ``floor(1000 t)`` clipped to 0..999, int64."""
        return (t * STEPS).long().clamp(0, STEPS - 1)

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha_t`` and ``sigma_t`` of ``z_t = alpha_t x + sigma_t eps``, in ``like``'s dtype, broadcastable."""
        kept = alpha_bars(t.device)[self.model_time(t)]
        return spread(kept.sqrt(), like).to(like.dtype), spread((1 - kept).sqrt(), like).to(like.dtype)

    def corrupt(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """See :class:`Objective`."""
        alpha, sigma = self.scales(t, latents)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """See :class:`Objective`."""
        return noise

    def loss(self, prediction: Tensor, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """See :class:`Objective`."""
        return per_sample_mse(prediction, noise)

    def convert(self, prediction: Tensor, z_t: Tensor, t: Tensor) -> Prediction:
        """See :class:`Objective`."""
        alpha, sigma = self.scales(t, z_t)
        x0 = (z_t - sigma * prediction) / alpha
        return Prediction(x0, prediction, prediction - x0)


def objective_for(name: Literal["velocity", "eps"]) -> Objective:
    """The objective that ``ModelSpec.objective`` names."""
    return Velocity() if name == "velocity" else Eps()
