"""What steers the transformer: time, class and the text attached to the class, each as one vector per image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

FREQUENCIES = 256  # width of the sinusoid before the MLP, as in DiT and SiT
MAX_PERIOD = 10000.0


def sinusoid(t: Tensor, width: int = FREQUENCIES) -> Tensor:
    """Cosines then sines of ``t`` [N] at ``width / 2`` geometric frequencies -> float32 [N, width].

    ``t`` is used as it comes: 0..1 for velocity models, 0..999 for eps models (DiT and SiT do the same).
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedder(nn.Module):
    """Time [N] -> vector [N, width]: sinusoid, then a two-layer MLP, outside autocast."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        # bf16 has 8 bits of mantissa: neighbouring times would share one embedding.
        with torch.autocast(device_type=t.device.type, enabled=False):
            embedded: Tensor = self.mlp(sinusoid(t).to(next(self.parameters()).dtype))
        return embedded


class LabelEmbedder(nn.Module):
    """Class [N] -> vector [N, width]; row ``num_classes`` is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor, null: Tensor | None = None) -> Tensor:
        if null is not None:
            labels = torch.where(null, self.num_classes, labels)
        embedded: Tensor = self.embedding_table(labels)
        return embedded


class DCEmbedding(nn.Module):
    """Class text [N, K, D] -> vector [N, width]: ``MLP(LayerNorm(t~)) + t~`` (D2C, "dual conditional embedding").

    ``t~`` is one convolution whose kernel spans all K tokens, masked tokens being zero; the caller adds the class
    embedding. Where ``null`` is true ``t~`` is the zero vector, so dropping text does not depend on the prompt.
    """

    def __init__(self, text_dim: int, text_tokens: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(text_dim, width, kernel_size=text_tokens)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, text: Tensor, mask: Tensor, null: Tensor | None = None) -> Tensor:
        """``text`` [N, K, D], ``mask`` [N, K] (non-zero = a real token), ``null`` bool [N] -> [N, width]."""
        real = (text * mask[..., None].to(text.dtype)).to(self.conv.weight.dtype)
        vector = self.conv(real.transpose(1, 2)).squeeze(2)
        if null is not None:
            vector = vector.masked_fill(null[:, None], 0.0)
        return self.finish(vector)

    def absent(self, count: int) -> Tensor:
        """The vectors [count, width] of images without text: what ``null`` gives, without reading any."""
        return self.finish(self.conv.weight.new_zeros(count, self.conv.out_channels))

    def finish(self, vector: Tensor) -> Tensor:
        """``t~`` [N, width] -> ``MLP(LayerNorm(t~)) + t~``."""
        mixed: Tensor = self.mlp(self.norm(vector))
        return mixed + vector
