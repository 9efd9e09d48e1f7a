"""Write one WebDataset tar: per sample `.cls`, `.json`, then one `.npy` per column, together and in this order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from formats.encoding import Encoded
from formats.errors import FormatError
from formats.npy import npy_header
from formats.schema import Column
from formats.tar import BLOCK, LONGEST_NAME, RECORD, padded, tar_header


def members(key: str, columns: Sequence[Column]) -> list[str]:
    """Names of a sample's members, in their order."""
    return [f"{key}.cls", f"{key}.json", *(f"{key}.{column.name}.npy" for column in columns)]


def write_tar(path: Path, columns: Sequence[Column], samples: Iterable[Encoded]) -> list[list[int]]:
    """Write ``samples`` to a tar; returns per sample the file offset of every column's array bytes.

    Raises:
        FormatError: a member name is longer than USTAR's 100 bytes.
    """
    headers = [npy_header(column.dtype, column.shape) for column in columns]
    offsets = []
    with path.open("wb") as stream:
        for sample in samples:
            names = members(sample.key, columns)
            longest = max(names, key=len)
            if len(longest) > LONGEST_NAME:
                raise FormatError("a tar member's name is too long", where=path, found=longest, expected="100 bytes")
            _member(stream, names[0], str(sample.label).encode())
            _member(stream, names[1], sample.info.encode())
            offsets.append(
                [
                    _member(stream, name, header + payload) + len(header)
                    for name, header, payload in zip(names[2:], headers, sample.payloads, strict=True)
                ]
            )
        stream.write(bytes(2 * BLOCK))
        stream.write(bytes(-stream.tell() % RECORD))
    return offsets


def _member(stream: BinaryIO, name: str, data: bytes) -> int:
    stream.write(tar_header(name, len(data)))
    offset = stream.tell()
    stream.write(data)
    stream.write(bytes(padded(len(data)) - len(data)))
    return offset
