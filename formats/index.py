"""The index: one row per sample, in storage order, with the place and hash of each array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from formats.encoding import LONGEST_INFO, Encoded
from formats.identity import sample_id
from formats.layout import INDEX
from formats.report import Fault
from formats.schema import RECIPE, Column, Container, Manifest

ROW_BYTES = 2 * LONGEST_INFO
"""Of a row of the index at most, on average."""
_LONGEST_KEY = 64
_KEYS = rf"^[0-9a-z_-]{{1,{_LONGEST_KEY}}}$"
_DIGEST = "^[0-9a-f]{32}$"


def index_schema(columns: Sequence[Column], container: Container) -> pa.Schema:
    """Columns of the index: one row per sample, in storage order; a recipe knows no places."""
    placed = container != RECIPE
    fields = {"key": pa.string(), "label": pa.int32()}
    if placed:
        fields |= {"shard": pa.string(), "row": pa.int32()}
    fields |= {"sample_id": pa.string(), "info": pa.string()}
    for column in columns:
        if placed:
            fields[f"{column.name}.offset"] = pa.int64()
        fields |= {f"{column.name}.nbytes": pa.int64(), f"{column.name}.xxh3": pa.string()}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields.items()])


def index_row(sample: Encoded, columns: Sequence[Column]) -> dict[str, Any]:
    """A sample's row of the index, but for its place, which only the container knows."""
    digests = {column.name: digest for column, digest in zip(columns, sample.digests, strict=True)}
    record: dict[str, Any] = {
        "key": sample.key,
        "label": sample.label,
        "sample_id": sample_id(sample.label, columns, digests),
        "info": sample.info,
    }
    for column in columns:
        record[f"{column.name}.nbytes"] = column.nbytes
        record[f"{column.name}.xxh3"] = digests[column.name]
    return record


def index_faults(manifest: Manifest, table: pa.Table) -> list[Fault]:
    """Faults of an index that can be seen without its shards: counts, keys, labels, and ranges inside their files."""
    if table.num_rows != manifest.samples:
        return [Fault("index", INDEX, found=f"{table.num_rows} rows", expected=f"{manifest.samples} samples")]
    faults = []
    counts = pc.value_counts(table["key"])
    doubled = counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()
    faults += [Fault("index", INDEX, sample=key[:_LONGEST_KEY], found="this key more than once") for key in doubled]
    faults += _rows(table, ~_matches(table["key"], _KEYS), "a key of another form", "1-64 of 0-9 a-z _ -")
    for name in ("sample_id", *(f"{column.name}.xxh3" for column in manifest.columns)):
        faults += _rows(table, ~_matches(table[name], _DIGEST), f"a {name} of another form", "32 hex digits")
    labels = table["label"].to_numpy()
    wrong = (labels < 0) | (labels >= manifest.class_count)
    faults += _rows(table, wrong, "a label that is no class", f"0 to {manifest.class_count - 1}")
    for column in manifest.columns:
        wrong = table[f"{column.name}.nbytes"].to_numpy() != column.nbytes
        faults += _rows(table, wrong, f"another length of {column.name}", f"{column.nbytes} bytes")
    return faults if manifest.container == RECIPE else faults + _place_faults(manifest, table)


def _place_faults(manifest: Manifest, table: pa.Table) -> list[Fault]:
    faults = []
    places, sizes, expected_rows = shard_rows(manifest, table)
    faults += _rows(table, places < 0, "a shard that the manifest does not list", None)
    if not (places < 0).any():
        faults += _rows(table, table["row"].to_numpy() != expected_rows, "another row number than its place", None)
        per_shard = np.bincount(places, minlength=len(manifest.shards))
        for shard, count in zip(manifest.shards, per_shard.tolist(), strict=True):
            if count != shard.samples:
                faults.append(Fault("index", shard.path, found=f"{count} rows", expected=f"{shard.samples} samples"))
        for column in manifest.columns:
            offset = table[f"{column.name}.offset"].to_numpy()
            wrong = (offset < 0) | (offset > sizes[places] - column.nbytes)
            faults += _rows(table, wrong, f"a range of {column.name} that cannot be", f"{column.nbytes} bytes inside")
    return faults


def shard_rows(
    manifest: Manifest, table: pa.Table
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(shard number of every row [N], -1 where unknown; bytes of every shard; row number in its shard [N])."""
    names = pa.array([shard.path for shard in manifest.shards], pa.string())
    places = np.asarray(pc.fill_null(pc.index_in(table["shard"], names), -1).to_numpy(), np.int32)
    starts = np.flatnonzero(np.diff(places, prepend=-2))
    rows = np.arange(len(places)) - np.repeat(starts, np.diff(starts, append=len(places)))
    return places, np.array([shard.bytes for shard in manifest.shards], np.int64), rows


def _matches(texts: pa.ChunkedArray, pattern: str) -> np.ndarray[Any, Any]:
    return np.asarray(pc.match_substring_regex(texts, pattern).to_numpy(), bool)


def _rows(table: pa.Table, wrong: np.ndarray[Any, Any], found: str, expected: str | None) -> list[Fault]:
    keys = table["key"].take(pa.array(np.flatnonzero(wrong))).to_pylist()
    return [Fault("index", INDEX, sample=key[:_LONGEST_KEY], found=found, expected=expected) for key in keys]
