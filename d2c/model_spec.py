"""What fixes the shapes of a SiT or DiT: sizes by name, and every option that its weights depend on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from d2c.errors import D2CError

ObjectiveName = Literal["velocity", "eps"]
Projector = Literal["mlp", "conv"]


@dataclass(frozen=True)
class Size:
    """One column of the size table of DiT (Peebles & Xie, Table 1) with REPA's alignment depth."""

    depth: int
    width: int
    heads: int
    align_depth: int  # REPA aligns after block 8 of L and XL, 4 of S and B
    projector_width: int = 2048


SIZES: dict[str, Size] = {
    "tiny": Size(depth=4, width=96, heads=3, align_depth=2, projector_width=256),
    "s": Size(depth=12, width=384, heads=6, align_depth=4),
    "b": Size(depth=12, width=768, heads=12, align_depth=4),
    "l": Size(depth=24, width=1024, heads=16, align_depth=8),
    "xl": Size(depth=28, width=1152, heads=16, align_depth=8),
}
OBJECTIVES: dict[str, ObjectiveName] = {"sit": "velocity", "dit": "eps"}
PATCHES = (2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything that fixes the shapes of a model; ``model.json`` beside its weights holds these fields."""

    name: str
    objective: ObjectiveName
    depth: int
    width: int
    heads: int
    patch: int
    input_size: int  # side of the square latent
    channels: int
    num_classes: int  # without the null class
    text_dim: int | None = None  # width of the attached text tokens; None: class only
    text_tokens: int = 16
    align_depth: int = 8  # blocks before the projector reads the tokens
    align_dim: int | None = None  # width of the attached vision tokens; None: no projector
    projector_width: int = 2048
    projector: Projector = "mlp"
    qk_norm: bool = False
    class_dim: int | None = None  # width of a class token that is denoised along with the latents (REG); None: none
    learn_sigma: bool = False  # the official files predict a variance too; it is computed and dropped

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return self.input_size // self.patch

    @property
    def tokens(self) -> int:
        """Tokens per image."""
        return self.grid**2

    @property
    def dc_embedding(self) -> bool:
        """Whether text conditions the model (D2C's dual conditional embedding)."""
        return self.text_dim is not None

    @property
    def out_channels(self) -> int:
        """Channels that the last layer computes; ``forward`` returns the first ``channels`` of them."""
        return self.channels * 2 if self.learn_sigma else self.channels

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str | None = None) -> ModelSpec:
        """The inverse of :meth:`to_dict`.

        Raises:
            D2CError: a field is missing, unknown or impossible; ``where`` names the file in the message.
        """
        known = {field.name for field in fields(cls)}
        try:
            if unknown := sorted(set(values) - known):
                raise ValueError(f"unknown fields {', '.join(unknown)}")
            return _checked(cls(**values))
        except (TypeError, ValueError) as error:
            raise D2CError(
                "this is not the description of a model",
                where=where,
                found=str(error),
                expected=f"the fields {', '.join(sorted(known))}",
            ) from error


def model_names() -> list[str]:
    """Every name that :func:`parse_model` accepts."""
    return [
        f"{family}-{size}/{patch}"
        for family in OBJECTIVES
        for size in SIZES
        for patch in ((1, *PATCHES) if size == "tiny" else PATCHES)
    ]


def parse_model(name: str) -> tuple[str, str, int]:
    """``"sit-xl/2"`` (any case) -> ``("sit", "xl", 2)``.

    Raises:
        D2CError: no such model; the message lists the names and suggests the nearest.
    """
    valid = model_names()
    lowered = name.lower()
    if lowered not in valid:
        near = difflib.get_close_matches(lowered, valid, n=1, cutoff=0.4)
        raise D2CError(
            "there is no such model",
            found=name,
            expected=", ".join(valid),
            hint=f"did you mean {near[0]}?" if near else None,
        )
    family, size, patch = re.split("[-/]", lowered)
    return family, size, int(patch)


def model_spec(
    name: str,
    input_size: int,
    channels: int,
    num_classes: int,
    text_dim: int | None = None,
    align_dim: int | None = None,
    *,
    text_tokens: int = 16,
    learn_sigma: bool = False,
    align_depth: int | None = None,
    projector: Projector = "mlp",
    qk_norm: bool = False,
    class_dim: int | None = None,
) -> ModelSpec:
    """The spec of the named model for square latents of side ``input_size``.

    Raises:
        D2CError: no such model, its patches do not tile the latent, or it has no such block to align.
    """
    family, size_name, patch = parse_model(name)
    size = SIZES[size_name]
    spec = ModelSpec(
        name=f"{family}-{size_name}/{patch}",
        objective=OBJECTIVES[family],
        depth=size.depth,
        width=size.width,
        heads=size.heads,
        patch=patch,
        input_size=input_size,
        channels=channels,
        num_classes=num_classes,
        text_dim=text_dim,
        text_tokens=text_tokens,
        align_depth=align_depth or size.align_depth,
        align_dim=align_dim,
        projector_width=size.projector_width,
        projector=projector,
        qk_norm=qk_norm,
        class_dim=class_dim,
        learn_sigma=learn_sigma,
    )
    try:
        return _checked(spec)
    except ValueError as error:
        if input_size % patch == 0:
            raise D2CError(f"{spec.name} cannot be built so", found=str(error)) from error
        fitting = [p for p in PATCHES if input_size % p == 0]
        hint = f"use a model that ends in {' or '.join(f'/{p}' for p in fitting)}" if fitting else None
        raise D2CError(f"{spec.name} does not fit these latents", found=str(error), hint=hint) from error


def _checked(spec: ModelSpec) -> ModelSpec:
    """``spec`` itself.

    Raises:
        ValueError: the sizes contradict each other.
    """
    if spec.objective not in OBJECTIVES.values():
        raise ValueError(f"objective {spec.objective!r} is neither 'velocity' nor 'eps'")
    if spec.input_size < spec.patch or spec.input_size % spec.patch:
        raise ValueError(f"a latent side of {spec.input_size} is no multiple of the patch side {spec.patch}")
    if spec.width % spec.heads or spec.width % 4:
        raise ValueError(f"width {spec.width} must be a multiple of 4 and of the {spec.heads} heads")
    if not 1 <= spec.align_depth <= spec.depth:
        raise ValueError(f"align_depth {spec.align_depth} is outside 1..{spec.depth}")
    if spec.class_dim is not None and spec.projector == "conv":
        raise ValueError("a convolution over the grid has no place for a class token: projector mlp")
    if spec.num_classes < 1 or spec.channels < 1:
        raise ValueError(f"{spec.num_classes} classes and {spec.channels} channels: both must be at least 1")
    return spec
