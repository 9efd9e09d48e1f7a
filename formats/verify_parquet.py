"""Faults of a Parquet shard: page checksums, schema, rows against the index, and where the arrays lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from formats.errors import FormatError
from formats.report import Fault
from formats.schema import Column
from formats.shards_parquet import array_offsets, parquet_schema
from formats.verify_tar import Row

_BATCH = 64


def parquet_faults(file: Path, path: str, columns: Sequence[Column], rows: Sequence[Row]) -> list[Fault]:
    """Faults of a whole shard against its rows of the index."""
    try:
        offsets = array_offsets(file, columns)
        with pq.ParquetFile(file, page_checksum_verification=True) as shard:
            schema = parquet_schema(columns)
            if not shard.schema_arrow.equals(schema, check_metadata=True):
                return [
                    Fault("container", path, found="another schema or d2c metadata", expected="that of the manifest")
                ]
            stored: list[tuple[str, int, str]] = []
            for batch in shard.iter_batches(_BATCH):
                batch.validate(full=True)
                facts = [batch.column(name).to_pylist() for name in ("key", "label", "json")]
                stored += zip(*facts, strict=True)
    except (FormatError, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        return [Fault("container", path, found=str(error).replace("\n", "; "))]
    if len(stored) != len(rows):
        return [Fault("container", path, found=f"{len(stored)} rows", expected=f"{len(rows)} rows")]
    faults = []
    for (key, label, info), places, row in zip(stored, offsets, rows, strict=True):
        if (key, label, info) != (row.key, row.label, row.info):
            faults.append(Fault("value", path, None, row.key, "key, label or json that differ from the index"))
        if places != row.offsets:
            faults.append(Fault("index", path, None, row.key, f"arrays at bytes {places}", f"bytes {row.offsets}"))
    return faults
