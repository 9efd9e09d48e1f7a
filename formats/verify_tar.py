"""Faults of a tar shard, found in its raw headers before anything is used; nothing is extracted, nothing executed."""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from formats.errors import FormatError
from formats.layout import PICKLES
from formats.npy import npy_header, parse_npy_header
from formats.report import Fault
from formats.schema import Column
from formats.shards_tar import members
from formats.tar import BLOCK, LONGEST_NAME, RECORD, padded, tar_header

_SIZE = re.compile(rb"[0-7]{11}\0")
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a folder",
    b"6": "a pipe",
    b"S": "a sparse file",
    b"x": "a PAX header",
    b"g": "a global PAX header",
    b"L": "a GNU long name",
    b"K": "a GNU long link",
}


@dataclass(frozen=True)
class Row:
    """What the index says of one sample of a shard: ``offsets`` of the array bytes, one per column."""

    key: str
    label: int
    info: str
    offsets: list[int]


@dataclass(frozen=True)
class Member:
    """One member: its name, where its header and its data begin, the size of its data, a header of our form or not."""

    name: str
    header: int
    data: int
    size: int
    plain: bool


def walk(data: memoryview, path: str, known: Sequence[int] = ()) -> tuple[list[Member], list[Fault]]:
    """All members of a tar, and every header that breaks a rule.

    ``known`` are positions where the index expects headers, ascending: behind a damaged header the walk goes on there.
    """
    found: list[Member] = []
    faults: list[Fault] = []
    position = 0
    while position + BLOCK <= len(data):
        block = bytes(data[position : position + BLOCK])
        if not any(block):
            return found, faults + _end(data, path, position)
        member = _member(block, position)
        if member is None:
            faults.append(Fault("container", path, (position, position + BLOCK), None, "a damaged header"))
            position = _next(known, position, len(data))
            continue
        end = member.data + padded(member.size)
        faults += _header_faults(block, member, path)
        if end > len(data):
            faults.append(Fault("container", path, (position, len(data)), None, f"{member.name} runs over the end"))
            position = _next(known, position, len(data))
            continue
        if bytes(data[member.data + member.size : end]).strip(b"\0"):
            faults.append(Fault("container", path, (member.data + member.size, end), None, "padding that is not zero"))
        found.append(member)
        position = end
    faults.append(Fault("container", path, (position, len(data)), None, "no end of the archive"))
    return found, faults


def _next(known: Sequence[int], position: int, end: int) -> int:
    place = bisect(known, position)
    return known[place] if place < len(known) else end


def _member(block: bytes, position: int) -> Member | None:
    if not _SIZE.fullmatch(block[124:136]):
        return None
    name, size = block[:LONGEST_NAME].partition(b"\0")[0].decode("ascii", "backslashreplace"), int(block[124:135], 8)
    # Adding up a block takes longer than making the header it should be, whose checksum holds.
    plain = block == tar_header(name, size)
    if not plain and block[148:156] != b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32):
        return None
    return Member(name, position, position + BLOCK, size, plain)


def _header_faults(block: bytes, member: Member, path: str) -> list[Fault]:
    where = (member.header, member.data)
    name = member.name
    faults = []
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        faults.append(Fault("unsafe", path, where, None, f"a member that points outside: {name!r}"))
    if name.endswith(PICKLES):
        faults.append(Fault("unsafe", path, where, None, f"a member that can hold a pickle: {name!r}"))
    if block[156:157] != b"0":
        kind = _KINDS.get(block[156:157], f"type {block[156:157]!r}")
        faults.append(Fault("unsafe", path, where, None, f"{kind}: {name!r}", "a regular file"))
    elif not member.plain:
        faults.append(Fault("container", path, where, None, f"a header of another form: {name!r}"))
    return faults


def _end(data: memoryview, path: str, position: int) -> list[Fault]:
    rest = np.frombuffer(data, np.uint8, offset=position)
    if rest.any():
        first = position + int(np.flatnonzero(rest)[0])
        return [Fault("container", path, (first, len(data)), None, "data behind the end of the archive")]
    if len(data) != (whole := padded(position + 2 * BLOCK, RECORD)):
        return [Fault("container", path, (position, len(data)), None, f"an end at byte {len(data)}", f"byte {whole}")]
    return []


def tar_faults(data: memoryview, path: str, columns: Sequence[Column], rows: Sequence[Row], deep: bool) -> list[Fault]:
    """Faults of a whole shard against its rows of the index: members and their order; ``deep``: what they hold."""
    headers = [npy_header(column.dtype, column.shape) for column in columns]
    known = sorted(o - len(h) - BLOCK for row in rows for o, h in zip(row.offsets, headers, strict=True))
    found, faults = walk(data, path, known)
    expected = [(name, row) for row in rows for name in members(row.key, columns)]
    if [member.name for member in found] != [name for name, _ in expected]:
        faults += _sequence_faults(found, expected, path)
    if deep:
        by_name = {member.name: member for member in found}
        for row in rows:
            faults += _content_faults(data, path, columns, headers, row, by_name)
    return faults


def _sequence_faults(found: list[Member], expected: list[tuple[str, Row]], path: str) -> list[Fault]:
    owner = {name: row.key for name, row in expected}
    faults, seen = [], set()
    for member in found:
        where = (member.header, member.data + member.size)
        if member.name not in owner:
            faults.append(
                Fault("container", path, where, None, f"a member that the index does not know: {member.name}")
            )
        elif member.name in seen:
            faults.append(Fault("container", path, where, owner[member.name], f"a second {member.name}"))
        seen.add(member.name)
    faults += [
        Fault("container", path, None, row.key, "no such member", name) for name, row in expected if name not in seen
    ]
    if not faults:
        place = next(
            i for i, (member, (name, _)) in enumerate(zip(found, expected, strict=True)) if member.name != name
        )
        where = (found[place].header, found[place].data)
        faults.append(
            Fault("container", path, where, None, f"members in another order: {found[place].name}", expected[place][0])
        )
    return faults


def _content_faults(
    data: memoryview,
    path: str,
    columns: Sequence[Column],
    headers: Sequence[bytes],
    row: Row,
    by_name: dict[str, Member],
) -> list[Fault]:
    faults = []
    names = members(row.key, columns)
    for name, wanted in zip(names[:2], (str(row.label).encode(), row.info.encode()), strict=True):
        member = by_name.get(name)
        if member is not None and bytes(data[member.data : member.data + member.size]) != wanted:
            where = (member.data, member.data + member.size)
            faults.append(Fault("value", path, where, row.key, f"{name} that differs from the index"))
    for name, column, header, offset in zip(names[2:], columns, headers, row.offsets, strict=True):
        member = by_name.get(name)
        if member is None:
            continue
        where = (member.data, member.data + len(header))
        if bytes(data[slice(*where)]) != header or member.size != len(header) + column.nbytes:
            faults.append(_npy_fault(data, path, member, row.key, column))
        elif member.data + len(header) != offset:
            faults.append(Fault("index", path, where, row.key, f"data at byte {where[1]}", f"byte {offset}"))
    return faults


def _npy_fault(data: memoryview, path: str, member: Member, key: str, column: Column) -> Fault:
    where = (member.data, member.data + member.size)
    content = data[slice(*where)]
    try:
        dtype, shape, _ = parse_npy_header(content[:1024], member.size, member.name)
    except FormatError as error:
        return Fault("unsafe", path, where, key, f"{error.what}: {error.found}", error.expected)
    return Fault("container", path, where, key, f"{dtype} {shape}", f"{column.dtype} {column.shape}")
