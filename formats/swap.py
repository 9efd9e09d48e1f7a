"""Put a finished folder in place of another, so that a kill leaves the one or the other."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from formats.files import remove_tree, sync_directory


def swap(finished: Path, place: Path) -> None:
    """Rename ``finished`` to ``place``, then delete what was there; both are absolute and on one file system."""
    replaced = place.with_name(f".tmp-{os.getpid()}-{place.name}.replaced")
    if place.exists():
        os.replace(place, replaced)
    os.replace(finished, place)
    sync_directory(place.parent)
    remove_tree(replaced)


def recover(place: Path) -> None:
    """Tidy up after a `swap` that was killed: put back what was moved away and not replaced, delete what was.

    Only the holder of the lock on ``place`` may call this.
    """
    name = re.escape(place.name)
    moved = re.compile(rf"\.tmp-\d+-{name}\.replaced")
    doomed = re.compile(rf"\.tmp-\d+-(\.tmp-\d+-)?{name}\.(replaced|partial|partial-pull)\.deleted")
    for path in sorted(place.parent.iterdir()):
        if moved.fullmatch(path.name) and not place.exists():
            os.replace(path, place)
        elif moved.fullmatch(path.name) or doomed.fullmatch(path.name):
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
