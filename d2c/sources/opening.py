"""Which kind of source a path is."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from d2c.errors import D2CError
from d2c.images import IMAGE_SUFFIXES
from d2c.progress import Progress, Silent
from d2c.sources.base import Source
from d2c.sources.folder import open_folder
from d2c.sources.parquet import open_parquet
from d2c.sources.tar import open_tar

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip", ".7z", ".rar")


def open_source(path: Path, progress: Progress | None = None) -> Source:
    """Open a folder tree, Parquet file(s) or tar file(s) of pictures; decodes nothing.

    A folder that holds ``*.parquet`` (itself or in ``data/``) or ``*.tar`` and no class folders is read as one
    dataset in parts.

    Raises:
        D2CError: nothing there (with the likely meant name), a kind of file this cannot read, or no pictures.
    """
    if not path.exists():
        raise _missing(path)
    if path.is_dir():
        return _open_directory(path, progress or Silent())
    name = path.name.lower()
    if name.endswith(".parquet"):
        return open_parquet(path, [path])
    if name.endswith(".tar"):
        return open_tar(path, [path])
    raise D2CError(
        "this file is not a source of images",
        where=path,
        found=path.suffix or "a file without extension",
        expected="a folder of class folders, a .parquet file or an uncompressed .tar file",
        hint=_other_hint(path, name),
    )


def _open_directory(path: Path, progress: Progress) -> Source:
    try:
        with os.scandir(path) as entries:
            visible = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
    except OSError as error:
        raise D2CError("this folder cannot be listed", where=path, found=error.strerror) from error
    if any(folder for name, folder in visible if name != "data"):
        return open_folder(path, progress)
    names = [name for name, _ in visible]
    for suffix in (".parquet", ".tar"):
        parts = [path / name for name in names if name.lower().endswith(suffix)]
        if not parts and suffix == ".parquet" and (path / "data").is_dir():
            parts = sorted(part for part in (path / "data").iterdir() if part.suffix.lower() == suffix)
        if parts:
            return open_parquet(path, parts) if suffix == ".parquet" else open_tar(path, parts)
    return open_folder(path, progress)


def _other_hint(path: Path, name: str) -> str:
    if name.endswith(_PACKED):
        return "unpack it first: pictures are read in any order, which a compressed archive does not allow"
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return f"give the folder that holds the pictures: {path.parent}"
    return "give the folder that holds the class folders"


def _missing(path: Path) -> D2CError:
    """Names the first part of ``path`` that is not there and what beside it resembles it."""
    whole = path.absolute()
    gone = next(part for part in [*reversed(whole.parents), whole] if not part.exists())
    try:
        beside = sorted(os.listdir(gone.parent))
    except OSError:
        beside = []
    close = difflib.get_close_matches(gone.name, beside, n=3, cutoff=0.6)
    if close:
        rest = whole.relative_to(gone)
        hint = "did you mean " + " or ".join(os.fspath(gone.parent / name / rest) for name in close) + "?"
    else:
        hint = f"look at what is in {gone.parent}"
    return D2CError("there is nothing at this path", where=path, found=f"{gone} does not exist", hint=hint)
