"""Pictures in Parquet files with an image column, as dataset hubs export them; local, or in a store read by ranges."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from d2c.errors import D2CError
from d2c.images import BadImage
from d2c.sources.base import Labels, Source
from d2c.sources.columns import Layout, Places, Table, assemble, find_columns, image_bytes
from d2c.sources.places import DataFile

_CACHE_BYTES = 512 << 20
# Reading footers waits for the store; threads wait together.
_OPEN_THREADS = 16


class _ParquetReader:
    """Decompresses whole row groups and keeps the last ones, up to 512 MiB.

    files, footers: of each file; rows: [N, 2] file and row; starts: of each file, the first row of each row group.
    """

    def __init__(self, files: Sequence[DataFile], footers: Sequence[Any], image: str, rows: Places) -> None:
        self._files = files
        self._footers = footers
        self._image = image
        self._starts = [_starts(footer) for footer in footers]
        self._rows = rows
        self._cache: OrderedDict[tuple[int, int], Future[Any]] = OrderedDict()
        self._kept = 0
        self._lock = threading.Lock()

    def read(self, index: int) -> bytes:
        file, row = self._rows[index].tolist()
        group = int(np.searchsorted(self._starts[file], row, side="right")) - 1
        data: bytes | None = self._column(file, group)[row - int(self._starts[file][group])].as_py()
        if data is None:
            raise BadImage("the row has no image bytes")
        return data

    def positions(self) -> npt.NDArray[np.int64]:
        return (self._rows[:, 0] << 40) | self._rows[:, 1]

    def _column(self, file: int, group: int) -> Any:
        """Threads that ask for the same group wait for it; those that ask for others fetch at the same time."""
        wanted = (file, group)
        with self._lock:
            known = self._cache.get(wanted)
            if known is None:
                mine = self._cache[wanted] = Future[Any]()
            else:
                self._cache.move_to_end(wanted)
        if known is not None:
            return known.result()
        try:
            column = self._fetch(file, group)
        except BaseException as error:
            with self._lock:
                del self._cache[wanted]
            mine.set_exception(error)
            raise
        mine.set_result(column)
        with self._lock:
            self._kept += column.nbytes
            for old in [key for key, future in self._cache.items() if future.done() and key != wanted]:
                if self._kept <= _CACHE_BYTES:
                    break
                self._kept -= self._cache.pop(old).result().nbytes
        return column

    def _fetch(self, file: int, group: int) -> Any:
        here = self._files[file]
        try:
            with pq.ParquetFile(here.open(), metadata=self._footers[file], page_checksum_verification=True) as parquet:
                return image_bytes(parquet.read_row_group(group, columns=[self._image]).column(0))
        except pa.ArrowException as error:
            raise BadImage(f"row group {group} of {here.name} cannot be read: {error}") from error


def open_parquet(location: str, files: Sequence[DataFile], labels: Labels) -> Source:
    """Read labels and paths of all rows, no picture. Of files named by split, those of ``train`` are used.

    The image column is a struct with ``bytes`` or plain binary. The label is an integer, named by the
    ``ClassLabel`` of the ``huggingface`` schema metadata where there is one, or a string. A key is the row's
    path where all are there and differ, else "<file stem>/<row, 8 digits>".

    Raises:
        D2CError: unreadable Parquet, no image column, no single label column, or no rows.
    """
    notes: list[str] = []
    train = [file for file in files if file.name.lower().startswith("train")]
    if train and len(train) < len(files):
        notes.append(f"images are read from the {len(train)} train files of {len(files)}")
        files = train
    try:
        schema = pq.read_schema(files[0].open())
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(files[0], error) from error
    layout = find_columns(files[0].path, schema, labels, notes)
    with ThreadPoolExecutor(_OPEN_THREADS) as pool:
        opened = list(pool.map(lambda file: _open_one(file, layout), files))
    tables, footers = [table for table, _ in opened], [footer for _, footer in opened]
    return assemble(
        "parquet", location, layout, tables, notes, lambda rows: _ParquetReader(files, footers, layout.image, rows)
    )


def _open_one(file: DataFile, layout: Layout) -> tuple[Table, Any]:
    """Labels and paths of one file, and its footer."""
    try:
        with pq.ParquetFile(file.open(), pre_buffer=True) as parquet:
            missing = {name.split(".")[0] for name in (*layout.columns, layout.image)} - set(parquet.schema_arrow.names)
            if missing:
                raise D2CError("a Parquet file lacks a column of the others", where=file.path, expected=sorted(missing))
            rows = parquet.read(columns=layout.columns)
            return Table(file.stem, file.stamp, rows), parquet.metadata
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: DataFile, error: Exception) -> D2CError:
    return D2CError("this file is not readable Parquet", where=file.path, found=error)


def _starts(footer: Any) -> npt.NDArray[np.int64]:
    counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    return np.cumsum([0, *counts])[:-1]
