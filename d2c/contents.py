"""What goes into an artifact, gathered from the stages before packing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from d2c.errors import D2CError
from d2c.latents import LatentSpec
from d2c.picks import Picks
from d2c.tokens import VisionTokens, columns
from d2c.workspace import Workspace
from formats import FormatError, verify
from formats.files import read_json
from formats.hashing import xxh3
from formats.layout import MANIFEST
from formats.schema import RAW, RECIPE, ClassRow, Column, View


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What goes into the artifact, gathered from the stages before."""

    source: str
    codec: str
    size: int
    picks: Picks
    classes: list[dict[str, Any]]
    fields: dict[str, Any]
    """Manifest fields that say where everything came from."""
    text: Path | None = None
    views: tuple[View, ...] = ("orig",)
    tokens: VisionTokens | None = None
    token_codec: str = RAW
    rms: np.ndarray[Any, Any] | None = None
    """The tokens' channel rms where it is given and not measured, float32 [D]."""
    licence: Mapping[str, str] = field(default_factory=dict)
    """Licence notes that come with the contents, and go before those of the packer."""
    judge: Callable[[pa.Table], dict[str, Any]] | None = None
    """Has the last word before the artifact is put in its place: gets its index, gives more manifest fields."""
    unscored: bool = False
    """The images were never read before: an unreadable one is left out, not an error."""

    @property
    def latent(self) -> LatentSpec:
        return LatentSpec.from_dict(self.fields["latent"])

    @property
    def token_column(self) -> str:
        return str(self.fields["encoders"]["vision"]["column"])

    @property
    def coded(self) -> bool:
        """Whether there are vision tokens whose codec needs an rms."""
        return self.tokens is not None and self.token_codec != RAW

    @property
    def columns(self) -> list[Column]:
        tokens = self.tokens
        vision = (self.token_column, self.token_codec, tokens.shape, tokens.class_token) if tokens else None
        return columns(self.latent, self.views, vision)

    def class_rows(self, labels: np.ndarray[Any, Any]) -> list[ClassRow]:
        """The artifact's classes, with their prompts and with their counts among ``labels`` [N]."""
        counts = np.bincount(labels, minlength=len(self.classes)).tolist()
        prompts = read_json(self.text / "prompts.json") if self.text else [""] * len(self.classes)
        return [
            ClassRow(row["id"], row["name"], row["source_id"], prompts[row["id"]], counts[row["id"]])
            for row in self.classes
        ]

    def class_tables(self) -> dict[str, np.ndarray[Any, Any]]:
        """Text embeddings and their mask, by class; empty where no text is attached."""
        if self.text is None:
            return {}
        return {name: np.load(self.text / f"{name}.npy", allow_pickle=False) for name in ("text_embeds", "text_mask")}

    def storage_order(self, seed: int) -> list[int]:
        """Rows of ``picks`` by a hash of their keys: a sequential reader meets mixed classes."""
        draws = [xxh3(f"pack\0{seed}\0{key}".encode()) for key in self.picks.keys]
        return sorted(range(len(draws)), key=draws.__getitem__)

    @property
    def bytes(self) -> int:
        """Payload bytes of the finished artifact."""
        return len(self.picks) * sum(column.nbytes for column in self.columns)


def packed_from(out: Path) -> dict[str, Any] | None:
    """What the artifact at ``out`` was packed from, empty where it does not say; None where there is none."""
    manifest = out / MANIFEST
    if not manifest.exists():
        return None
    if not verify(out, "quick").ok:
        return {"inputs": {"the artifact's files": "damaged"}}
    value = read_json(manifest).get("packed_from")
    return value if isinstance(value, dict) else {}


def check_own(workspace: Workspace, out: Path, container: str) -> None:
    """What `pack` replaces without being told to: an artifact of this workspace, and no arrays by a recipe.

    Raises:
        D2CError: something else is at ``out``.
    """
    manifest = out / MANIFEST
    if not manifest.exists():
        return
    hint = "choose another folder with --out, or replace it with --overwrite"
    try:
        kind = read_json(manifest)["container"]["kind"]
    except (FormatError, KeyError, TypeError) as error:
        raise D2CError("the manifest of the artifact that is here cannot be read", where=manifest, hint=hint) from error
    if not workspace.has_packed(manifest):
        raise D2CError("there is an artifact here that was not packed from this workspace", where=out, hint=hint)
    if container == RECIPE and kind != RECIPE:
        raise D2CError(
            "a recipe would take the place of an artifact",
            where=out,
            found="an artifact with its arrays",
            hint=hint,
        )
