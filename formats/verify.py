"""Verification: every fault of an artifact, named by file, byte range and sample."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from formats.checks import quick_check, read_selection
from formats.encoding import finite, parse_info
from formats.errors import FormatError
from formats.files import read_bounded
from formats.hashing import sha256_file, xxh3, xxh3_array, xxh3_file
from formats.identity import content_id, sample_id
from formats.index import ROW_BYTES, index_schema
from formats.layout import CLASSES, INDEX, MANIFEST, SELECTION, remains
from formats.npy import read_npy
from formats.report import Fault, Report
from formats.schema import LATENT, ArrayRecord, Column, FileRecord, Manifest
from formats.verify_parquet import parquet_faults
from formats.verify_tar import Row, tar_faults, walk

Level = Literal["quick", "default", "deep"]
_BATCH = 10_000
"""Rows of the index that are Python objects at once."""


def verify(path: str | Path, level: Level = "default", progress: Callable[[int], None] | None = None) -> Report:
    """Find all faults of the artifact at ``path``; faults are returned, never raised, and nothing is repaired.

    ``quick``: manifest, file list both ways, sizes, index. ``default``: and xxh3 of every file, class tables, content
    id, tar headers. ``deep``: and sha256 of every file, every array (hash, finite, std > 0), container against index.
    ``progress`` is told the bytes of each file of the manifest when it has been hashed.

    xxh3 finds accidents; only sha256 resists tampering, and only if SHA256SUMS itself is known from elsewhere.

    Raises:
        FormatError: nothing of an artifact is there, or no such level.
        VersionError: the artifact is newer than this reader.
    """
    root = Path(path)
    if level not in get_args(Level):
        raise FormatError("unknown level of verification", found=level, expected=", ".join(get_args(Level)))
    if not (root / MANIFEST).is_file() and remains(root):
        return Report(str(path), level, faults=[Fault("missing", MANIFEST, expected="a finished artifact")])
    checked = quick_check(root)
    manifest = checked.manifest
    counts = {"files": 0, "bytes": 0, "samples": 0, "arrays": 0}
    report = Report(
        str(path), level, None if manifest is None else manifest.content_id, checked.faults, checked.warnings, counts
    )
    if manifest is None:
        return report
    counts["files"] = len(manifest.files)
    counts["samples"] = 0 if checked.index is None else checked.index.num_rows
    if level != "quick":
        deep = level == "deep"
        _files(report, root, manifest, deep, progress or (lambda _: None))
        _tables(report, root, manifest)
        index = None if checked.index is None else _whole_index(report, checked.root, manifest)
        if index is not None:
            _ids(report, manifest, index)
            _facts(report, index)
        if (root / SELECTION).is_file():
            _selection(report, root)
        _shards(report, checked.root, manifest, index, deep)
        if checked.index is not None and checked.classes:
            ids = np.asarray(checked.index["sample_id"].to_numpy(), dtype="S32")
            found = content_id(ids, manifest.columns, checked.classes, manifest.tables, manifest.latent)
            if found != manifest.content_id:
                report.faults.append(Fault("content-id", MANIFEST, found=found, expected=manifest.content_id))
    return report


def _files(report: Report, root: Path, manifest: Manifest, deep: bool, progress: Callable[[int], None]) -> None:
    for record in manifest.files:
        path = root / record.path
        if not path.is_file() or path.stat().st_size != record.bytes:
            continue
        report.checked["bytes"] += record.bytes
        where = (0, record.bytes)
        if record.path not in (INDEX, CLASSES) and (found := xxh3_file(path)) != record.xxh3_128:
            report.faults.append(Fault("hash", record.path, where, None, f"xxh3 {found}", f"xxh3 {record.xxh3_128}"))
        if deep and (found := sha256_file(path)) != record.sha256:
            report.faults.append(Fault("hash", record.path, where, None, f"sha256 {found}", f"sha256 {record.sha256}"))
        progress(record.bytes)


def _tables(report: Report, root: Path, manifest: Manifest) -> None:
    for record in manifest.arrays:
        path = root / record.path
        if path.is_file():
            report.faults.extend(_table_faults(path, record))


def _table_faults(path: Path, record: ArrayRecord) -> list[Fault]:
    try:
        array = read_npy(path)
    except FormatError as error:
        return [Fault("unsafe", record.path, None, None, f"{error.what}: {error.found}", error.expected)]
    if (array.dtype.str[1:], array.shape) != (record.dtype, record.shape):
        found, expected = f"{array.dtype} {array.shape}", f"{record.dtype} {record.shape}"
        return [Fault("class-table", record.path, None, None, found, expected)]
    faults = []
    if xxh3_array(array) != record.xxh3_128:
        faults.append(Fault("class-table", record.path, found="other values", expected=f"xxh3 {record.xxh3_128}"))
    if not finite(array):
        faults.append(Fault("value", record.path, found="NaN or infinity"))
    return faults


def _ids(report: Report, manifest: Manifest, index: pa.Table) -> None:
    names = [column.name for column in manifest.columns]
    wanted = ["key", "label", "sample_id", *(f"{name}.xxh3" for name in names)]
    for batch in index.select(wanted).to_batches(max_chunksize=_BATCH):
        for key, label, expected, *digests in zip(*(c.to_pylist() for c in batch.columns), strict=True):
            found = sample_id(label, manifest.columns, dict(zip(names, digests, strict=True)))
            if found != expected:
                report.faults.append(Fault("index", INDEX, None, key, f"sample id {expected}", found))


def _facts(report: Report, index: pa.Table) -> None:
    first: set[str] | None = None
    for batch in index.select(["key", "info"]).to_batches(max_chunksize=_BATCH):
        for key, text in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            try:
                names = set(parse_info(text, key))
            except FormatError as error:
                report.faults.append(Fault("value", INDEX, None, key, f"{error.what}: {error.found}"))
                continue
            first = names if first is None else first
            if names != first:
                found, expected = f"facts {sorted(names)[:9]}", f"{sorted(first)[:9]}"
                report.faults.append(Fault("value", INDEX, None, key, found, expected))


def _selection(report: Report, root: Path) -> None:
    try:
        read_selection(root)
    except FormatError as error:
        report.faults.append(Fault("manifest", SELECTION, None, None, f"{error.what}: {error.found}", error.expected))


def _shards(report: Report, root: Path, manifest: Manifest, index: pa.Table | None, deep: bool) -> None:
    first = 0
    for shard in manifest.shards:
        count = int(shard.samples or 0)
        part = None if index is None else index.slice(first, count)
        path = root / shard.path
        if path.is_file() and path.stat().st_size:
            with _mapped(path) as data:
                report.faults.extend(_container_faults(manifest, shard, path, data, part, deep))
                if deep and part is not None and len(data) == shard.bytes:
                    _array_faults(report, manifest, shard, data, part)
        first += count


def _whole_index(report: Report, root: Path, manifest: Manifest) -> pa.Table | None:
    try:
        return read_bounded(root / INDEX, index_schema(manifest.columns, manifest.container).names, each=ROW_BYTES)
    except FormatError as error:
        report.faults.append(Fault("index", INDEX, found=error.what))
        return None


@contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    with path.open("rb") as stream:
        # Not closed by hand: the map lives as long as the last view of it, and no longer.
        yield memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def _container_faults(
    manifest: Manifest, shard: FileRecord, path: Path, data: memoryview, part: pa.Table | None, deep: bool
) -> list[Fault]:
    if part is None or (manifest.container == "tar" and len(data) != shard.bytes):
        # A wrong size is a fault already: one more for each member behind the cut would only hide the others.
        return walk(data, shard.path)[1] if manifest.container == "tar" else []
    if manifest.container == "parquet" and not deep:
        return []
    offsets = [part[f"{column.name}.offset"].to_pylist() for column in manifest.columns]
    facts = [part[name].to_pylist() for name in ("key", "label", "info")]
    rows = [Row(key, label, info, places) for key, label, info, *places in zip(*facts, *offsets, strict=True)]
    if manifest.container == "tar":
        return tar_faults(data, shard.path, manifest.columns, rows, deep)
    return parquet_faults(path, shard.path, manifest.columns, rows)


def _array_faults(report: Report, manifest: Manifest, shard: FileRecord, data: memoryview, part: pa.Table) -> None:
    offsets = {column.name: part[f"{column.name}.offset"].to_numpy() for column in manifest.columns}
    expected = {column.name: part[f"{column.name}.xxh3"].to_pylist() for column in manifest.columns}
    for row, key in enumerate(part["key"].to_pylist()):
        for column in manifest.columns:
            start = int(offsets[column.name][row])
            where = (start, start + column.nbytes)
            content = data[slice(*where)]
            report.checked["arrays"] += 1
            if (found := xxh3(content)) != (wanted := expected[column.name][row]):
                fault = Fault("array", shard.path, where, key, f"{column.name} with xxh3 {found}", f"xxh3 {wanted}")
                report.faults.append(fault)
            elif bad := _bad_values(content, column, manifest):
                report.faults.append(Fault("value", shard.path, where, key, f"{column.name} with {bad}"))


def _bad_values(content: memoryview, column: Column, manifest: Manifest) -> str | None:
    if column.numpy.kind != "f":
        return None
    array = np.frombuffer(content, column.numpy).reshape(column.shape)
    if not finite(array):
        return "NaN or infinity"
    if column.name == LATENT and manifest.latent.get("moments") == ["mean", "std"] and not _positive(array[1:]):
        return "a standard deviation that is not positive"
    return None


def _positive(array: np.ndarray[Any, Any]) -> bool:
    # Finite floats are ordered as their bits are, and comparing integers is ten times faster than comparing halves.
    return bool((array.view(f"<i{array.itemsize}") > 0).all())
