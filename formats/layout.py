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


_SUM = re.compile(r"([0-9a-f]{64})  (.+)")
_SHARDS = ("shards/train-*-of-*.tar", "parquet/train-*-of-*.parquet")


def read_sums(root: Path) -> tuple[dict[str, str], int]:
    """SHA256SUMS: (sha256 by path, lines that are malformed or repeated)."""
    *lines, rest = (root / SUMS).read_bytes().decode("utf-8", "replace").split("\n")
    matches = [_SUM.fullmatch(line) for line in lines]
    sums = {match[2]: match[1] for match in matches if match}
    return sums, len(lines) - len(sums) + bool(rest)


def remains(root: Path) -> bool:
    """Whether something of an artifact lies here, although its manifest does not."""
    # Other people's folders hold a SHA256SUMS or folders of these names too; ours often hold an artifact `shards/`.
    if any((root / name).is_file() for name in (INDEX, SELECTION, CLASSES)) or any(any(root.glob(s)) for s in _SHARDS):
        return True
    return (root / SUMS).is_file() and MANIFEST in read_sums(root)[0]


def codec_path(column: str, role: str) -> str:
    """Path of an array that decoding ``column`` needs."""
    return f"codec/{column}_{role}.npy"


def licence_text(root: Path) -> bytes | None:
    """The LICENSE that somebody put beside the artifact at ``root``; None where there is none."""
    path = root / LICENSE
    return path.read_bytes() if path.is_file() and not path.is_symlink() else None


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
