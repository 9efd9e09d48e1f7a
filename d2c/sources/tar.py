"""Pictures in tar files: a packed folder tree, or webdataset shards with ``.cls`` members."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from d2c.errors import D2CError
from d2c.images import IMAGE_SUFFIXES, BadImage
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
)
from d2c.sources.imagenet import names_beside


@dataclass(frozen=True)
class _Member:
    name: str
    file: int
    offset: int
    size: int
    mtime: int


@dataclass
class _Scan:
    members: dict[str, _Member] = field(default_factory=dict)
    labels: dict[str, _Member] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    bad: list[BadFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def exclude(self, name: str, reason: str) -> None:
        self.bad.append(BadFile(printable(name), "scan", reason))


@dataclass(frozen=True)
class _TarReader:
    files: Sequence[Path]
    places: npt.NDArray[np.int64]  # [N, 3]: file, offset, bytes

    def read(self, index: int) -> bytes:
        file, offset, size = self.places[index].tolist()
        with self.files[file].open("rb") as stream:
            stream.seek(offset)
            data: bytes = stream.read(size)
        if len(data) != size:
            raise BadImage(f"{self.files[file].name} ends inside this member: {len(data)} of {size} bytes")
        return data

    def positions(self) -> npt.NDArray[np.int64]:
        # 2**46 bytes is more than one tar file holds and leaves room for 100,000 of them.
        return (self.places[:, 0] << 46) | self.places[:, 1]


def open_tar(path: Path, files: Sequence[Path], labels: Labels) -> Source:
    """Index the members of one tar file or several; reads headers and ``.cls`` members only.

    With ``.cls`` members the key is the name up to its first dot and the label what ``.cls`` says. Else the
    common leading folders are dropped and the first folder left is the class (the last one dropped where
    none is left; the file's stem where several tars hold bare files).

    Raises:
        D2CError: compressed or damaged tar, or no pictures.
    """
    scan = _Scan()
    for number, file in enumerate(files):
        _index(scan, files, number, file)
    labelled = labels == "source"
    chosen = _by_sidecar(scan, files, labelled) if scan.labels else _by_folder(scan, files, labelled)
    if not chosen:
        raise no_images(path, scan.bad)
    present = _sorted_labels({label for _, label in chosen.values()})
    names = names_beside(files[0].parent, present)
    classes, imagenet_ids = build_classes([(label, label) for label in present], scan.notes, names)
    if labelled and len(classes) == 1:
        scan.notes.append(f"one class only: {classes[0].name}")
    ids = {label: i for i, label in enumerate(present)}
    found = list(chosen)
    keys = [found[i] for i in key_order(found)]
    members = [chosen[key][0] for key in keys]
    numbers = np.array([ids[chosen[key][1]] for key in keys], dtype=np.int32)
    return Source(
        location=str(path.resolve()),
        kind="tar",
        keys=keys,
        labels=numbers,
        classes=classes,
        bad=tuple(sorted(scan.bad, key=lambda entry: entry.key)),
        notes=tuple(scan.notes),
        digest=digest_lines(keys, numbers, (file_stamp(m.size, m.mtime) for m in members), classes),
        stamp=lambda index: file_stamp(members[index].size, members[index].mtime),
        imagenet_ids=imagenet_ids,
        reader=_TarReader(files, np.array([(m.file, m.offset, m.size) for m in members], dtype=np.int64)),
    )


def _index(scan: _Scan, files: Sequence[Path], number: int, file: Path) -> None:
    changed = file.stat().st_mtime_ns
    try:
        for info in _headers(file):
            parts = PurePosixPath(info.name).parts
            parts = parts[1:] if parts[:1] == ("/",) else parts
            if info.isdir() or not parts or any(hidden_folder(part) for part in parts[:-1]):
                continue
            name = "/".join(parts)
            # Bare members of several tars: the tar's name is the folder they lack, or keeps their keys apart.
            if len(files) > 1 and len(parts) == 1:
                name = f"{file.stem}/{name}"
            _sort_in(scan, info, _Member(name, number, info.offset_data, info.size, changed))
    except (tarfile.TarError, OSError) as error:
        with file.open("rb") as stream:
            packed = stream.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
        raise D2CError(
            "this tar file is compressed" if packed else "this tar file is damaged or not a tar",
            where=file,
            found=error,
            expected="an uncompressed tar, whose members can be read in any order",
            hint="unpack it, or make it again without compression" if packed else "copy or download it again",
        ) from error


def _headers(file: Path) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(file, "r:") as tar:
        while (info := tar.next()) is not None:
            yield info
            # tarfile remembers every header; for a million members that is gigabytes.
            tar.members.clear()  # type: ignore[attr-defined]  # typeshed omits this attribute
        end = tar.offset
    with file.open("rb") as stream:
        stream.seek(end)
        # tarfile takes a broken header after the first for the end of the archive.
        if stream.read(512).strip(b"\0"):
            raise tarfile.ReadError(f"broken header at byte {end}; what follows it cannot be found")


def _sort_in(scan: _Scan, info: tarfile.TarInfo, member: _Member) -> None:
    base = member.name.rpartition("/")[2]
    if base.endswith(".cls") and info.isreg():
        scan.labels[_stem(member.name)] = member
        return
    verdict = triage(base)
    if verdict is None and not info.isreg():
        verdict = "a link inside the tar, not a file"
    elif verdict is None and info.issparse():
        verdict = "a sparse tar member"
    elif verdict is None and info.size == 0:
        verdict = "the file is empty (0 bytes)"
    elif verdict is None and member.name in scan.members:
        verdict = "the name appears again in the tar; the first one is used"
    if verdict is None:
        scan.members[member.name] = member
    elif verdict and PurePosixPath(base).suffix.lower() in IMAGE_SUFFIXES:
        scan.exclude(member.name, verdict)
    elif verdict:
        scan.others[member.name] = verdict


def _stem(name: str) -> str:
    """The key webdataset would use: the path up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".", 1)[0]


