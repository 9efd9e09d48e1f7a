"""Sampling of any model, those included that denoise a class token along with the latents (REG, 2507.01467)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2c.errors import UsageError
from d2c.model_spec import ModelSpec
from d2c.sampling import Predictor, SamplerConfig, sample
from d2c.transport import Objective


@dataclass(frozen=True)
class Entangled:
    """A model with a class token as samplers see it: its state is one vector, the latent's values, then the token's."""

    model: Any
    spec: ModelSpec

    @property
    def values(self) -> int:
        """Of the latent alone."""
        return self.spec.channels * self.spec.input_size**2

    def __call__(
        self,
        state: Tensor,
        t: Tensor,
        labels: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        /,
        *,
        null: Tensor | None = None,
    ) -> Tensor:
        """``state`` [N, values + class_dim] -> the prediction of both, alike."""
        token = state[:, self.values :]
        output, predicted = self.model(self.latents(state), t, labels, text, text_mask, null=null, class_token=token)
        return torch.cat([output.flatten(1), predicted], dim=1)

    def latents(self, state: Tensor) -> Tensor:
        """The latents [N, C, H, W] in ``state``."""
        side = self.spec.input_size
        return state[:, : self.values].reshape(len(state), self.spec.channels, side, side)


def draw(
    model: Predictor,
    spec: ModelSpec,
    objective: Objective,
    labels: Tensor,
    seeds: Sequence[int],
    config: SamplerConfig,
    **options: Any,
) -> Tensor:
    """`sample`, whatever the model denoises: latents float32 [n, C, H, W].

    Raises:
        UsageError: three channels of a model with a class token are to be guided.
    """
    shape = (spec.channels, spec.input_size, spec.input_size)
    if spec.class_dim is None:
        return sample(model, objective, shape, labels, seeds, config, **options)
    if config.guidance_channels != "all":
        raise UsageError("a model with a class token is guided in all channels", hint="leave --guidance-channels out")
    joint = Entangled(model, spec)
    size = math.prod(shape) + spec.class_dim
    return joint.latents(sample(joint, objective, (size,), labels, seeds, config, **options))
