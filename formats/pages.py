"""The pages of a Parquet file, walked before anything is unpacked: how much they will take, and how they are written.

Footers name sizes too, which nothing holds to the truth. A page's own header does: a codec that gets room for
``uncompressed_page_size`` bytes fails where there is more.
"""

from __future__ import annotations

import io
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from formats.errors import FormatError
from formats.thrift import read_struct

DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
PLAIN, DELTA_BYTE_ARRAY = 0, 7
UNCOMPRESSED = 0
_DETAILS = {DATA_PAGE: (5, 2), DICTIONARY_PAGE: (7, 2), DATA_PAGE_V2: (8, 4)}
"""Kind of a page -> field of its own header, and in that of the encoding."""
_MOST = 2**31 - 1
_VALUE = 8
"""Bytes that a value takes in memory at most, besides what a page holds of it."""


@dataclass(frozen=True)
class Page:
    """One page: its bytes in the file, as stored; how many they become; what its header says of its values."""

    kind: int
    start: int
    end: int
    unpacked: int
    values: int
    encoding: int


@contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """The bytes of a file that is not empty."""
    with (
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as held,
        memoryview(held) as data,
    ):
        yield data


def row_groups(metadata: pq.FileMetaData) -> list[Any]:
    """The facts of every column chunk of each row group, by field number.

    Read here, since pyarrow aborts the process where a chunk's facts lie; and from the footer as pyarrow understood and
    writes it, so that both understand the same.
    """
    stream = io.BytesIO()
    metadata.write_metadata_file(stream)
    data = memoryview(stream.getvalue())
    groups = field(read_struct(data, len(data) - 8 - int.from_bytes(data[-8:-4], "little"))[0], 4)
    chunks = [field(group, 1) for group in groups] if isinstance(groups, list) else []
    return [[field(chunk, 3) for chunk in group] if isinstance(group, list) else [] for group in chunks]


def pages(data: memoryview, chunk: Any, where: str) -> Iterator[Page]:
    """Pages of one column chunk, as they lie in the file ``data``.

    Raises:
        FormatError: they do not lie inside the file, or a header is none of a page.
    """
    position, size, dictionary = integer(chunk, 9), integer(chunk, 7), integer(chunk, 11)
    if 0 < dictionary < position:
        position = dictionary
    end = position + size
    if not 0 <= position <= end <= len(data):
        raise FormatError("a column lies outside the file", where=where, found=f"bytes {position} to {end}")
    while position < end:
        header, position = read_struct(data, position)
        kind, unpacked, stored = (integer(header, number) for number in (1, 2, 3))
        own, encoding = _DETAILS.get(kind, (-1, -1))
        details = field(header, own)
        if not isinstance(details, dict) or not 0 <= unpacked <= _MOST or not 0 <= stored <= end - position:
            raise FormatError("a page's header lies", where=where, found=f"page at byte {position}, of kind {kind}")
        page = Page(kind, position, position + stored, unpacked, integer(details, 1), integer(details, encoding))
        yield page
        position = page.end


def memory(path: Path, metadata: pq.FileMetaData) -> int:
    """Bytes of memory that reading the whole file takes at most, but for texts that a dictionary names repeatedly.

    Raises:
        FormatError: the file's pages are not sound, or of an encoding whose values can be longer than their page.
    """
    found = 0
    with mapped(path) as data:
        for number, chunk in ((number, chunk) for group in row_groups(metadata) for number, chunk in enumerate(group)):
            found += _VALUE * max(0, integer(chunk, 5))
            for page in pages(data, chunk, f"{path}: column {number}"):
                if page.encoding == DELTA_BYTE_ARRAY:
                    raise FormatError("a column's texts begin with one another", where=path, found="DELTA_BYTE_ARRAY")
                found += page.unpacked
    return found


def field(fields: Any, number: int) -> Any:
    """Field ``number`` of a struct; None where there is none, or no struct."""
    return fields.get(number) if isinstance(fields, dict) else None


def integer(fields: Any, number: int) -> int:
    """The same for a number; -1 where there is none."""
    value = field(fields, number)
    return value if isinstance(value, int) else -1
