"""What every image source offers, whatever its container: keys, labels, classes, and the bytes of any picture."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from d2c.errors import D2CError
from d2c.images import IMAGE_SUFFIXES, BadImage
from d2c.sources.imagenet import imagenet_note, imagenet_order
from formats.hashing import xxh3_array, xxh3_lines

Kind = Literal["folder", "parquet", "tar", "dataset"]
Labels = Literal["source", "none"]
"""Where classes come from: from the source itself, or nowhere, so that all pictures are of one class."""

ONE_CLASS = "image"
"""The only class of a source that is read without labels."""

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

    location: an absolute path or a URL, fit for `open_source`; labels: int32 [N] class ids; imagenet_ids: int64 [C]
    class id -> official ImageNet-1k index, or None where the classes are not ImageNet synsets; digest: identity from
    keys, labels, and each file's ETag or its size and modification time.
    """

    location: str
    kind: Kind
    keys: list[str]
    labels: npt.NDArray[np.int32]
    classes: tuple[SourceClass, ...]
    bad: tuple[BadFile, ...]
    notes: tuple[str, ...]
    digest: str
    imagenet_ids: npt.NDArray[np.int64] | None
    reader: Reader
    stamp: Callable[[int], str]
    """Text that changes when the file that picture ``index`` lies in does."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def name(self) -> str:
        """The last part of the location."""
        return self.location.rstrip("/").rpartition("/")[2]

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


def relabel(source: Source, labels: npt.NDArray[np.integer[Any]], names: Sequence[str]) -> Source:
    """``source`` with other classes: ``labels`` [N] are indices into ``names``, as are the new class ids.

    Raises:
        ValueError: ``labels`` has another length than the source, or a value that names no class.
    """
    if labels.shape != (len(source),):
        raise ValueError(f"{labels.shape} labels for {len(source)} pictures")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
        raise ValueError(f"labels {labels.min()}..{labels.max()} for {len(names)} classes")
    numbers = labels.astype(np.int32)
    classes = tuple(SourceClass(i, name, name) for i, name in enumerate(names))
    digest = xxh3_lines([source.digest, *names, xxh3_array(numbers)])
    return replace(source, labels=numbers, classes=classes, imagenet_ids=None, digest=digest)


def key_order(keys: Sequence[str]) -> list[int]:
    """Indices that sort ``keys`` by their UTF-8 bytes."""
    # Code-point order, which Python compares by, is UTF-8 byte order.
    return sorted(range(len(keys)), key=keys.__getitem__)


def build_classes(
    ordered: Sequence[tuple[str, str]], notes: list[str], names: Mapping[str, str] | None = None
) -> tuple[tuple[SourceClass, ...], npt.NDArray[np.int64] | None]:
    """Number (source_id, name) pairs as given; ImageNet synsets get their English name and official index.

    ``names``: synset -> name, where a file beside the data gives them. What is odd about the classes goes to ``notes``.
    """
    names = names or {}
    ids = [source_id for source_id, _ in ordered]
    official = imagenet_order(ids)
    if note := imagenet_note(ids):
        notes.append(note)
    if official is None:
        return tuple(SourceClass(i, names.get(own, name), own) for i, (own, name) in enumerate(ordered)), None
    classes = tuple(
        SourceClass(i, names.get(known.source_id, known.name), known.source_id) for i, known in enumerate(official)
    )
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


def no_images(path: str | Path, bad: Sequence[BadFile]) -> D2CError:
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
