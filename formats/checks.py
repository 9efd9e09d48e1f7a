"""The checks that take milliseconds and that every reader runs: manifest, file list, sizes, index.

One pass finds all faults; the reader stops at any, verification reports them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from formats.errors import FormatError, VersionError
from formats.fields import Fields
from formats.files import read_bounded, read_json, table_facts
from formats.hashing import sha256_file, xxh3_file
from formats.index import ROW_BYTES, index_faults, index_schema
from formats.layout import CLASSES, INDEX, MANIFEST, OWNED, README, SELECTION, SUMS, read_sums, unlisted
from formats.report import Fault
from formats.schema import ClassRow, Manifest, parse_manifest
from formats.swap import unfinished


@dataclass
class Checked:
    """What the quick checks read, as far as it could be read, and all that is wrong with it."""

    root: Path
    manifest: Manifest | None = None
    index: pa.Table | None = None
    classes: list[ClassRow] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def quick_check(root: Path) -> Checked:
    """Check an artifact without reading its shards; the index is read without its ``info`` column.

    Raises:
        FormatError: ``root`` is no folder, or no artifact was ever finished there.
        VersionError: the artifact is newer than this reader.
    """
    if not (root / MANIFEST).is_file():
        found = unfinished(root) or {"found": "a folder" if root.is_dir() else "no such folder"}
        raise FormatError(
            "there is no finished artifact here",
            where=root,
            expected=f"a folder with {MANIFEST}",
            **found,
        )
    checked = Checked(root)
    sums = _sums(checked)
    intact = MANIFEST not in sums or sums[MANIFEST] == sha256_file(root / MANIFEST)
    if not intact:
        checked.faults.append(Fault("hash", MANIFEST, found="another sha256", expected=f"that in {SUMS}"))
    try:
        checked.manifest = parse_manifest(read_json(root / MANIFEST), root / MANIFEST)
    except VersionError as error:
        if intact:
            raise
        checked.faults.append(_fault("manifest", MANIFEST, error))
    except FormatError as error:
        checked.faults.append(_fault("manifest", MANIFEST, error))
    if checked.manifest is not None:
        _files(checked, checked.manifest, sums)
        _index(checked, checked.manifest)
        _classes(checked, checked.manifest)
    return checked


def _fault(kind: str, path: str, error: FormatError) -> Fault:
    found = error.what if error.found is None else f"{error.what}: {error.found}"
    return Fault(kind, path, found=found, expected=error.expected)


def _sums(checked: Checked) -> dict[str, str]:
    if not (checked.root / SUMS).is_file():
        checked.faults.append(Fault("missing", SUMS))
        return {}
    sums, wrong = read_sums(checked.root)
    if wrong:
        checked.faults.append(Fault("manifest", SUMS, found=f"{wrong} malformed or repeated lines"))
    return sums


def _files(checked: Checked, manifest: Manifest, sums: dict[str, str]) -> None:
    faults, root = checked.faults, checked.root
    listed = {record.path: record.sha256 for record in manifest.files}
    for name in sorted((set(sums) ^ set(listed)) - {MANIFEST}):
        faults.append(Fault("manifest", SUMS, found=f"{name} in one of {SUMS} and {MANIFEST}", expected="in both"))
    for name in sorted(set(sums) & set(listed)):
        if sums[name] != listed[name]:
            faults.append(Fault("manifest", SUMS, found=f"another sha256 of {name}", expected=f"that in {MANIFEST}"))
    if MANIFEST not in sums and (root / SUMS).is_file():
        faults.append(Fault("manifest", SUMS, found=f"no line for {MANIFEST}"))
    for record in manifest.files:
        path = root / record.path
        if not path.is_file():
            faults.append(Fault("missing", record.path))
        elif (size := path.stat().st_size) != record.bytes:
            faults.append(Fault("size", record.path, found=f"{size} bytes", expected=f"{record.bytes} bytes"))
    for needed in (INDEX, CLASSES, SELECTION, *(array.path for array in manifest.arrays)):
        if needed not in listed:
            faults.append(Fault("manifest", MANIFEST, found=f"no record of {needed}"))
    for name in unlisted(root, set(listed)):
        if name.split("/")[0] in OWNED:
            faults.append(Fault("unexpected", name))
        else:
            checked.warnings.append(f"{name} is not part of the artifact")
    if not (root / README).is_file():
        checked.warnings.append(f"there is no {README}")


def _intact(checked: Checked, manifest: Manifest, name: str) -> bool:
    """Whether a small file that everything else relies on has its hash; the fault is noted."""
    record, path = manifest.file(name), checked.root / name
    if record is None or not path.is_file():
        return False
    if (found := xxh3_file(path)) == record.xxh3_128:
        return True
    checked.faults.append(Fault("hash", name, (0, record.bytes), None, f"xxh3 {found}", f"xxh3 {record.xxh3_128}"))
    return False


def _index(checked: Checked, manifest: Manifest) -> None:
    if not _intact(checked, manifest, INDEX):
        return
    schema = index_schema(manifest.columns, manifest.container)
    try:
        stored, rows = table_facts(checked.root / INDEX)
        if [field for name in schema.names for field in stored if field.name == name] != list(schema):
            raise FormatError("the index has other columns", found=[f.name for f in stored], expected=schema.names)
        if rows != manifest.samples:
            raise FormatError("the index has other rows", found=f"{rows} rows", expected=f"{manifest.samples} samples")
        facts = [name for name in schema.names if name != "info"]
        table = read_bounded(checked.root / INDEX, facts, each=ROW_BYTES)
    except FormatError as error:
        checked.faults.append(_fault("index", INDEX, error))
        return
    found = index_faults(manifest, table)
    checked.faults += found
    if not found:
        checked.index = table.combine_chunks()


def _classes(checked: Checked, manifest: Manifest) -> None:
    if not _intact(checked, manifest, CLASSES):
        return
    try:
        checked.classes = parse_classes(read_json(checked.root / CLASSES), checked.root / CLASSES)
    except FormatError as error:
        checked.faults.append(_fault("class-table", CLASSES, error))
        return
    if len(checked.classes) != manifest.class_count or any(row.id != i for i, row in enumerate(checked.classes)):
        checked.faults.append(
            Fault("class-table", CLASSES, found=f"{len(checked.classes)} rows", expected=f"{manifest.class_count}")
        )
    elif checked.index is not None:
        counts = np.bincount(checked.index["label"].to_numpy(), minlength=manifest.class_count).tolist()
        wrong = [row.id for row, count in zip(checked.classes, counts, strict=True) if row.count != count]
        if wrong:
            checked.faults.append(Fault("class-table", CLASSES, found=f"counts unlike the labels: classes {wrong}"))
        if manifest.per_class != (min(counts), max(counts)):
            checked.faults.append(
                Fault(
                    "manifest",
                    MANIFEST,
                    None,
                    None,
                    f"counts per class {manifest.per_class}",
                    f"{min(counts)}, {max(counts)}",
                )
            )
    for table in manifest.tables.values():
        if table.shape[0] != manifest.class_count:
            checked.faults.append(
                Fault("class-table", table.path, found=f"{table.shape[0]} rows", expected=f"{manifest.class_count}")
            )


def read_selection(root: Path) -> list[dict[str, Any]]:
    """What was chosen, as the packer wrote it.

    Raises:
        FormatError: the file is not of this form.
    """
    raw = read_json(root / SELECTION)
    return Fields(raw if isinstance(raw, dict) else {}, root / SELECTION, "").records("picks")


def parse_classes(raw: Any, where: Path) -> list[ClassRow]:
    """Parse ``classes.json``.

    Raises:
        FormatError: a field is missing or of the wrong kind.
    """
    rows = []
    for record in Fields(raw if isinstance(raw, dict) else {}, where, "").records("classes"):
        fields = Fields(record, where, "classes[]")
        rows.append(
            ClassRow(
                id=fields.number("id"),
                name=fields.text("name"),
                source_id=fields.text("source_id"),
                prompt=fields.text("prompt"),
                count=fields.number("count"),
            )
        )
    return rows
