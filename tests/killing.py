"""Run a library call in a process of its own and kill it, as `kill -9` would, at a chosen moment."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d2c.progress import Bar, Silent

ROOT = Path(__file__).resolve().parent.parent


class _FatalBar:
    def __init__(self, progress: Fatal, inner: Bar) -> None:
        self.progress, self.inner = progress, inner

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def advance(self, count: int = 1, note: str = "") -> None:
        self.progress.left -= count
        if self.progress.left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Fatal(Silent):
    """Progress that kills its process once ``left`` units of ``label`` are done."""

    def __init__(self, label: str, left: int) -> None:
        self.label, self.left = label, left

    def bar(self, label: str, total: int, unit: str, done: int = 0) -> Bar:
        inner = super().bar(label, total, unit, done)
        return _FatalBar(self, inner) if label == self.label else inner


def run_and_kill(function: Callable[..., Any], argument: Any, label: str, after: int) -> None:
    """Call ``function(argument, progress)`` in a new process that dies after ``after`` units of the bar ``label``."""
    code = (
        "import pickle, sys\n"
        "function, argument, progress = pickle.loads(sys.stdin.buffer.read())\n"
        "function(argument, progress)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps((function, argument, Fatal(label, after))),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
