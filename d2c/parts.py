"""Independent parts with done markers: the one way in which long jobs are shared among processes and resumed.

A part's file *is* its done marker, because it appears whole or not at all. Worker r of W takes every W-th part that is
left; nobody coordinates, so the same code serves one CPU, several GPUs and several nodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2c.errors import D2CError
from d2c.progress import Bar, Progress, Silent
from d2c.runtime import Ranks
from d2c.workspace import Stage


@dataclass(frozen=True)
class Part:
    """A consecutive range of a job's sorted items, and the file that holds its result."""

    number: int
    items: range
    path: Path

    @property
    def done(self) -> bool:
        return self.path.exists()


def split(total: int, step: int, folder: Path, suffix: str) -> list[Part]:
    """Cut ``total`` items into parts of ``step``; the cut depends on nothing else."""
    return [
        Part(number, range(start, min(start + step, total)), folder / f"{number:06d}{suffix}")
        for number, start in enumerate(range(0, total, step))
    ]


@dataclass(frozen=True)
class ToDo:
    """The unfinished parts, listed before any worker starts, so that all share them out alike."""

    parts: list[Part]
    total: int
    done: int

    @staticmethod
    def of(parts: Sequence[Part]) -> ToDo:
        """What is left of ``parts``; counts are items."""
        left = [part for part in parts if not part.done]
        total = sum(len(part.items) for part in parts)
        return ToDo(left, total, total - sum(len(part.items) for part in left))


def work(
    todo: ToDo,
    make: Callable[[Part, Bar], None],
    *,
    ranks: Ranks,
    stage: Stage,
    progress: Progress,
    label: str,
    unit: str = "image",
) -> None:
    """Make this rank's share of the parts. ``make`` writes the part's file and advances the bar by ``unit``s."""
    # Only the first rank shows progress, and counts its own pace for everybody's.
    shown = progress if ranks.main else Silent()
    with shown.bar(label, todo.total, unit, done=todo.done) as bar:
        for part in todo.parts[ranks.rank :: ranks.world]:
            start = time.perf_counter()
            make(part, bar)
            stage.spend(time.perf_counter() - start, part=part.number)


def require_all(parts: Sequence[Part]) -> None:
    """Raise D2CError where a part is missing: a worker died without an error of its own."""
    missing = [part.number for part in parts if not part.done]
    if missing:
        raise D2CError(
            "some parts are not finished",
            where=parts[0].path.parent,
            found=f"{len(missing)} of {len(parts)} missing, the first: {missing[:5]}",
            hint="run the same command again: finished parts are kept",
        )
