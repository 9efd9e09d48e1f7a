"""Exponential moving average of a model's parameters, which is what gets sampled and shared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from d2c.sharding import local, placed


class Ema:
    """float32 shadow of every parameter by name, where and as the parameter is; ``decay`` is constant, no warm-up."""

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        self.decay = decay
        self.shadow = {name: value.detach().float().clone() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """``shadow = decay * shadow + (1 - decay) * parameter``; call it after each optimizer step."""
        current = [local(value).float() for _, value in model.named_parameters()]
        torch._foreach_lerp_([local(value) for value in self.shadow.values()], current, 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged parameters by the names of the model's own state dict."""
        return dict(self.shadow)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved average.

        Raises:
            KeyError: ``state`` holds other names than the model.
        """
        if state.keys() != self.shadow.keys():
            raise KeyError(f"these names differ: {sorted(state.keys() ^ self.shadow.keys())[:5]}")
        for name, value in self.shadow.items():
            value.copy_(placed(state[name], value))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """``model`` with the averages for parameters, and with its own again, bit for bit, afterwards."""
        own = {name: value.detach().clone() for name, value in model.named_parameters()}
        try:
            _overwrite(model, self.shadow)
            yield
        finally:
            _overwrite(model, own)


@torch.no_grad()
def _overwrite(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])
