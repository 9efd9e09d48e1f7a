"""What every store can do, and how it fails.

A store knows names and bytes. Of artifacts it knows only that `manifest.json` makes one: where files are replaced one
by one, an old manifest goes first and the new one comes last, so that no reader sees one that lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from d2c.errors import D2CError
from formats.errors import FormatError
from formats.layout import README

EXTRAS = (README, "croissant.json", "LICENSE")
"""Files that belong to a published artifact though no hash covers them."""


class NotThereError(D2CError):
    """The store has no such file, or there is no such store."""


class UnavailableError(D2CError):
    """The store did not answer as it should; it may do so later."""


@dataclass(frozen=True)
class Outgoing:
    """A local file and the name it gets in the store."""

    name: str
    path: Path
    bytes: int
    sha256: str


class Store(Protocol):
    """A place with files, named by paths relative to it. Every method raises D2CError where the place refuses."""

    @property
    def url(self) -> str: ...

    @property
    def revision(self) -> str | None:
        """The commit that is read, or that was made; None where the store has no history."""
        ...

    def files(self) -> dict[str, int]:
        """Name -> bytes of the files that an artifact may consist of; empty where there is nothing yet.

        Raises:
            D2CError: there can be nothing, since a bucket is missing or a file stands where the folder should be.
        """
        ...

    def holds(self, file: Outgoing) -> bool:
        """Whether the store's file of this name, known to have the right size, has these bytes."""
        ...

    def read(self, name: str, start: int, end: int) -> bytes:
        """The bytes [start, end) of a file; fewer only where it ends before.

        Raises:
            NotThereError: there is no such file.
            UnavailableError: trying again may help.
        """
        ...

    def send(self, files: Sequence[Outgoing], stale: Sequence[str], sent: Callable[[int], None]) -> None:
        """Store ``files``, in the order given, and remove ``stale``; ``sent`` is told the bytes of each file."""
        ...


def known_inside(error: BaseException) -> FormatError | None:
    """A failure of our own, such as a signal's, that a library has wrapped into one of its errors."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, FormatError):
            return inner
        inner = inner.__cause__
    return None


def first_line(error: BaseException) -> str:
    """An error's type and the first thing it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
