"""SiT and DiT in the official parameter layout, with D2C's text conditioning and REPA's projector."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from d2c.conditioning import DCEmbedding, LabelEmbedder, TimestepEmbedder
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
    if spec.num_classes < 1 or spec.channels < 1:
        raise ValueError(f"{spec.num_classes} classes and {spec.channels} channels: both must be at least 1")
    return spec


def position_table(width: int, grid: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Fixed 2-D sine-cosine positions [grid * grid, width] in row-major token order.

    The first half of a row encodes the column, the second half the row; each half is sines then cosines
    (the layout of MAE and DiT).
    """
    frequencies = 10000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width // 4))
    rows, columns = np.divmod(np.arange(grid * grid, dtype=np.float64), grid)
    angles = [axis[:, None] * frequencies for axis in (columns, rows)]
    return np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the condition (adaLN-zero)."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        from timm.layers.activations import GELUTanh
        from timm.layers.attention import Attention
        from timm.layers.mlp import Mlp

        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``x`` [N, T, width], ``condition`` [N, width] -> [N, T, width]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(_modulate(self.norm1(x), shift1, scale1))
        x = x + gate2[:, None] * self.mlp(_modulate(self.norm2(x), shift2, scale2))
        return x


class FinalLayer(nn.Module):
    """Tokens -> patch pixels [N, T, patch * patch * channels], outside autocast."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        dtype = self.linear.weight.dtype
        with torch.autocast(device_type=x.device.type, enabled=False):
            shift, scale = self.adaLN_modulation(condition.to(dtype)).chunk(2, dim=1)
            out: Tensor = self.linear(_modulate(self.norm_final(x.to(dtype)), shift, scale))
        return out


class SiT(nn.Module):
    """The transformer of DiT and SiT; the two differ in what ``t`` is and what the output means, not in weights.

    Parameter names are those of the official files, so these load with a strict check. ``text_embedder.*`` and
    ``projectors.*`` exist only when the spec asks for them.
    """

    pos_embed: nn.Parameter

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        from timm.layers.patch_embed import PatchEmbed

        self.spec = spec
        width = spec.width
        self.x_embedder = PatchEmbed(spec.input_size, spec.patch, spec.channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(spec.num_classes, width)
        positions = torch.from_numpy(position_table(width, spec.grid)).float()[None]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, spec.heads, spec.qk_norm) for _ in range(spec.depth))
        self.final_layer = FinalLayer(width, spec.patch**2 * spec.out_channels)
        if spec.text_dim is not None:
            self.text_embedder = DCEmbedding(spec.text_dim, spec.text_tokens, width)
        if spec.align_dim is not None:
            self.projectors = nn.ModuleList([_projector(spec, spec.align_dim)])
        self._initialise()

    def _initialise(self) -> None:
        """Xavier for linear maps, N(0, 0.02) for embeddings, zero for every gate and for the output (DiT, 3.2)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                # A convolution whose kernel covers its whole input is a linear map over that input.
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for weight in (parameter for parameter in self.t_embedder.parameters() if parameter.ndim == 2):
            nn.init.normal_(weight, std=0.02)
        gates = [block.adaLN_modulation for block in self._blocks()]
        for module in (*gates, self.final_layer.adaLN_modulation, self.final_layer.linear):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def condition(
        self,
        t: Tensor,
        labels: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        null: Tensor | None = None,
    ) -> Tensor:
        """Time plus class plus text -> [N, width]; ``null`` drops class and text of an image together."""
        steering: Tensor = self.t_embedder(t) + self.y_embedder(labels, null)
        if self.spec.text_dim is None:
            if text is not None:
                raise ValueError(f"{self.spec.name} was built without text_dim; it cannot read text")
            return steering
        if text is None:
            return steering + self.text_embedder.absent(len(labels))
        if text_mask is None:
            text_mask = torch.ones(text.shape[:2], dtype=text.dtype, device=text.device)
        vector: Tensor = self.text_embedder(text, text_mask, null)
        return steering + vector

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        labels: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        null: Tensor | None = None,
        return_tokens: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict velocity or noise for ``latents`` [N, C, H, W] -> the same shape.

        Args:
            latents: noisy latents.
            t: [N]; 0..1 with 1 = noise for "velocity", steps 0..999 for "eps".
            labels: integers [N]; ``num_classes`` is the null class.
            text: attached text [N, text_tokens, text_dim]; None counts as dropped text.
            text_mask: [N, text_tokens], non-zero for real tokens; None: all are real.
            null: bool [N]; true drops class and text of that image together.
            return_tokens: also return the projected tokens [N, T, align_dim] read after block ``align_depth``.

        Raises:
            ValueError: text or tokens are asked of a model built without them.
        """
        if return_tokens and self.spec.align_dim is None:
            raise ValueError(f"{self.spec.name} was built without align_dim; it has no projector")
        condition = self.condition(t, labels, text, text_mask, null)
        x = self.x_embedder(latents) + self.pos_embed
        projected: Tensor | None = None
        for index, block in enumerate(self.blocks, start=1):
            x = block(x, condition)
            if return_tokens and index == self.spec.align_depth:
                projected = self.projectors[0](x)
        output = self._unpatchify(self.final_layer(x, condition))
        return output if projected is None else (output, projected)

    def hidden(
        self,
        latents: Tensor,
        t: Tensor,
        labels: Tensor,
        depth: int,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens [N, T, width] after block ``depth`` (1 = the first), without running the blocks behind it.

        Raises:
            ValueError: the model has no such block.
        """
        if not 1 <= depth <= self.spec.depth:
            raise ValueError(f"{self.spec.name} has blocks 1..{self.spec.depth}, not {depth}")
        condition = self.condition(t, labels, text, text_mask)
        x: Tensor = self.x_embedder(latents) + self.pos_embed
        for block in self._blocks()[:depth]:
            x = block(x, condition)
        return x

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """[N, T, patch * patch * out_channels] -> the first ``channels`` planes [N, C, H, W]."""
        spec = self.spec
        planes = patches.view(-1, spec.grid, spec.grid, spec.patch, spec.patch, spec.out_channels)
        planes = planes[..., : spec.channels].permute(0, 5, 1, 3, 2, 4)  # [N, C, rows, p, columns, q]
        return planes.reshape(-1, spec.channels, spec.input_size, spec.input_size)


class ConvProjector(nn.Conv2d):
    """A 3 x 3 convolution over the grid of tokens, from [N, T, width] to [N, T, align_dim] (iREPA, 2512.10794)."""

    def __init__(self, width: int, align_dim: int) -> None:
        super().__init__(width, align_dim, kernel_size=3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens`` [N, T, width] of a square grid, row by row."""
        count, size, width = tokens.shape
        grid = round(size**0.5)
        planes = tokens.transpose(1, 2).reshape(count, width, grid, grid)
        return super().forward(planes).flatten(2).transpose(1, 2)


def _projector(spec: ModelSpec, align_dim: int) -> nn.Module:
    """From hidden tokens to the attached tokens' space: REPA's three layers, or one convolution."""
    width, hidden = spec.width, spec.projector_width
    if spec.projector == "conv":
        return ConvProjector(width, align_dim)
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, align_dim)
    )
