"""What every store can do, and how it fails.

A store knows names and bytes. Of artifacts it knows only that `manifest.json` makes one: where files are replaced one
by one, an old manifest goes first and the new one comes last, so that no reader sees one that lies.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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

    def holds(self, file: Outgoing, *, closely: bool = False) -> bool:
        """Whether the store's file of this name, known to have the right size, has these bytes.

        ``closely``: read them, and do not believe what was noted when they were stored.
        """
        ...

    def read(self, name: str, start: int, end: int) -> bytes:
        """The bytes [start, end) of a file; fewer only where it ends before.

        Raises:
            NotThereError: there is no such file.
            UnavailableError: trying again may help.
        """
        ...

    def alone(self) -> AbstractContextManager[None]:
        """Keep other pushes away, where the place can; what a killed one left half written is removed.

        Raises:
            FormatError: another process is pushing there.
        """
        ...

    def send(
        self, files: Sequence[Outgoing], stale: Sequence[str], sent: Callable[[int], None], check: Callable[[], None]
    ) -> None:
        """Store ``files``, in the order given, and remove ``stale``; ``sent`` is told the bytes of each file.

        Where others may write at the same time, ``check`` is called before the manifest, and raises if they did.
        """
        ...

    def withdraw(self) -> None:
        """Remove the manifest, so that nobody reads what is no whole artifact."""
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
    return shown(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


def shown(text: str) -> str:
    """``text`` with every URL in it as it may be seen and kept: without a user's name and password."""
    return re.sub(r"(?<!\bhf)://[^/\s]*@", "://", text)


@contextmanager
def filling(place: Path) -> Iterator[None]:
    """Give a full disk the name of the place that was written to: the system names the source, or nothing."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, str(place)) from error
        raise