def _by_sidecar(scan: _Scan, files: Sequence[Path], labelled: bool) -> dict[str, tuple[_Member, str]]:
    texts = _read_labels(scan.labels, files) if labelled else {}
    chosen: dict[str, tuple[_Member, str]] = {}
    for name, member in scan.members.items():
        key = _stem(name)
        suffix = name.rpartition("/")[2].partition(".")[2]
        if f".{suffix.lower()}" not in IMAGE_SUFFIXES:
            scan.exclude(name, f"a second picture ({suffix}) of the sample")
        elif labelled and key not in texts:
            scan.exclude(name, "no .cls member beside it")
        elif key in chosen:
            scan.exclude(name, f"a second picture of the sample; {chosen[key][0].name} is used")
        else:
            chosen[key] = (member, texts.get(key, ONE_CLASS))
    for name, reason in scan.others.items():
        # webdataset samples carry members of any kind beside their picture.
        if _stem(name) not in chosen:
            scan.exclude(name, reason)
    return chosen


def _read_labels(labels: dict[str, _Member], files: Sequence[Path]) -> dict[str, str]:
    members = sorted(labels.items(), key=lambda item: (item[1].file, item[1].offset))
    texts: dict[str, str] = {}
    for number, file in enumerate(files):
        with file.open("rb") as stream:
            for key, member in members:
                if member.file == number:
                    stream.seek(member.offset)
                    texts[key] = stream.read(member.size).decode("utf-8", "replace").strip()
    return texts


def _sorted_labels(found: set[str]) -> list[str]:
    """Numbers by value where all are numbers, else by UTF-8 bytes."""
    if all(label.isdecimal() for label in found):
        return sorted(found, key=lambda label: (int(label), label))
    return sorted(found)


def _by_folder(scan: _Scan, files: Sequence[Path], labelled: bool) -> dict[str, tuple[_Member, str]]:
    for name, reason in scan.others.items():
        scan.exclude(name, reason)
    names = list(scan.members)
    shared = _shared_folders(names)
    rest = {name: name.split("/")[len(shared) :] for name in names}
    tops = {parts[0] for parts in rest.values() if len(parts) > 1}
    if has_train_split(tops):
        others = sorted(tops - {"train"})
        scan.notes.append("images are read from train/" + (f"; not from {some(others)}" if others else ""))
        rest = {name: parts[1:] for name, parts in rest.items() if parts[0] == "train" and len(parts) > 1}
        tops = {parts[0] for parts in rest.values() if len(parts) > 1}
    flat = shared[-1] if shared else files[0].stem
    chosen: dict[str, tuple[_Member, str]] = {}
    for name, parts in rest.items():
        if not labelled:
            chosen["/".join(parts)] = (scan.members[name], ONE_CLASS)
        elif len(parts) > 1:
            chosen["/".join(parts)] = (scan.members[name], parts[0])
        elif tops:
            scan.exclude(name, "outside any class folder")
        else:
            chosen[parts[0]] = (scan.members[name], flat)
    return chosen


def _shared_folders(names: list[str]) -> list[str]:
    """The folders that all names start with."""
    if not names:
        return []
    # What the first and the last in order share, all between them share.
    first, last = min(name.split("/")[:-1] for name in names), max(name.split("/")[:-1] for name in names)
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return first[:shared]
