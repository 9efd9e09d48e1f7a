"""Which kind of source a path is."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import get_args

from d2c.errors import D2CError, UsageError
from d2c.images import IMAGE_SUFFIXES
from d2c.progress import Progress, Silent
from d2c.remotes.base import shown
from d2c.sources.base import Labels, Source, some
from d2c.sources.folder import open_folder
from d2c.sources.parquet import open_parquet
from d2c.sources.places import local_file, remote_files, url_scheme
from d2c.sources.saved import is_saved, open_saved
from d2c.sources.tar import open_tar

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip", ".7z", ".rar")


def open_source(location: str | Path, progress: Progress | None = None, *, labels: Labels = "source") -> Source:
    """Open a folder tree, Parquet file(s), tar file(s) or a saved ``datasets`` folder; decodes nothing.

    ``location`` is a path, or a URL (s3://, hf://, ...) of Parquet. A folder that holds ``*.parquet`` (itself or in its
    only folder) or ``*.tar`` and no class folders is read as one dataset in parts. With ``labels`` "none" all pictures,
    those without a label too, are of one class.

    Raises:
        UsageError: a URL of an unknown scheme, or unknown ``labels``.
        D2CError: nothing there (with the likely meant name), a kind of file this cannot read, or no pictures.
    """
    if labels not in get_args(Labels):
        raise UsageError("classes cannot come from there", found=labels, expected=" or ".join(get_args(Labels)))
    scheme = url_scheme(location)
    if scheme not in (None, "file"):
        return _open_url(str(location), labels)
    path = Path(str(location).removeprefix("file://"))
    if not path.exists():
        raise _missing(path)
    if path.is_dir():
        return _open_directory(path, labels, progress or Silent())
    name = path.name.lower()
    if name.endswith(".parquet"):
        return open_parquet(str(path.resolve()), [local_file(path)], labels)
    if name.endswith(".tar"):
        return open_tar(path, [path], labels)
    raise D2CError(
        "this file is not a source of images",
        where=path,
        found=path.suffix or "a file without extension",
        expected="a folder of class folders, a .parquet file or an uncompressed .tar file",
        hint=_other_hint(path, name),
    )


def _open_url(url: str, labels: Labels) -> Source:
    if shown(url) != url:
        raise UsageError(
            "this URL holds a name or password, which every later stage would need and the workspace must not keep",
            found=shown(url),
            hint="give them as the store's own configuration or environment variables do",
        )
    files = {name: file for name, file in remote_files(url).items() if file.name.lower().endswith(".parquet")}
    folders = sorted({name.rpartition("/")[0] for name in files})
    if "" not in folders and len(folders) != 1:
        raise D2CError(
            "these folders are several data sets" if folders else "there is no Parquet at this URL",
            where=url,
            found=some(folders) or None,
            expected="a .parquet file, or a folder of them",
            hint=f"give one of the folders, such as {url.rstrip('/')}/{folders[0]}"
            if folders
            else "only Parquet is read in place; copy other files to a local folder",
        )
    chosen = [file for name, file in files.items() if name.rpartition("/")[0] == folders[0]]
    return open_parquet(url.rstrip("/"), chosen, labels)


def _open_directory(path: Path, labels: Labels, progress: Progress) -> Source:
    if is_saved(path):
        return open_saved(path, labels)
    try:
        with os.scandir(path) as entries:
            visible = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
    except OSError as error:
        raise D2CError("this folder cannot be listed", where=path, found=error.strerror) from error
    folders = [name for name, folder in visible if folder]
    if len(folders) <= 1:
        names = [name for name, _ in visible]
        if parts := _with_suffix(path, names, ".parquet") or [p for f in folders for p in _parquet_in(path / f)]:
            return open_parquet(str(path.resolve()), [local_file(part) for part in parts], labels)
        if not folders and (parts := _with_suffix(path, names, ".tar")):
            return open_tar(path, parts, labels)
    return open_folder(path, labels, progress)


def _parquet_in(folder: Path) -> list[Path]:
    try:
        return _with_suffix(folder, sorted(os.listdir(folder)), ".parquet")
    except OSError:
        # Opening it as a folder of pictures will say so.
        return []


def _with_suffix(folder: Path, names: list[str], suffix: str) -> list[Path]:
    return [folder / name for name in names if name.lower().endswith(suffix)]


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
