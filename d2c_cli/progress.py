"""Progress on stderr: tqdm on a terminal, a plain line every few seconds elsewhere, nothing on other ranks."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import typer

from d2c.progress import Bar, Progress, Silent
from d2c_cli.render import duration, safe, short_size

BYTE = "byte"
"""The unit that is shown as kB, MB and GB."""
EVERY = 5.0
"""Seconds between plain lines."""


def open_progress() -> Progress:
    """The progress for this process: silent unless it is the first of a torchrun job."""
    if os.environ.get("RANK", "0") != "0":
        return Silent()
    return Terminal(tty=sys.stderr.isatty() and os.environ.get("TERM") != "dumb")


@dataclass(frozen=True)
class Terminal:
    """Picklable: it travels to worker processes, which write to the same stderr."""

    tty: bool
    every: float = EVERY

    def bar(self, label: str, total: int, unit: str, done: int = 0) -> Bar:
        return _TtyBar(label, total, unit, done) if self.tty else _PlainBar(label, total, unit, done, self.every)

    def say(self, message: str) -> None:
        _write(safe(message), self.tty)

    def warn(self, message: str) -> None:
        _write(f"warning: {safe(message)}", self.tty)


def _write(line: str, tty: bool) -> None:
    if tty and "tqdm" in sys.modules:
        from tqdm import tqdm

        # Above a bar that is being drawn, not through it.
        tqdm.write(line, file=sys.stderr)
    else:
        typer.echo(line, err=True)


@dataclass
class _TtyBar:
    label: str
    total: int
    unit: str
    done: int
    inner: Any = None

    def __enter__(self) -> Bar:
        from tqdm import tqdm

        self.inner = tqdm(
            total=self.total,
            initial=self.done,
            desc=safe(self.label),
            unit="B" if self.unit == BYTE else f" {self.unit}",
            unit_scale=self.unit == BYTE,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.2,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inner.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        if note:
            self.inner.set_postfix_str(safe(note), refresh=False)
        # The first of several workers counts its own pace for all, which can overshoot at the end.
        self.inner.update(min(count, self.total - self.inner.n))


@dataclass
class _PlainBar:
    label: str
    total: int
    unit: str
    done: int
    every: float
    count: int = 0
    note: str = ""
    started: float = field(default=0.0)
    spoken: float = field(default=0.0)

    def __enter__(self) -> Bar:
        self.count = self.done
        self.started = self.spoken = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.monotonic() - self.started
        stopped = "" if kind is None else ", stopped"
        self._speak(f"in {duration(seconds)}{self._rate(seconds)}{stopped}")

    def advance(self, count: int = 1, note: str = "") -> None:
        self.count = min(self.count + count, self.total)
        self.note = note or self.note
        now = time.monotonic()
        seconds = now - self.started
        # Long jobs speak less often: a log of hours stays readable.
        pause = min(max(self.every, seconds / 12), 12 * self.every)
        if now - self.spoken < pause or self.count == self.total:
            return
        self.spoken = now
        left = (self.total - self.count) * seconds / max(1, self.count - self.done)
        self._speak(f"{100 * self.count // max(1, self.total)} %{self._rate(seconds)}, {duration(left)} left")

    def _rate(self, seconds: float) -> str:
        fresh = self.count - self.done
        if not fresh or not seconds:
            return ""
        rate = fresh / seconds
        if self.unit == BYTE:
            return f", {short_size(rate)}/s"
        return f", {rate:,.0f} {self.unit}/s" if rate >= 10 else f", {rate:.2g} {self.unit}/s"

    def _speak(self, state: str) -> None:
        note = f", {self.note}" if self.note else ""
        done = f"{self.count:,} of {self.total:,} {self.unit}{'es' if self.unit.endswith('s') else 's'}"
        if self.unit == BYTE:
            done = f"{short_size(self.count)} of {short_size(self.total)}"
        typer.echo(safe(f"{self.label}: {done}, {state}{note}"), err=True)
