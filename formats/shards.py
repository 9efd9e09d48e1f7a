"""One shard: samples in, a file and its rows of the index out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from formats.encoding import Encoded, Sample, encode
from formats.errors import FormatError
from formats.files import atomic
from formats.index import index_row
from formats.schema import CONTAINERS, RECIPE, Column, Container
from formats.shards_parquet import write_parquet
from formats.shards_tar import write_tar

__all__ = ["Sample", "shard_name", "write_shard"]


def shard_name(container: Container, shard: int, shards: int) -> str:
    """Path of a shard inside its artifact."""
    return f"{CONTAINERS[container]}/train-{shard:05d}-of-{shards:05d}.{container}"


def write_shard(
    path: Path, container: Container, columns: Sequence[Column], samples: Iterable[Sample | Encoded]
) -> list[dict[str, Any]]:
    """Write ``samples`` in the order given, whole or not at all; one sample (Parquet: one row group) is held in memory.

    Returns the rows of the index: key, label, shard, row, sample_id, info, and per column ``<name>.offset`` of the
    array's bytes in the file, ``<name>.nbytes`` and ``<name>.xxh3``. For a recipe no file is written, the rows have no
    places, and samples may come as another recipe's index has them.

    Raises:
        FormatError: a sample that does not fit the columns, a key that comes twice, facts that only some samples have.
    """
    rows: list[dict[str, Any]] = []
    if container == RECIPE:
        return [index_row(sample, columns) for sample in _checked(samples, columns, path.name)]
    shard = f"{path.parent.name}/{path.name}"
    write = {"tar": write_tar, "parquet": write_parquet}[container]
    with atomic(path) as temporary:
        offsets = write(temporary, columns, _noting(_checked(samples, columns, shard), columns, rows))
    for number, (row, places) in enumerate(zip(rows, offsets, strict=True)):
        row.update({"shard": shard, "row": number})
        row.update({f"{column.name}.offset": place for column, place in zip(columns, places, strict=True)})
    return rows


def _checked(samples: Iterable[Sample | Encoded], columns: Sequence[Column], shard: str) -> Iterator[Encoded]:
    seen: set[str] = set()
    for sample in samples:
        encoded = sample if isinstance(sample, Encoded) else encode(sample, columns)
        if encoded.key in seen:
            raise FormatError("two samples have the same key", where=shard, found=encoded.key)
        seen.add(encoded.key)
        yield encoded


def _noting(samples: Iterable[Encoded], columns: Sequence[Column], rows: list[dict[str, Any]]) -> Iterator[Encoded]:
    for sample in samples:
        rows.append(index_row(sample, columns))
        yield sample
