"""How long jobs tell where they are. The library calls; only the command line prints."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol


class Bar(Protocol):
    """One counted piece of work, used as a context manager."""

    def __enter__(self) -> Bar: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def advance(self, count: int = 1, note: str = "") -> None:
        """``count`` more units are done; ``note`` replaces the text shown behind the bar."""
        ...


class Progress(Protocol):
    """What a stage may say while it works."""

    def bar(self, label: str, total: int, unit: str, done: int = 0) -> Bar:
        """Open a bar of ``total`` units of which ``done`` were finished by an earlier, interrupted run."""
        ...

    def say(self, message: str) -> None:
        """One line that a person should read: a choice made, a part skipped and why."""
        ...

    def warn(self, message: str) -> None:
        """One line that a person must not miss."""
        ...


class _SilentBar:
    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def advance(self, count: int = 1, note: str = "") -> None:
        return None


class Silent:
    """Says nothing: the default of the library and of every rank but the first."""

    def bar(self, label: str, total: int, unit: str, done: int = 0) -> Bar:
        return _SilentBar()

    def say(self, message: str) -> None:
        return None

    def warn(self, message: str) -> None:
        return None
