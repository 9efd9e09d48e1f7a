"""Put a finished folder in place of another, so that a kill leaves the one or the other."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from formats.files import remove_tree, sync_directory
from formats.lock import WriterLock

ARTIFACT = "artifact"
"""The folder in a writer's NAME.partial that is swapped when it is whole."""


def swap(finished: Path, place: Path) -> None:
    """Rename ``finished`` to ``place``, then delete what was there; both are absolute and on one file system."""
    replaced = place.with_name(f".tmp-{os.getpid()}-{place.name}.replaced")
    if place.exists():
        os.replace(place, replaced)
    os.replace(finished, place)
    sync_directory(place.parent)
    remove_tree(replaced)


def leftovers(place: Path) -> list[Path]:
    """What a `swap` that was killed has left beside ``place``: what it moved away, and what it was deleting."""
    name = re.escape(place.name)
    moved = rf"\.tmp-\d+-{name}\.replaced"
    doomed = rf"\.tmp-\d+-(\.tmp-\d+-)?{name}\.(replaced|partial|partial-pull)\.deleted"
    return [path for path in sorted(place.parent.iterdir()) if re.fullmatch(f"{moved}|{doomed}", path.name)]


def unfinished(root: Path) -> dict[str, str] | None:
    """What an interrupted command left beside ``root``, as parts of an error: what is found and what to try."""
    place = root.resolve()
    beside = {path.name for path in place.parent.iterdir()} if place.parent.is_dir() else set()
    commands = {f"{place.name}.partial": "d2c pack, repack or rebuild", f"{place.name}.partial-pull": "d2c pull"}
    moved = [path.name for path in leftovers(place) if path.suffix == ".replaced"] if beside else []
    commands |= dict.fromkeys(moved, "d2c pack, repack, rebuild or pull")
    for name, command in commands.items():
        if name in beside:
            again = f"run the command that was interrupted ({command}) again: it goes on where it stopped"
            return {"found": f"an unfinished one beside it: {name}", "hint": again}
    return None


def recover(place: Path) -> None:
    """Tidy up after a `swap` that was killed: put back what was moved away and not replaced, delete what was.

    Only the holder of the lock on ``place`` may call this.
    """
    for path in leftovers(place):
        if path.suffix == ".replaced" and not place.exists():
            os.replace(path, place)
        else:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)


def tidy(place: Path) -> None:
    """Remove what a writer that was killed just after its swap has left; work that can be finished stays.

    Raises:
        FormatError: another process writes to ``place``.
    """
    partial = place.with_name(f"{place.name}.partial")

    def swapped() -> bool:
        return partial.exists() and not (partial / ARTIFACT).exists()

    if not leftovers(place) and not swapped():
        return
    lock = WriterLock(place.with_name(f"{place.name}.lock"))
    try:
        recover(place)
        if swapped():
            remove_tree(partial)
    finally:
        lock.release()
