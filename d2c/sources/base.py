"""What every image source offers, whatever its container: keys, labels, classes, and the bytes of any picture."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from d2c.errors import D2CError
from d2c.images import IMAGE_SUFFIXES, BadImage
from d2c.sources.imagenet import imagenet_order
from formats.hashing import xxh3_lines

Kind = Literal["folder", "parquet", "tar"]

_SIDECARS = frozenset(".txt .json .csv .tsv .md .xml".split())
_SIDECAR_NAMES = frozenset({"thumbs.db", "desktop.ini"})
_UNSAFE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_OTHER_SPLITS = frozenset("val valid validation test testing dev eval".split())


@dataclass(frozen=True)
class BadFile:
    """One excluded file: ``stage`` is "scan", "read" or "decode"."""

    key: str
    stage: str
    reason: str


@dataclass(frozen=True)
class SourceClass:
    """One class: ``id`` is 0..C-1, ``source_id`` is what the data calls it, ``name`` is for people and prompts."""

    id: int
    name: str
    source_id: str


class Reader(Protocol):
    """Random access to the bytes behind a source; safe to call from several threads."""

    def read(self, index: int) -> bytes:
        """The bytes of picture ``index``. Raises: OSError, BadImage."""
        ...

    def positions(self) -> npt.NDArray[np.int64]:
        """[N] A number that grows along the storage, for reading with few seeks."""
        ...


@dataclass(frozen=True, eq=False)
class Source:
    """A labelled set of pictures, sorted by the UTF-8 bytes of their keys.

    labels: int32 [N] class ids; imagenet_ids: int64 [C] class id -> official ImageNet-1k index, or None where
    the classes are not ImageNet synsets; digest: identity from keys, labels, sizes and modification times.
    """

    path: Path
    kind: Kind
    keys: list[str]
    labels: npt.NDArray[np.int32]
    classes: tuple[SourceClass, ...]
    bad: tuple[BadFile, ...]
    notes: tuple[str, ...]
    digest: str
    imagenet_ids: npt.NDArray[np.int64] | None
    reader: Reader

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def is_imagenet(self) -> bool:
        """Every class is one of ImageNet-1k's 1,000 synsets."""
        return self.imagenet_ids is not None

    def read(self, index: int) -> bytes:
        """The original bytes of picture ``index``; thread-safe.

        Raises:
            BadImage: the bytes cannot be read; the reason is the operating system's.
        """
        try:
            return self.reader.read(index)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from error

    def storage_order(self) -> npt.NDArray[np.int64]:
        """[N] All indices in the order the bytes lie in the container: the cheap order for one full pass."""
        return np.argsort(self.reader.positions(), kind="stable")


def key_order(keys: Sequence[str]) -> list[int]:
    """Indices that sort ``keys`` by their UTF-8 bytes."""
    # Code-point order, which Python compares by, is UTF-8 byte order.
    return sorted(range(len(keys)), key=keys.__getitem__)


def build_classes(
    ordered: Sequence[tuple[str, str]],
) -> tuple[tuple[SourceClass, ...], npt.NDArray[np.int64] | None]:
    """Number (source_id, name) pairs as given; ImageNet synsets get their English name and official index."""
    official = imagenet_order([source_id for source_id, _ in ordered])
    if official is None:
        return tuple(SourceClass(i, name, source_id) for i, (source_id, name) in enumerate(ordered)), None
    classes = tuple(SourceClass(i, known.name, known.source_id) for i, known in enumerate(official))
    return classes, np.array([known.id for known in official], dtype=np.int64)


def digest_lines(
    keys: Sequence[str], labels: npt.NDArray[np.int32], stamps: Iterable[str], classes: Sequence[SourceClass]
) -> str:
    """xxh3 over "key, label, stamp" lines and the classes; one streaming pass."""

    def lines() -> Iterator[str]:
        for known in classes:
            yield f"class\t{known.id}\t{known.source_id}"
        for key, label, stamp in zip(keys, labels.tolist(), stamps, strict=True):
            yield f"{key}\t{label}\t{stamp}"

    return xxh3_lines(lines())


def file_stamp(size: int, mtime_ns: int) -> str:
    """Text that changes when a file does."""
    return f"{size}\t{mtime_ns}"


def triage(name: str) -> str | None:
    """None for a picture's file name, "" for one to pass over silently, else the reason why it is excluded."""
    if name.startswith("."):
        return ""
    if reason := unsafe_name(name):
        return reason
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - a Path for each of a million names costs seconds
    if suffix in IMAGE_SUFFIXES:
        return None
    if suffix in _SIDECARS or name.lower() in _SIDECAR_NAMES:
        return ""
    return f"unsupported file extension {suffix!r}" if suffix else "no file extension"


def unsafe_name(name: str) -> str | None:
    """Why a name cannot be a key, or None."""
    found = _UNSAFE.search(name)
    if found is None:
        return None
    return "the name is not UTF-8" if found.group() >= "\ud800" else "the name has a control character"


def printable(name: str) -> str:
    """A name fit for a table: undecodable bytes and control characters escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return _UNSAFE.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def hidden_folder(name: str) -> bool:
    """Folders that systems and archivers leave behind."""
    return name.startswith(".") or name == "__MACOSX"


def has_train_split(folders: Iterable[str]) -> bool:
    """``folders`` beside each other are splits, one of them ``train``; a class may be called train as well."""
    names = set(folders)
    return "train" in names and names - {"train"} <= _OTHER_SPLITS


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def no_images(path: Path, bad: Sequence[BadFile]) -> D2CError:
    """The error for a source without one usable picture."""
    found = (
        f"{len(bad)} other files, e.g. {bad[0].key}: {bad[0].reason}" if bad else "nothing that looks like a picture"
    )
    return D2CError(
        "there are no images here",
        where=path,
        found=found,
        expected="pictures (jpg, png, webp, ...) in one folder per class",
        hint="check the path; the folder to give is the one that holds the class folders",
    )
