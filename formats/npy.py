"""The .npy subset the artifact uses: version 1.0, C order, little-endian numbers. No pickle can hide in it.

Layout: numpy's NEP 1. The header is padded so that data starts at a multiple of 64 bytes.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from formats.errors import FormatError
from formats.files import atomic
from formats.hashing import xxh3_array
from formats.schema import DTYPES, MOST_SIDES, ArrayRecord

_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    rb"\{'descr': '([<|])([a-zA-Z]\d+)', 'fortran_order': (True|False), 'shape': \((\d+,|\d+(?:, \d+)+)\), \} *\n"
)
_LONGEST_HEADER = 512


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The bytes before the data; their length is a multiple of 64."""
    order = "|" if dtype.endswith("1") else "<"
    sides = "".join(f"{side}, " for side in shape) if len(shape) == 1 else ", ".join(map(str, shape))
    literal = f"{{'descr': '{order}{dtype}', 'fortran_order': False, 'shape': ({sides.rstrip(' ')}), }}"
    padding = -(len(_MAGIC) + 2 + len(literal) + 1) % 64
    text = literal + " " * padding + "\n"
    return _MAGIC + len(text).to_bytes(2, "little") + text.encode("ascii")


def parse_npy_header(data: bytes | memoryview, size: int, where: str | Path) -> tuple[str, tuple[int, ...], int]:
    """(dtype, shape, offset of the data) of a .npy of ``size`` bytes that starts with ``data``; evaluates nothing.

    Raises:
        FormatError: another npy version, an object or unknown dtype, Fortran order, or a declared size that is not
            the size of the file, so that nothing is allocated on a false promise.
    """
    head = bytes(data[:10])
    length = int.from_bytes(head[8:10], "little")
    text = bytes(data[10 : 10 + length])
    match = _HEADER.fullmatch(text) if head[:8] == _MAGIC and length <= _LONGEST_HEADER else None
    if match is None:
        raise FormatError(
            "this is not a plain .npy array", where=where, found=repr((head + text)[:80]), expected="npy 1.0"
        )
    dtype = match[2].decode()
    if dtype not in DTYPES or match[3] != b"False":
        raise FormatError(
            "this .npy holds a type that artifacts never hold", where=where, found=repr(text[:80]), expected="numbers"
        )
    shape = tuple(int(side) for side in match[4].rstrip(b",").split(b", "))
    offset = 10 + length
    declared = offset + math.prod(shape) * np.dtype(f"<{dtype}").itemsize
    if declared != size or len(shape) > MOST_SIDES or 0 in shape:
        raise FormatError("a .npy declares another size than it has", where=where, found=size, expected=declared)
    return dtype, shape, offset


def write_npy(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write ``array`` (little-endian numbers), whole or not at all; equal arrays give equal bytes.

    Raises:
        FormatError: a dtype that artifacts never hold.
    """
    dtype = array.dtype.str[1:]
    if dtype not in DTYPES or array.dtype.str[0] == ">":
        raise FormatError("this dtype cannot be stored", where=path, found=array.dtype, expected=", ".join(DTYPES))
    with atomic(path) as temporary, temporary.open("wb") as stream:
        stream.write(npy_header(dtype, array.shape))
        stream.write(np.ascontiguousarray(array).data)


def array_record(path: str, array: np.ndarray[Any, Any]) -> ArrayRecord:
    """What a manifest says of ``array`` that is stored at ``path`` of the artifact."""
    return ArrayRecord(path, array.dtype.str[1:], array.shape, xxh3_array(array))


def read_npy(path: Path) -> np.ndarray[Any, Any]:
    """Read a .npy file into a new, writable array.

    Raises:
        FormatError: see `parse_npy_header`.
    """
    data = path.read_bytes()
    dtype, shape, offset = parse_npy_header(data, len(data), path)
    return np.frombuffer(data, np.dtype(f"<{dtype}"), offset=offset).reshape(shape).copy()
