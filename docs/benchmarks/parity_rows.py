"""What parity.py compares with: a row of its table, and weights that hide nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MISSED = "**missed**"


@dataclass(frozen=True)
class Row:
    """One comparison."""

    what: str
    difference: float
    bar: float
    size: float | None = None

    @property
    def met(self) -> bool:
        return self.difference <= self.bar  # NaN is not met

    def shown(self) -> list[str]:
        size = "" if self.size is None else f"{self.size:.2g}"
        bar = f"{self.bar:.0e}" if self.bar else "0"
        return [self.what, f"{self.difference:.2g}", size, bar, "met" if self.met else MISSED]


def largest(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> float:
    if theirs.keys() != ours.keys():
        return float("inf")
    return max(float((theirs[name] - ours[name]).detach().abs().max()) for name in theirs)


def rms(values: Mapping[str, Tensor]) -> float:
    flat = torch.cat([value.detach().flatten() for value in values.values()])
    return float(flat.double().square().mean().sqrt())


def compared(what: str, theirs: Tensor, ours: Tensor, bar: float) -> Row:
    return Row(what, largest({"": theirs}, {"": ours}), bar, rms({"": theirs}))


@torch.no_grad()
def draw_anew(model: nn.Module, seed: int = 0, gain: float = 1.0) -> None:
    """Every tensor of the model, so that outputs and modulations are about as large as 1, or as ``gain``."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        scale = value[0].numel() ** -0.5 if value.ndim in (2, 4) and value.shape[0] > 1 else 0.1
        value.copy_(torch.randn(value.shape, generator=generator) * scale * gain)


def moved(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> float:
    return rms({name: after[name] - before[name] for name in after})
