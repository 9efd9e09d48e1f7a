"""SiT and DiT in the official parameter layout, with D2C's text conditioning and REPA's projector."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2c.conditioning import DCEmbedding, LabelEmbedder, TimestepEmbedder
from d2c.model_spec import OBJECTIVES, SIZES, ModelSpec, ObjectiveName, Projector, model_names, model_spec, parse_model

__all__ = [
    "OBJECTIVES",
    "SIZES",
    "ModelSpec",
    "ObjectiveName",
    "Projector",
    "SiT",
    "model_names",
    "model_spec",
    "parse_model",
    "position_table",
]


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


def _xavier(root: nn.Module) -> None:
    """Draw the weights of all linear maps and convolutions of ``root``; biases are zero."""
    for module in root.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            # A convolution whose kernel covers its whole input is a linear map over that input.
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


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
    """Tokens -> patch pixels [N, T, patch * patch * channels], outside autocast.

    With ``class_dim`` the first token is the class token, and becomes a vector [N, class_dim] of its own.
    """

    def __init__(self, width: int, outputs: int, class_dim: int | None) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)
        self.linear_cls = None if class_dim is None else nn.Linear(width, class_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        dtype = self.linear.weight.dtype
        with torch.autocast(device_type=x.device.type, enabled=False):
            shift, scale = self.adaLN_modulation(condition.to(dtype)).chunk(2, dim=1)
            tokens = _modulate(self.norm_final(x.to(dtype)), shift, scale)
            if self.linear_cls is None:
                return self.linear(tokens), None
            return self.linear(tokens[:, 1:]), self.linear_cls(tokens[:, 0])


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
        table = position_table(width, spec.grid)
        if spec.class_dim is not None:
            table = np.concatenate([np.zeros((1, width)), table])  # the class token lies nowhere
            # REG's own names.
            self.cls_projectors2 = nn.Linear(spec.class_dim, width)
            self.wg_norm = nn.LayerNorm(width, eps=1e-6)
        self.pos_embed = nn.Parameter(torch.from_numpy(table).float()[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, spec.heads, spec.qk_norm) for _ in range(spec.depth))
        self.final_layer = FinalLayer(width, spec.patch**2 * spec.out_channels, spec.class_dim)
        self._initialise()
        # After the trunk: its first weights are the same with and without what is attached.
        if spec.text_dim is not None:
            self.text_embedder = DCEmbedding(spec.text_dim, spec.text_tokens, width)
            _xavier(self.text_embedder)
        if spec.align_dim is not None:
            self.projectors = nn.ModuleList([_projector(spec, spec.align_dim)])
            _xavier(self.projectors)

    def _initialise(self) -> None:
        """Xavier for linear maps, N(0, 0.02) for embeddings, zero for every gate and for the output (DiT, 3.2)."""
        _xavier(self)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for weight in (parameter for parameter in self.t_embedder.parameters() if parameter.ndim == 2):
            nn.init.normal_(weight, std=0.02)
        gates = [block.adaLN_modulation for block in self._blocks()]
        zero = [*gates, self.final_layer.adaLN_modulation, self.final_layer.linear]
        for module in (*zero, self.final_layer.linear_cls or nn.Identity()):
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
        class_token: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Predict velocity or noise for ``latents`` [N, C, H, W] -> the same shape.

        Args:
            latents: noisy latents.
            t: [N]; 0..1 with 1 = noise for "velocity", steps 0..999 for "eps".
            labels: integers [N]; ``num_classes`` is the null class.
            text: attached text [N, text_tokens, text_dim]; None counts as dropped text.
            text_mask: [N, text_tokens], non-zero for real tokens; None: all are real.
            null: bool [N]; true drops class and text of that image together.
            return_tokens: also return the projected tokens [N, T, align_dim] read after block ``align_depth``.
            class_token: the noisy class token [N, class_dim] of a model that has one. Its prediction is then returned
                too, last of all, and the projected tokens are [N, 1 + T, align_dim].

        Raises:
            ValueError: text, tokens or a class token are asked of a model built without them, or not given to one.
        """
        if (class_token is None) != (self.spec.class_dim is None):
            raise ValueError(f"{self.spec.name} and its input do not agree on a class token")
        if return_tokens and self.spec.align_dim is None:
            raise ValueError(f"{self.spec.name} was built without align_dim; it has no projector")
        condition = self.condition(t, labels, text, text_mask, null)
        x = self.x_embedder(latents)
        if class_token is not None:
            x = torch.cat([self.wg_norm(self.cls_projectors2(class_token))[:, None], x], dim=1)
        x = x + self.pos_embed
        projected: Tensor | None = None
        for index, block in enumerate(self.blocks, start=1):
            x = block(x, condition)
            if return_tokens and index == self.spec.align_depth:
                projected = self.projectors[0](x)
        patches, predicted = self.final_layer(x, condition)
        found = [given for given in (projected, predicted) if given is not None]
        output = self._unpatchify(patches)
        return (output, *found) if found else output

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
        if self.spec.class_dim is not None:
            raise ValueError(f"{self.spec.name} has a class token, which images alone do not give")
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
