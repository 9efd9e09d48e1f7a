"""Pictures in a folder tree: the first level of folders are the classes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from d2c.progress import Progress
from d2c.sources.base import (
    ONE_CLASS,
    BadFile,
    Labels,
    Source,
    build_classes,
    digest_lines,
    file_stamp,
    has_train_split,
    hidden_folder,
    key_order,
    no_images,
    printable,
    some,
    triage,
    unsafe_name,
)
from d2c.sources.imagenet import imagenet_pictures, names_beside

# Scanning waits for the file system, on network mounts a millisecond a file; threads wait together.
_SCAN_THREADS = 8


@dataclass(frozen=True)
class _FolderReader:
    base: Path
    keys: list[str]

    def read(self, index: int) -> bytes:
        return (self.base / self.keys[index]).read_bytes()

    def positions(self) -> npt.NDArray[np.int64]:
        return np.arange(len(self.keys), dtype=np.int64)


@dataclass
class _Found:
    keys: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    mtimes: list[int] = field(default_factory=list)
    bad: list[BadFile] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    def exclude(self, key: str, reason: str) -> None:
        self.bad.append(BadFile(printable(key), "scan", reason))

    def add(self, other: _Found) -> None:
        self.keys += other.keys
        self.sizes += other.sizes
        self.mtimes += other.mtimes
        self.bad += other.bad


def open_folder(path: Path, labels: Labels, progress: Progress) -> Source:
    """Scan ``path`` once: classes are its first-level folders, deeper files belong to their first-level folder.

    ``train/`` is used when it stands alone or beside other splits (val, test, ...), and in an unpacked ImageNet. A
    folder of pictures without class folders is one class. Hidden files and text beside pictures are passed over;
    every other file that is not used is in ``bad``.

    Raises:
        D2CError: no pictures.
    """
    base, notes, bad = imagenet_pictures(path) or path, list[str](), list[BadFile]()
    top = _list(base, "")
    if has_train_split(top.folders):
        others = sorted(set(top.folders) - {"train"})
        bad += top.bad + [BadFile(key, "scan", "outside train/") for key in top.keys]
        base = base / "train"
        notes.append(
            f"images are read from {base.relative_to(path).as_posix()}/"
            + (f"; not from {', '.join(others)}" if others else "")
        )
        top = _list(base, "")
    found = _scan_classes(base, top.folders, progress)
    bad += top.bad + [entry for got in found for entry in got.bad]
    if labels == "none":
        for got in found:
            top.add(got)
        if not top.keys:
            raise no_images(path, bad)
        return _assemble(path, base, [(ONE_CLASS, top)], bad, notes)
    pairs = [(name, got) for name, got in zip(top.folders, found, strict=True) if got.keys]
    empty = [name for name, got in zip(top.folders, found, strict=True) if not got.keys]
    if empty:
        notes.append(f"{len(empty)} class folders without images: {some(empty)}")
    if pairs:
        bad += [BadFile(key, "scan", "outside any class folder") for key in top.keys]
    elif top.keys:
        pairs = [(path.resolve().name or "images", top)]
    else:
        raise no_images(path, bad)
    if len(pairs) == 1:
        name, got = pairs[0]
        deeper = any(key.count("/") > 1 for key in got.keys)
        notes.append(
            f"one class only: {name}" + (f"; if its sub-folders are classes, give {base / name}" if deeper else "")
        )
    return _assemble(path, base, pairs, bad, notes)


def _scan_classes(base: Path, folders: list[str], progress: Progress) -> list[_Found]:
    with ThreadPoolExecutor(_SCAN_THREADS) as pool, progress.bar("scan", len(folders), "folder") as bar:
        results = []
        for found in pool.map(lambda name: _scan_tree(base, name), folders):
            results.append(found)
            bar.advance()
        return results


def _assemble(path: Path, base: Path, pairs: list[tuple[str, _Found]], bad: list[BadFile], notes: list[str]) -> Source:
    names = [name for name, _ in pairs]
    classes, imagenet_ids = build_classes([(name, name) for name in names], notes, names_beside(base, names))
    keys = [key for _, got in pairs for key in got.keys]
    order = key_order(keys)
    keys = [keys[i] for i in order]
    labels = np.repeat(np.arange(len(pairs), dtype=np.int32), [len(got.keys) for _, got in pairs])[order]
    sizes = np.array([size for _, got in pairs for size in got.sizes], dtype=np.int64)[order]
    mtimes = np.array([mtime for _, got in pairs for mtime in got.mtimes], dtype=np.int64)[order]
    stamps = map(file_stamp, sizes.tolist(), mtimes.tolist())
    return Source(
        location=str(path.resolve()),
        kind="folder",
        keys=keys,
        labels=labels,
        classes=classes,
        bad=tuple(sorted(bad, key=lambda entry: entry.key)),
        notes=tuple(notes),
        digest=digest_lines(keys, labels, stamps, classes),
        imagenet_ids=imagenet_ids,
        reader=_FolderReader(base, keys),
        stamp=lambda index: file_stamp(int(sizes[index]), int(mtimes[index])),
    )


def _scan_tree(base: Path, name: str) -> _Found:
    total = _Found()
    root = _identity(base / name)
    stack = [(name, frozenset() if root is None else frozenset({root}))]
    while stack:
        relative, above = stack.pop()
        got = _list(base, relative)
        total.add(got)
        for folder in got.folders:
            identity = _identity(base / folder)
            if identity in above:
                total.exclude(folder, "a symbolic link to a folder above it")
            else:
                stack.append((folder, above if identity is None else above | {identity}))
    return total


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        seen = folder.stat()
    except OSError:
        return None
    return seen.st_dev, seen.st_ino


def _list(base: Path, relative: str) -> _Found:
    """One folder's pictures and sub-folders, as keys relative to ``base``."""
    found = _Found()
    try:
        for entry in _entries(base / relative):
            key = f"{relative}/{entry.name}" if relative else entry.name
            try:
                _sort_in(found, entry, key)
            except FileNotFoundError:
                found.exclude(key, "a symbolic link to nothing")
            except OSError as error:
                found.exclude(key, f"cannot be read: {error.strerror or error}")
    except OSError as error:
        found.exclude(relative or os.fspath(base), f"cannot list the folder: {error.strerror or error}")
    found.folders.sort()
    return found


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from entries


def _sort_in(found: _Found, entry: os.DirEntry[str], key: str) -> None:
    verdict = triage(entry.name)
    if entry.is_dir():
        if hidden_folder(entry.name):
            return
        if reason := unsafe_name(entry.name):
            found.exclude(key, f"{reason}; nothing in this folder is used")
        elif verdict is None:
            found.exclude(key, "a folder with the name of an image file")
        else:
            found.folders.append(key)
    elif verdict is None:
        seen = entry.stat()
        if not stat.S_ISREG(seen.st_mode):
            found.exclude(key, "not a regular file")
        elif seen.st_size == 0:
            found.exclude(key, "the file is empty (0 bytes)")
        else:
            found.keys.append(key)
            found.sizes.append(seen.st_size)
            found.mtimes.append(seen.st_mtime_ns)
    elif verdict:
        found.exclude(key, verdict)
