"""Writes that a kill cannot tear: a temporary file beside the target, fsync, rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from formats.errors import FormatError
from formats.hashing import canonical_json, parse_json
from formats.pages import memory

_SLACK = 1 << 20
"""Bytes that `read_bounded` allows a file of any number of rows."""
_EXPANSION = 1000
"""Of a file in memory. The longest facts, the same for all samples, make our own writer's index 850 times as large."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it over ``path``.

    On any exception the temporary file is removed and ``path`` is left as it was. A kill leaves at most a
    ``.tmp-*`` file, which nothing reads.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Make renames inside ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as canonical JSON (sorted keys, UTF-8, LF), whole or not at all."""
    write_bytes(path, canonical_json(value).encode())


def write_rows(path: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write ``{name: [rows]}`` with the bytes of `write_json`, without holding more than one row of it as text."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(f'{{\n  "{name}": [')
        before = ""
        for row in rows:
            text = canonical_json(dict(row)).rstrip("\n").replace("\n", "\n    ")
            stream.write(f"{before}\n    {text}")
            before = ","
        stream.write("\n  ]\n}\n" if before else "]\n}\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        FormatError: the file is not UTF-8 JSON; see `formats.hashing.parse_json`.
    """
    try:
        return parse_json(path.read_bytes().decode())
    except ValueError as error:
        raise FormatError("this file is not valid JSON", where=path, found=str(error)) from error


def write_table(path: Path, table: pa.Table) -> None:
    """Write ``table`` as zstd Parquet with page checksums, whole or not at all; equal tables give equal bytes."""
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file, checking its page checksums.

    Raises:
        FormatError: the file is not readable Parquet, its bytes do not match their checksums, or text is not UTF-8.
    """
    with _readable(path):
        table = pq.read_table(path, columns=columns, page_checksum_verification=True)
        table.validate(full=True)
        return table


def read_bounded(path: Path, columns: list[str], *, each: int) -> pa.Table:
    """`read_table` for files of others: refused, before memory is taken, where they would take much more than they are.

    That is more than ``each`` bytes a row on average, or more than a thousand times the file. Compression makes
    gigabytes small; a dictionary holds a text once, however many rows name it; a run counts rows without holding them.

    Raises:
        FormatError: as `read_table`; or the rows are too large.
    """
    with _readable(path):
        with pq.ParquetFile(path) as file:
            texts = [field.name for field in file.schema_arrow if pa.types.is_string(field.type)]
            room = _SLACK + min(each * file.metadata.num_rows, _EXPANSION * path.stat().st_size)
            found = memory(path, file.metadata)
        if found <= room:
            folded = pq.read_table(path, columns=columns, read_dictionary=texts, page_checksum_verification=True)
            folded.validate(full=True)
            found = sum(_unfolded(column) for column in folded.columns if pa.types.is_dictionary(column.type))
            if found <= room:
                return folded.cast(pa.schema(map(_plain, folded.schema), folded.schema.metadata))
    raise FormatError("its rows are too large", where=path, found=f"{found} bytes", expected=f"at most {room}")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise FormatError("this file is not readable Parquet", where=path, found=str(error)) from error


def _unfolded(column: pa.ChunkedArray) -> int:
    """Bytes of a dictionary column's texts, each as often as it is named."""
    return sum(
        pc.sum(pc.take(pc.cast(pc.binary_length(chunk.dictionary), pa.int64()), chunk.indices)).as_py() or 0
        for chunk in column.chunks
    )


def _plain(field: pa.Field) -> pa.Field:
    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field


def table_facts(path: Path) -> tuple[list[pa.Field], int]:
    """Columns and number of rows of a Parquet file, from its footer alone.

    Raises:
        FormatError: the file is not readable Parquet.
    """
    try:
        with pq.ParquetFile(path) as file:
            columns = list(file.schema_arrow)
            # A name that is not UTF-8 must raise here, not later.
            _ = [column.name for column in columns]
            return columns, file.metadata.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise FormatError("this file is not readable Parquet", where=path, found=str(error)) from error


def remove_tree(path: Path) -> None:
    """Delete a directory so that a kill half-way leaves nothing that looks finished: rename first, then delete."""
    if path.is_symlink():
        path.unlink()
    if not path.exists():
        return
    doomed = path.with_name(f".tmp-{os.getpid()}-{path.name}.deleted")
    os.replace(path, doomed)
    shutil.rmtree(doomed)
