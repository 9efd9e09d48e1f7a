"""Training recipes: the published systems as one word each, every number a named field."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from d2c.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. Defaults are the paper's headline run (Appendix C, and Figure 1 for batch and steps)."""

    name: str
    steps: int = 40_000
    batch_size: int = 256
    """Images a step, over all ranks."""
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.9999
    class_dropout: float = 0.1
    """Probability that class *and* text become null, for classifier-free guidance: one mask for both."""
    text: bool = True
    """Use the attached text through DC-Embedding."""
    align: bool = True
    """Align hidden tokens with the attached vision tokens."""
    align_weight: float = 0.5
    """lambda of the alignment loss."""
    objective: Literal["velocity", "eps"] = "velocity"


_D2C = Recipe(name="d2c")
RECIPES: dict[str, Recipe] = {
    "d2c": _D2C,
    "repa": replace(_D2C, name="repa", steps=400_000, text=False),
    "sit": replace(_D2C, name="sit", steps=400_000, text=False, align=False),
    "dit": replace(_D2C, name="dit", steps=400_000, text=False, align=False, objective="eps"),
    # For the CPU-sized model and thousands, not hundreds of thousands, of steps: not from a paper.
    "small": replace(_D2C, name="small", steps=2_000, batch_size=32, lr=2e-3, ema_decay=0.99),
}


def recipe(name: str, *, steps: int | None = None, batch_size: int | None = None) -> Recipe:
    """The named recipe, with the given fields replaced.

    Raises:
        UsageError: the name is unknown, or a number is not positive.
    """
    if name not in RECIPES:
        raise UsageError("unknown recipe", found=name, expected=", ".join(RECIPES))
    for field, value in (("--steps", steps), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{field} must be positive", found=value)
    chosen = RECIPES[name]
    return replace(chosen, steps=steps or chosen.steps, batch_size=batch_size or chosen.batch_size)


def without_attachments(numbers: Recipe) -> Recipe:
    """The same recipe on images and class labels alone."""
    return replace(numbers, text=False, align=False)
