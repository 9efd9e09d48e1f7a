"""Training recipes: the published systems as one word each, every number a named field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import isfinite
from typing import Any, Literal, TypeAlias, get_args

from d2c.errors import UsageError
from d2c.sit import Projector

Flip: TypeAlias = Literal["none", "grid", "stored"]
"""``grid`` mirrors the stored latents and the grid of the stored tokens together, which is exact for pixels and close
for the rest; ``stored`` takes what was encoded from the mirror image (``--views orig,hflip``).
"""

MOST = 10**9
"""Steps or images that a recipe can name."""


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
    align_depth: int = 0
    """Blocks before the tokens that are aligned; 0: REPA's number for the model's size."""
    align_until: int = 0
    """The step from which on nothing is aligned any more (HASTE, 2505.16792); 0: aligned to the end."""
    projector: Projector = "mlp"
    """What maps the model's tokens to the attached ones': REPA's ``mlp``, or iREPA's 3 x 3 ``conv`` (2512.10794)."""
    spatial_norm: float = 0.0
    """Share of each image's mean token that is taken from the attached tokens before they are scaled to one standard
    deviation (iREPA, 2512.10794); 0: as they are stored."""
    class_token: float = 0.0
    """Weight of the loss of a class token that is denoised along with the latents (REG, 2507.01467: 0.03); 0: none."""
    qk_norm: bool = False
    """Normalise queries and keys: steadier in half precision. An option of REPA's code, off in its released models."""
    objective: Literal["velocity", "eps"] = "velocity"
    flip: Flip = "grid"
    """How an image becomes its mirror image, half of the time; its vision tokens always come along.

    The paper does not say. On 100 images of CIFAR-10 mirroring lowered the held-out loss by a quarter, copied less, and
    moved FD within the noise; tokens of the mirror image were no better than mirrored ones (docs/benchmarks/flips.md).
    """

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant.

        Raises:
            UsageError: one is out of its range.
        """
        for name, value in vars(self).items():
            for number in value if isinstance(value, tuple) else (value,):
                _require_sane(name, number)
        for name in ("steps", "batch_size", "lr", "clip_norm"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be positive", found=getattr(self, name))
        for name in ("weight_decay", "align_weight", "class_token"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative", found=getattr(self, name))
        if not 0 <= self.spatial_norm <= 1:
            raise UsageError("spatial_norm is out of its range", found=self.spatial_norm, expected="0 to 1")
        # At 1 an average never moves, and no class is ever learnt.
        for name in ("betas", "ema_decay", "class_dropout"):
            value = getattr(self, name)
            if not all(0 <= number < 1 for number in (value if isinstance(value, tuple) else (value,))):
                raise UsageError(f"{name} is out of its range", found=value, expected="0 or more, and less than 1")
        for name in ("align_depth", "align_until"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative", found=getattr(self, name))
        kinds = {"objective": ("velocity", "eps"), "flip": get_args(Flip), "projector": get_args(Projector)}
        for name, values in kinds.items():
            if getattr(self, name) not in values:
                raise UsageError(f"unknown {name}", found=getattr(self, name), expected=", ".join(values))

    def changed(self, assignments: Sequence[str]) -> Recipe:
        """The same but for some fields, each given as ``FIELD=VALUE``; ``betas`` are two numbers with a comma.

        Raises:
            UsageError: there is no such field, or it cannot have this value.
        """
        known = [field.name for field in fields(self) if field.name != "name"]
        changes: dict[str, Any] = {}
        for assignment in assignments:
            name, equals, text = assignment.partition("=")
            if not equals or name not in known:
                raise UsageError("a recipe has no such field", found=assignment, expected=f"one of {', '.join(known)}")
            try:
                changes[name] = _parsed(getattr(self, name), text)
            except ValueError as error:
                kind = _KINDS[type(getattr(self, name))]
                raise UsageError(f"{name} cannot have this value", found=text, expected=kind) from error
        return replace(self, **changes)


def _require_sane(name: str, value: Any) -> None:
    """Raises: UsageError: a number is infinite, no number, or larger than anything that is counted here."""
    if isinstance(value, float) and not isfinite(value):
        raise UsageError(f"{name} must be finite", found=value)
    if isinstance(value, int) and value > MOST:
        raise UsageError(f"{name} is too large", found=value, expected=f"at most {MOST:,}")


_KINDS = {
    bool: "true or false",
    float: "a number",
    int: "a whole number",
    tuple: "two numbers, such as 0.9,0.999",
}


def _parsed(like: Any, text: str) -> Any:
    """``text`` as a value of the kind of ``like``."""
    if isinstance(like, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if isinstance(like, tuple):
        first, second = map(float, text.split(","))
        return (first, second)
    return type(like)(text)


_D2C = Recipe(name="d2c")
RECIPES: dict[str, Recipe] = {
    "d2c": _D2C,
    # REPA mirrors nothing; SiT and DiT do.
    "repa": replace(_D2C, name="repa", steps=400_000, text=False, flip="none"),
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
    asked = {"steps": steps, "batch_size": batch_size}
    return RECIPES[name].changed([f"{field}={value}" for field, value in asked.items() if value is not None])


def without_attachments(numbers: Recipe) -> Recipe:
    """The same recipe on images and class labels alone."""
    return replace(numbers, text=False, align=False)
