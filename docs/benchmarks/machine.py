"""What a page of figures says of the machine they come from: no names, no paths."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import textwrap
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path


def machine(packages: Sequence[str]) -> str:
    """Two lines or so: date, processor, cores, memory, Python and the versions of ``packages``."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    named = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    versions = [f"{name} {version}" for name in packages if (version := installed(name))]
    text = (
        f"{datetime.now(timezone.utc):%d %B %Y}, {cores} cores ({named[0] if named else platform.machine()}), "
        f"{memory:.0f} GiB, Linux {platform.release().partition('-')[0]}, "
        f"Python {platform.python_version()}, {', '.join(versions)}. Other "
        "work ran beside it."
    )
    return textwrap.fill(text, 120)


def installed(package: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def note(text: str) -> None:
    """Progress, for the person who waits: on stderr, so that stdout is the page alone."""
    print(text, file=sys.stderr, flush=True)


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
