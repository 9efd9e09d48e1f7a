"""Where things lie in an artifact, and what may lie beside them."""

from __future__ import annotations

import os
import re
from collections.abc import Set as AbstractSet
from pathlib import Path

MANIFEST, SUMS, README = "manifest.json", "SHA256SUMS", "README.md"
INDEX, SELECTION, CLASSES = "meta/samples.parquet", "meta/selection.json", "classes/classes.json"
OWNED = ("shards", "parquet", "meta", "classes", "codec")
"""Folders in which an unlisted file is a fault; elsewhere it is only worth a warning."""

PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".pyd", ".joblib", ".ckpt", ".bin")
"""Ends of names whose files can hold a pickle, which runs code where it is loaded."""

LICENSE = "LICENSE"
"""What a publisher may add by hand."""

UNHASHED = (MANIFEST, SUMS, README, "croissant.json")


def codec_path(column: str, role: str) -> str:
    """Path of an array that decoding ``column`` needs."""
    return f"codec/{column}_{role}.npy"


def unfinished(root: Path) -> dict[str, str] | None:
    """What an interrupted command left beside ``root``, as parts of an error: what is found and what to try."""
    place = Path(os.path.realpath(root))
    beside = set(os.listdir(place.parent)) if place.parent.is_dir() else set()
    swapped = re.compile(rf"\.tmp-\d+-{re.escape(place.name)}\.replaced")
    commands = {f"{place.name}.partial": "d2c pack, repack or rebuild", f"{place.name}.partial-pull": "d2c pull"}
    commands |= {name: "d2c pack, repack, rebuild or pull" for name in sorted(beside) if swapped.fullmatch(name)}
    for name, command in commands.items():
        if name in beside:
            again = f"run the command that was interrupted ({command}) again: it goes on where it stopped"
            return {"found": f"an unfinished one beside it: {name}", "hint": again}
    return None


def unlisted(root: Path, listed: AbstractSet[str], *, everything: bool = False) -> list[str]:
    """Files under ``root`` that the manifest does not list, sorted.

    Hidden names outside the artifact's own folders and a LICENSE are left out, unless ``everything``: they are no
    fault, but somebody's.
    """
    known = UNHASHED if everything else (*UNHASHED, LICENSE)
    found = []
    for folder, folders, files in os.walk(root):
        inside = Path(folder).relative_to(root)
        shown = everything or (inside.parts[:1] and inside.parts[0] in OWNED)
        folders[:] = [name for name in folders if shown or not name.startswith(".")]
        names = [(inside / name).as_posix() for name in files if shown or not name.startswith(".")]
        names += [(inside / name).as_posix() for name in folders if (Path(folder) / name).is_symlink()]
        found += [name for name in names if name not in listed and name not in known]
    return sorted(found)
