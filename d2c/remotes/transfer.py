"""What publishing and fetching share: the account of a transfer, and the check that stands before and after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d2c.progress import Progress
from formats import verify
from formats.errors import FormatError
from formats.files import read_json
from formats.layout import MANIFEST
from formats.report import Report

_MOST_SHOWN = 3


@dataclass(frozen=True)
class Transfer:
    """``files`` of ``transfer_bytes`` travelled, ``skipped`` were there already. ``place`` is where all are now."""

    place: str
    content_id: str
    root: str
    """sha256 of SHA256SUMS: whoever has it from a trusted place can prove every file but the card."""
    bytes: int
    """Of the artifact, as `formats.describe` counts them."""
    files: int
    transfer_bytes: int
    skipped: int
    revision: str | None
    """The commit, where the other side is a hub."""


def verified(root: Path, progress: Progress) -> Report:
    """The report of `formats.verify` at its default level, with a bar of the bytes read."""
    try:
        size = sum(int(file["bytes"]) for file in read_json(root / MANIFEST)["files"])
    except (FormatError, OSError, KeyError, TypeError, ValueError):
        size = 0  # verification says what is wrong
    with progress.bar("verify", size, "byte") as bar:
        return verify(root, progress=bar.advance)


def some(things: Sequence[object]) -> str:
    """The first few, and how many more there are."""
    shown = "; ".join(str(thing) for thing in things[:_MOST_SHOWN])
    return shown if len(things) <= _MOST_SHOWN else f"{shown}; and {len(things) - _MOST_SHOWN} more"
