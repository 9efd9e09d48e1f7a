"""Vision encoders as a workspace knows them: their names, the identity of their weights, and the scorer among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2c.labelling import reopen
from d2c.latents import open_codec
from d2c.picks import class_indices
from d2c.scorers import load_denoiser
from d2c.sources import Source
from d2c.vision import VisionEncoder, open_vision
from d2c.workspace import Workspace
from formats.hashing import xxh3_json, xxh3_lines

Array = np.ndarray[Any, np.dtype[np.int64]]


def is_scorer(vision: str | None) -> bool:
    """Whether an encoder's name means the scorer."""
    return vision is not None and vision.partition(":")[0] == "scorer"


def slug(encoder: str, asked: dict[str, Any]) -> str:
    """A folder name for an encoder: readable, and different for different settings."""
    readable = "".join(c if c.isalnum() else "-" for c in encoder.rsplit("/", maxsplit=1)[-1].lower())[:24].strip("-")
    return f"{readable}-{xxh3_json(asked)[:6]}"


def weights_stamp(encoder: str | None) -> str:
    """Changes when a weights file or folder that an encoder's name points to does; empty for what the hub keeps."""
    # The first word names the family, even where a folder of that name lies about.
    paths = [Path(part).expanduser() for part in (encoder or "").split(":")[1:] if part]
    files = [
        file for path in paths if path.exists() for file in ([path] if path.is_file() else sorted(path.rglob("*")))
    ]
    stamps = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return xxh3_lines(stamps) if stamps else ""


def public_name(encoder: str) -> str:
    """The encoder's name as it goes into artifacts: without the place of its weights on this machine."""
    family, *parts = encoder.split(":")
    return ":".join([family, *(part for part in parts if not Path(part).expanduser().exists())])


def open_for_scores(
    vision: str, grid: int, workspace: Workspace, device: torch.device, seed: int
) -> tuple[Source, VisionEncoder, Array]:
    """The scored source, an encoder for its images, and the class index that the encoder wants for each class."""
    source, scores = reopen(workspace), workspace.scores.require("d2c score DIR")
    if not is_scorer(vision):
        return source, open_vision(vision, grid, device), np.arange(len(source.classes), dtype=np.int64)
    facts = scores.summary["scorer"]
    denoiser = load_denoiser(workspace.recall(facts["spec"]), device=device, objective=scores.config["objective"])
    codec = open_codec(scores.config["codec"], scores.config["size"], device)
    encoder = open_vision(vision, grid, device, scorer=denoiser, codec=codec, seed=seed)
    known = facts.get("classes")
    return source, encoder, class_indices(source, denoiser) if known is None else np.array(known, dtype=np.int64)
