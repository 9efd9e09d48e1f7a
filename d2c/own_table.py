"""Tables that users bring, with a column ``key`` that names scored images, as pandas, polars or others wrote them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from d2c.errors import D2CError
from formats.files import read_table

_EXPECTED = "a Parquet file with a column key, the images' paths below the source"


def read_keyed(path: Path) -> pa.Table:
    """The table at ``path``, its keys as plain strings.

    Raises:
        D2CError: there is no such file, or no column of keys in it, or an image is there twice.
        FormatError: it is no Parquet.
    """
    if not path.is_file():
        raise D2CError("there is no such table", where=path, expected=_EXPECTED)
    table = read_table(path)
    if table.column_names.count("key") != 1:
        raise D2CError("this table names no images", where=path, found=_some(table.column_names), expected=_EXPECTED)
    place = table.column_names.index("key")
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
    return table.set_column(place, "key", keys)


def _some(names: list[str]) -> str:
    return f"columns {', '.join(names[:10])}" if names else "no columns"
