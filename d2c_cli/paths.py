"""Paths that a person typed: missing ones get a suggestion."""

from __future__ import annotations

import difflib
from pathlib import Path

from d2c.errors import D2CError
from formats.swap import unfinished


def existing(path: Path, what: str, made_by: str) -> Path:
    """``path``, which must exist.

    Raises:
        D2CError: it does not; the message suggests to finish what an interrupted command left beside it, else the
            nearest sibling, else the command that makes it.
    """
    if path.exists():
        return path
    if left := unfinished(path):
        raise D2CError(f"there is no finished {what} here", where=path, **left)
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6)
    hint = f"did you mean {path.parent / close[0]}?" if close else f"make it with: {made_by}"
    raise D2CError(f"there is no {what} here", where=path, hint=hint)


def quoted(path: str | Path) -> str:
    """``path`` as a shell would take it back."""
    import shlex

    return shlex.quote(str(path))
