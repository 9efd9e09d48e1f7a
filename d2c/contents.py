"""What goes into an artifact, gathered from the stages before packing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2c.latents import LatentSpec
from d2c.picks import Picks
from d2c.tokens import VisionTokens
from formats.schema import LATENT, Column


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What goes into the artifact, gathered from the stages before."""

    source: Path
    codec: str
    size: int
    picks: Picks
    classes: list[dict[str, Any]]
    fields: dict[str, Any]
    """Manifest fields that say where everything came from."""
    text: Path | None = None
    tokens: VisionTokens | None = None
    unscored: bool = False
    """The images were never read before: an unreadable one is left out, not an error."""

    @property
    def latent(self) -> LatentSpec:
        return LatentSpec.from_dict(self.fields["latent"])

    @property
    def token_column(self) -> str:
        return str(self.fields["encoders"]["vision"]["column"])

    @property
    def columns(self) -> list[Column]:
        spec = self.latent
        columns = [Column(LATENT, spec.dtype, (len(spec.moments), spec.channels, spec.size, spec.size))]
        if self.tokens is not None:
            columns.append(Column(self.token_column, "f2", self.tokens.shape))
        return columns

    @property
    def bytes(self) -> int:
        """Payload bytes of the finished artifact."""
        return len(self.picks) * sum(column.nbytes for column in self.columns)
