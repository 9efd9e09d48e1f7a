"""What must hold before an artifact is written or finished."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from formats.encoding import finite
from formats.errors import FormatError
from formats.files import read_json
from formats.layout import CLASSES, INDEX, LICENSE, MANIFEST, SELECTION, SUMS, licence_text, read_sums, unlisted
from formats.schema import CODECS, ClassRow, Column
from formats.version import FORMAT_NAME


def check_columns(columns: Sequence[Column], where: Path) -> None:
    """Columns have different names and a codec that can be written.

    Raises:
        FormatError: they do not.
    """
    names = [column.name for column in columns]
    if len(set(names)) != len(names):
        raise FormatError("two columns have the same name", where=where, found=names)
    for column in columns:
        if column.codec not in CODECS:
            raise FormatError("unknown codec", where=where, found=column.codec, expected=", ".join(CODECS))
        if column.scale_column and column.scale_column not in names:
            raise FormatError(f"column {column.name} lacks its scales", where=where, expected=column.scale_column)


def check_place(out: Path) -> Path:
    """Where a finished folder can be renamed to: ``out`` resolved, since a link to a folder stays one.

    Raises:
        FormatError: it is a link that leads nowhere, a mount point, or the folder that the process works in.
    """
    place = out.resolve()
    if out.is_symlink() and not out.exists():
        raise FormatError(
            "the place for the artifact is a link that leads nowhere",
            where=out,
            found=f"a link to {out.readlink()}",
            hint="make the folder that it leads to, or remove the link",
        )
    if Path.cwd().is_relative_to(place):
        raise FormatError(
            "the artifact cannot take the place of the folder that you are in",
            where=place,
            expected="a folder of its own, which is renamed into place when it is whole",
            hint="name a folder, such as ./shards",
        )
    if os.path.ismount(place):
        raise FormatError(
            "the place for the artifact is a mount point, which nothing can be renamed to",
            where=out,
            hint=f"choose a folder inside it, such as {out / 'shards'}",
        )
    return place


def check_replaceable(out: Path, licence: bytes | None = None) -> None:
    """Accept as a place to write: nothing, an empty folder, or a finished artifact with nothing else in its folder.

    An artifact whose manifest is torn is known by its SHA256SUMS. A LICENSE of the text ``licence`` comes again.

    Raises:
        FormatError: anything else, since writing would destroy it.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    found = f"no {MANIFEST} of a d2c artifact"
    if (out / MANIFEST).is_file() and (listed := _listed(out)) is not None:
        again = {LICENSE} if licence is not None and licence_text(out) == licence else set()
        extra = unlisted(out, listed | again, everything=True)
        if not extra:
            return
        found = f"an artifact, and files that are not part of it: {', '.join(extra[:3])}"
    raise FormatError(
        "there is something else where the artifact should go",
        where=out,
        found=found,
        expected="a new or empty folder, or a finished artifact",
        hint="move it away, or choose another output folder",
    )


def _listed(out: Path) -> set[str] | None:
    """The files of the artifact that is or was at ``out``; None where its manifest is that of something else."""
    try:
        raw = read_json(out / MANIFEST)
    except FormatError:
        sums = set(read_sums(out)[0]) if (out / SUMS).is_file() else set()
        return sums if {MANIFEST, INDEX, SELECTION, CLASSES} <= sums else None
    if not (isinstance(raw, dict) and isinstance(raw.get("format"), dict) and raw["format"].get("name") == FORMAT_NAME):
        return None
    files = raw.get("files")
    records = [record for record in files if isinstance(record, dict)] if isinstance(files, list) else []
    return {str(record.get("path")) for record in records}


def check_finite(array: np.ndarray[Any, Any], where: str) -> None:
    """No value is NaN or infinite.

    Raises:
        FormatError: one is.
    """
    if not finite(array):
        raise FormatError("an array that samples share holds NaN or infinity", where=where)


def check_classes(index: pa.Table, classes: Sequence[ClassRow], where: Path) -> None:
    """Classes are numbered 0 .. C-1 and count the samples that have their label.

    Raises:
        FormatError: they do not.
    """
    counts = np.bincount(index["label"].to_numpy(), minlength=len(classes)).tolist()
    if [row.id for row in classes] != list(range(len(classes))) or [row.count for row in classes] != counts:
        raise FormatError(
            "classes and labels disagree",
            where=where,
            found=f"{len(counts)} class numbers with {sum(counts)} samples",
            expected=f"classes 0 to {len(classes) - 1} in order with {sum(row.count for row in classes)} samples",
        )


def check_keys(index: pa.Table, where: Path) -> None:
    """No key comes twice in the artifact.

    Raises:
        FormatError: one does.
    """
    if (distinct := pc.count_distinct(index["key"]).as_py()) != index.num_rows:
        raise FormatError(
            "two samples have the same key", where=where, found=f"{distinct} keys", expected=f"{index.num_rows} keys"
        )


def check_facts(index: pa.Table, where: Path) -> None:
    """Every sample has the same facts, so that table readers see one schema.

    Raises:
        FormatError: a sample has others than the first.
    """
    first: set[str] | None = None
    for batch in index.select(["info"]).to_batches(max_chunksize=10_000):
        for text in batch.column(0).to_pylist():
            names = set(json.loads(text))
            first = names if first is None else first
            if names != first:
                raise FormatError(
                    "samples have different facts",
                    where=where,
                    found=sorted(names ^ first),
                    expected="the same facts for every sample",
                )
