"""One step of a longer way: whether it ran, why, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from d2c.progress import Progress

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """One stage of a pipeline: whether it ran, and why."""

    stage: str
    ran: bool
    reasons: list[str]
    seconds: float
    facts: dict[str, Any]

    def telling(self, facts: dict[str, Any]) -> Step:
        """The same, with what there is to tell of it."""
        return replace(self, facts=facts)


def run_step(stage: str, reasons: list[str], action: Callable[[], T], progress: Progress) -> tuple[T, Step]:
    """Say what happens and why, do it, and time it."""
    progress.say(f"{stage}: running ({'; '.join(reasons)})" if reasons else f"{stage}: up to date")
    start = time.perf_counter()
    result = action()
    return result, Step(stage, bool(reasons), reasons, round(time.perf_counter() - start, 2), {})
