"""Parquet shards: plain `binary` columns whose bytes lie in the file as they are, so an index can point at them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from formats.encoding import Encoded
from formats.errors import FormatError
from formats.hashing import canonical_json
from formats.pages import DATA_PAGE, PLAIN, UNCOMPRESSED, Page, field, integer, mapped, pages, row_groups
from formats.schema import Column

_SMALL_ROW_GROUP, _LARGE_ROW_GROUP = 64, 1024
_LARGE_SAMPLE = 1 << 16
_FACTS = ("key", "label", "json")


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
        FormatError: the file breaks a rule of the format (compression, dictionary, encoding, levels, lengths).
    """
    try:
        metadata = pq.read_metadata(path)
        names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise FormatError("this file is not readable Parquet", where=path, found=str(error)) from error
    expected = [*_FACTS, *(column.name for column in columns)]
    if names != expected:
        raise FormatError("a shard has other columns than the manifest", where=path, found=names, expected=expected)
    per_column: list[list[int]] = [[] for _ in columns]
    with mapped(path) as data:
        for chunks in row_groups(metadata):
            if len(chunks) != len(expected):
                raise FormatError("a row group has other columns than its shard", where=path, found=len(chunks))
            for number, (chunk, name) in enumerate(zip(chunks, expected, strict=True)):
                plain = _plain_pages(data, chunk, f"{path}: {name}")
                if number < len(_FACTS):
                    # Walked only: what pyarrow then reads of them takes no more memory than it takes in the file.
                    deque(plain, maxlen=0)
                else:
                    column = columns[number - len(_FACTS)]
                    for page in plain:
                        per_column[number - len(_FACTS)] += _places(data, page, column, f"{path}: {name}")
    if any(len(offsets) != metadata.num_rows for offsets in per_column):
        raise FormatError("columns have another number of values than the shard has rows", where=path)
    return [list(row) for row in zip(*per_column, strict=True)]


def _plain_pages(data: memoryview, chunk: Any, where: str) -> Iterator[Page]:
    if integer(chunk, 4) != UNCOMPRESSED or field(chunk, 11) is not None:
        raise FormatError("a column is compressed", where=where, expected="plain")
    for page in pages(data, chunk, where):
        if (page.kind, page.encoding) != (DATA_PAGE, PLAIN) or page.unpacked != page.end - page.start:
            raise FormatError("a page is not a plain data page", where=where, found=f"page ending at byte {page.end}")
        yield page


def _places(data: memoryview, page: Page, column: Column, where: str) -> Iterator[int]:
    position = page.start
    for _ in range(page.values):
        length = int.from_bytes(data[position : position + 4], "little")
        if length != column.nbytes or position + 4 + length > page.end:
            raise FormatError("an array has another length", where=where, found=length, expected=column.nbytes)
        yield position + 4
        position += 4 + length
    if position != page.end:
        raise FormatError("a page holds more than its arrays", where=where, found=page.end, expected=position)
