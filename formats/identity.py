"""Ids of content: the same for tar and Parquet, any number of shards, any order of samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from formats.hashing import xxh3, xxh3_json, xxh3_lines
from formats.schema import ArrayRecord, ClassRow, Column

_SAMPLE = "d2c-sample-1\0"
_CONTENT = "d2c-content-1"
PREFIX = "d2c1-xxh3-128:"


def sample_id(label: int, columns: Sequence[Column], digests: Mapping[str, str]) -> str:
    """xxh3-128 over a sample's label and, by column name, dtype, shape and array digest; its key is not part of it."""
    lines = [
        f"{column.name} {column.dtype} {_shape(column.shape)} {digests[column.name]}\n"
        for column in sorted(columns, key=lambda column: column.name)
    ]
    return xxh3((f"{_SAMPLE}label {label}\n" + "".join(lines)).encode())


def content_id(
    sample_ids: np.ndarray[Any, Any],
    columns: Sequence[Column],
    classes: Sequence[ClassRow],
    tables: Mapping[str, ArrayRecord],
    latent: Mapping[str, Any],
) -> str:
    """xxh3-128 over the sorted sample ids, codecs and their arrays, classes, class tables and latent constants.

    ``sample_ids`` is an array of 32-byte strings [N]. Counts of classes, names of files, provenance and the card are
    not part of it.
    """
    return PREFIX + xxh3_lines(_content(np.sort(sample_ids), columns, classes, tables, latent))


def _content(
    ordered: np.ndarray[Any, Any],
    columns: Sequence[Column],
    classes: Sequence[ClassRow],
    tables: Mapping[str, ArrayRecord],
    latent: Mapping[str, Any],
) -> Iterable[str]:
    yield _CONTENT
    for identifier in ordered:
        yield f"sample {identifier.decode()}"
    for column in sorted(columns, key=lambda column: column.name):
        yield f"codec {column.name} {column.codec}"
        for role, array in sorted(column.codec_arrays.items()):
            yield f"codec-array {column.name} {role} {_array(array)}"
    names = [[row.id, row.name, row.source_id, row.prompt] for row in classes]
    yield f"classes {xxh3_json(names)}"
    for name, table in sorted(tables.items()):
        yield f"table {name} {_array(table)}"
    yield f"latent {xxh3_json(dict(latent))}"


def _array(record: ArrayRecord) -> str:
    return f"{record.dtype} {_shape(record.shape)} {record.xxh3_128}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
