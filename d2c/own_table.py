"""Tables that users bring, with a column ``key`` that names scored images, as pandas, polars or others wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d2c.errors import D2CError
from formats.files import read_table, table_facts

ROWS = 4096
"""Rows of a column that are in memory together: of 2,048 numbers 32 MB. A million such rows are 10 GB, and more numbers
than one Arrow array of lists can hold."""
_EXPECTED = "a Parquet file with a column key, the images' paths below the source"


def read_keys(path: Path) -> pa.ChunkedArray:
    """The keys of the table at ``path``, as plain strings.

    Raises:
        D2CError: there is no such file, or no column of keys in it, or an image is there twice.
        FormatError: it is no Parquet.
    """
    if not path.is_file():
        raise D2CError("there is no such table", where=path, expected=_EXPECTED)
    names = [field.name for field in table_facts(path)[0]]
    if names.count("key") != 1:
        raise D2CError("this table names no images", where=path, found=_some(names), expected=_EXPECTED)
    table = read_table(path, columns=["key"])
    try:
        keys = table["key"].cast(pa.string())
    except pa.ArrowException as error:
        kind = table["key"].type
        raise D2CError("this table names no images", where=path, found=f"keys of {kind}", expected=_EXPECTED) from error
    counts = pc.value_counts(keys)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise D2CError(
            "a table has images twice",
            where=path,
            found=f"{len(twice)} of them, the first: {twice[0]['values'].as_py()}",
            expected="each image once",
        )
    return keys


def pieces(path: Path, column: str) -> Iterator[pa.Array]:
    """The rows of a column in their order, `ROWS` or fewer at a time.

    Raises:
        D2CError: the file's bytes do not match their checksums, or are no such column.
    """
    try:
        # Without a buffer's size a group of rows, which may be all there are, would be read as a whole.
        with pq.ParquetFile(path, buffer_size=2**20, page_checksum_verification=True) as file:
            for batch in file.iter_batches(ROWS, columns=[column]):
                batch.validate(full=True)
                yield batch.column(column)
    except (pa.ArrowException, OSError) as error:
        raise D2CError("this table cannot be read", where=path, found=error) from error


def _some(names: list[str]) -> str:
    return f"columns {', '.join(names[:10])}" if names else "no columns"
