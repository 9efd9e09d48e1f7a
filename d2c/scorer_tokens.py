"""The scorer's own hidden tokens as vision attachments: in-domain, and no download."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from d2c.encoders import EncoderInfo, checked_tokens
from d2c.errors import D2CError
from d2c.latents import LatentCodec, to_model
from d2c.sit import ModelSpec


class Scorer(Protocol):
    """What `ScorerTokens` needs of a scorer; `d2c.scorers.Denoiser` has it."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def origin(self) -> dict[str, str]: ...

    def hidden(self, latents: Tensor, t: Tensor, labels: Tensor, depth: int, noise: Tensor) -> Tensor:
        """Latents [N, C, H, W], times [N] in [0, 1] (1 = noise), labels [N], noise [N, C, H, W] -> [N, T, width]."""
        ...


class ScorerTokens:
    """The scorer's own tokens after block ``depth`` at time ``timestep``: in-domain, and no download.

    Without ``depth`` it is the block that a model of the scorer's size is aligned at (REPA: 8 of L and XL, 4 of S, B).

    Where the scorer has another grid than ``grid`` the tokens are resampled, and ``info.resize`` says so. Every image
    meets the same noise, drawn from ``seed``, so tokens depend on neither batch nor order.
    """

    def __init__(
        self,
        scorer: Scorer,
        codec: LatentCodec,
        grid: int,
        device: torch.device,
        *,
        depth: int | None = None,
        timestep: float = 0.25,
        seed: int = 0,
    ) -> None:
        model, spec = scorer.spec, codec.spec
        depth = model.align_depth if depth is None else depth
        if not 1 <= depth <= model.depth or not 0 <= timestep <= 1:
            raise D2CError(
                "the scorer has no such block or time",
                found=f"scorer:{depth}@{timestep}",
                expected=f"a block 1..{model.depth} and a time in [0, 1] (1 = noise)",
            )
        self._scorer, self._codec, self._device = scorer, codec, device
        self._depth, self._timestep = depth, timestep
        generator = torch.Generator().manual_seed(seed)
        self._noise = torch.randn(1, spec.channels, spec.size, spec.size, generator=generator).to(device)
        self.info = EncoderInfo(
            name="scorer",
            source=f"{scorer.origin.get('kind', 'scorer')}: {model.name}",
            revision="",
            weights_xxh3=scorer.origin.get("weights_xxh3", ""),
            dim=model.width,
            tokens=grid * grid,
            layer=f"block {depth}",
            grid=grid,
            input_px=spec.pixels,
            resize="none" if grid == model.grid else f"tokens, bilinear, from {model.grid} x {model.grid}",
            view="orig",
            class_token=False,
            settings=(("codec", spec.codec), ("depth", depth), ("seed", seed), ("timestep", timestep)),
        )

    @torch.inference_mode()
    def encode(self, pixels: NDArray[np.uint8], labels: NDArray[Any]) -> NDArray[np.float16]:
        raw = torch.from_numpy(self._codec.encode(pixels)).to(self._device)
        latents = to_model(raw, self._codec.spec)  # [N, C, H, W]
        times = torch.full((len(latents),), self._timestep, device=self._device)
        classes = torch.from_numpy(np.asarray(labels, np.int64)).to(self._device)
        hidden = self._scorer.hidden(latents, times, classes, self._depth, self._noise.expand_as(latents))
        return checked_tokens(self._on_grid(hidden), self.info)

    def _on_grid(self, tokens: Tensor) -> Tensor:
        """Tokens [N, T, D] of the scorer's grid, on the grid that was asked for."""
        own, grid = self._scorer.spec.grid, self.info.grid
        if grid is None or grid == own:
            return tokens
        planes = tokens.view(len(tokens), own, own, -1).permute(0, 3, 1, 2)  # [N, D, own, own]
        return F.interpolate(planes, (grid, grid), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)


def scorer_point(text: str) -> tuple[int | None, float]:
    """``BLOCK@TIME`` -> block and time; without a block REPA's alignment depth, without a time 0.25."""
    block, _, time = text.partition("@")
    try:
        return int(block) if block else None, float(time) if time else 0.25
    except ValueError as error:
        raise D2CError(f"scorer:{text} names no block and time", expected="scorer:8@0.25") from error
