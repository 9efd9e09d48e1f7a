"""Parquet shards: plain `binary` columns whose bytes lie in the file as they are, so an index can point at them."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from formats.encoding import Encoded
from formats.errors import FormatError
from formats.hashing import canonical_json
from formats.schema import Column
from formats.thrift import read_struct

_SMALL_ROW_GROUP, _LARGE_ROW_GROUP = 64, 1024
_LARGE_SAMPLE = 1 << 16
_DATA_PAGE = 0
_PLAIN = 0
_UNCOMPRESSED = 0


def parquet_schema(columns: Sequence[Column]) -> pa.Schema:
    """key, label, json, then one non-nullable binary column per array; dtypes and shapes in the metadata key `d2c`."""
    fields = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("json", pa.string(), nullable=False),
        *(pa.field(column.name, pa.binary(), nullable=False) for column in columns),
    ]
    return pa.schema(fields, metadata={"d2c": columns_json(columns)})


def columns_json(columns: Sequence[Column]) -> str:
    """What the metadata key `d2c` holds: name, dtype, shape and codec of every column."""
    kept = ("name", "dtype", "shape", "codec")
    return canonical_json({"columns": [{name: c.to_dict()[name] for name in kept} for c in columns]})


def write_parquet(path: Path, columns: Sequence[Column], samples: Iterable[Encoded]) -> list[list[int]]:
    """Write ``samples`` to a Parquet file; returns per sample the file offset of every column's array bytes."""
    schema = parquet_schema(columns)
    large = sum(column.nbytes for column in columns) > _LARGE_SAMPLE
    with pq.ParquetWriter(
        path,
        schema,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        writer.add_key_value_metadata(schema.metadata)
        for group in _groups(samples, _SMALL_ROW_GROUP if large else _LARGE_ROW_GROUP):
            arrays = [
                pa.array([sample.key for sample in group], pa.string()),
                pa.array([sample.label for sample in group], pa.int32()),
                pa.array([sample.info for sample in group], pa.string()),
                *(pa.array([sample.payloads[i] for sample in group], pa.binary()) for i in range(len(columns))),
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=len(group))
    return array_offsets(path, columns)


def _groups(samples: Iterable[Encoded], size: int) -> Iterator[list[Encoded]]:
    group = []
    for sample in samples:
        group.append(sample)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def array_offsets(path: Path, columns: Sequence[Column]) -> list[list[int]]:
    """Walk the pages of a shard: per row, the file offset of every column's array bytes.

    Raises:
        FormatError: the file breaks a rule of the format (compression, dictionary, levels, lengths).
    """
    try:
        metadata = pq.read_metadata(path)
        names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise FormatError("this file is not readable Parquet", where=path, found=str(error)) from error
    expected = ["key", "label", "json", *(column.name for column in columns)]
    if names != expected:
        raise FormatError("a shard has other columns than the manifest", where=path, found=names, expected=expected)
    per_column: list[list[int]] = [[] for _ in columns]
    with (
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as data,
    ):
        for chunks in _row_groups(data):
            for number, column in enumerate(columns, 3):
                per_column[number - 3] += _chunk_offsets(data, chunks, number, column, path)
    if any(len(offsets) != metadata.num_rows for offsets in per_column):
        raise FormatError("columns have another number of values than the shard has rows", where=path)
    return [list(row) for row in zip(*per_column, strict=True)]


def _row_groups(data: memoryview) -> list[Any]:
    """The column chunks of each row group. Read here, since pyarrow aborts the process where a chunk's facts lie."""
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    groups = _field(read_struct(data, footer)[0], 4)
    return [_field(group, 1) for group in groups] if isinstance(groups, list) else []


def _chunk_offsets(data: memoryview, chunks: Any, number: int, column: Column, path: Path) -> Iterator[int]:
    where = f"{path}: {column.name}"
    facts = _field(chunks[number], 3) if isinstance(chunks, list) and number < len(chunks) else None
    position, size = _integer(facts, 9), _integer(facts, 7)
    end = position + size
    if _integer(facts, 4) != _UNCOMPRESSED or _field(facts, 11) is not None:
        raise FormatError("a column is compressed", where=where, expected="plain")
    if not 0 <= position <= end <= len(data):
        raise FormatError("a column lies outside the file", where=where, found=f"bytes {position} to {end}")
    while position < end:
        header, position = read_struct(data, position)
        page_end = position + _integer(header, 3)
        details = header.get(5)
        plain = isinstance(details, dict) and _integer(header, 1) == _DATA_PAGE and _integer(details, 2) == _PLAIN
        if not plain or page_end > end:
            raise FormatError("a page is not a plain data page", where=where, found=f"page ending at byte {page_end}")
        for _ in range(_integer(details, 1)):
            length = int.from_bytes(data[position : position + 4], "little")
            if length != column.nbytes or position + 4 + length > page_end:
                raise FormatError("an array has another length", where=where, found=length, expected=column.nbytes)
            yield position + 4
            position += 4 + length
        if position != page_end:
            raise FormatError("a page holds more than its arrays", where=where, found=page_end, expected=position)


def _field(fields: Any, number: int) -> Any:
    return fields.get(number) if isinstance(fields, dict) else None


def _integer(fields: Any, number: int) -> int:
    value = _field(fields, number)
    return value if isinstance(value, int) else -1
