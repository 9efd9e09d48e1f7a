"""What can be wrong with bytes on disk, said in one shape: what, where, found, expected, what to try."""

from __future__ import annotations

from pathlib import Path


class FormatError(Exception):
    """A file or directory is not what its format says it must be.

    Every part but ``what`` is optional; ``str(error)`` joins the parts that are there, one a line.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | Path | None = None,
        found: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.found = None if found is None else str(found)
        self.expected = None if expected is None else str(expected)
        self.hint = hint
        parts = [("where", self.where), ("found", self.found), ("expected", self.expected), ("try", hint)]
        super().__init__("\n".join([what, *(f"  {name}: {value}" for name, value in parts if value)]))


class IntegrityError(FormatError):
    """Bytes differ from what their manifest promises: corrupt, missing, added or unsafe."""


class VersionError(FormatError):
    """The data is sound but newer than this reader, or needs a feature it lacks."""
