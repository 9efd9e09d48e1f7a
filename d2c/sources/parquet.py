"""Pictures in Parquet files with an image column, as dataset hubs export them."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d2c.errors import D2CError
from d2c.images import BadImage
from d2c.sources.base import (
    BadFile,
    Source,
    build_classes,
    digest_lines,
    file_stamp,
    key_order,
    no_images,
    some,
    unsafe_name,
)
from d2c.sources.imagenet import synsets_by_name

_CACHE_BYTES = 512 << 20
_IMAGE_NAMES = ("image", "img", "jpg", "png", "picture", "bytes")
_LABEL_NAMES = ("label", "labels", "class", "class_id", "cls", "target", "category", "synset", "fine_label", "y")


@dataclass(frozen=True)
class _Layout:
    image: str
    path: str | None
    label: str | None
    names: tuple[str, ...]


class _ParquetReader:
    """Decompresses one row group at a time and keeps the last ones, up to 512 MiB."""

    def __init__(self, files: Sequence[Path], image: str, rows: npt.NDArray[np.int64]) -> None:
        self._files = files
        self._image = image
        self._rows = rows  # [N, 3]: file, row group, row in the group
        self._cache: OrderedDict[tuple[int, int], Any] = OrderedDict()
        # One lock for all: threads asking for neighbours must wait for the group, not decompress it again.
        self._lock = threading.Lock()

    def read(self, index: int) -> bytes:
        file, group, row = self._rows[index].tolist()
        with self._lock:
            data: bytes | None = self._group(file, group)[row].as_py()
        if data is None:
            raise BadImage("the row has no image bytes")
        return data

    def positions(self) -> npt.NDArray[np.int64]:
        return (self._rows[:, 0] << 48) | (self._rows[:, 1] << 32) | self._rows[:, 2]

    def _group(self, file: int, group: int) -> Any:
        wanted = (file, group)
        if wanted in self._cache:
            self._cache.move_to_end(wanted)
            return self._cache[wanted]
        try:
            with pq.ParquetFile(self._files[file], page_checksum_verification=True) as parquet:
                column = parquet.read_row_group(group, columns=[self._image]).column(0)
        except pa.ArrowException as error:
            raise BadImage(f"row group {group} of {self._files[file].name} cannot be read: {error}") from error
        if pa.types.is_struct(column.type):
            column = pc.struct_field(column, "bytes")
        while self._cache and sum(kept.nbytes for kept in self._cache.values()) + column.nbytes > _CACHE_BYTES:
            self._cache.popitem(last=False)
        self._cache[wanted] = column
        return column


def open_parquet(path: Path, files: Sequence[Path]) -> Source:
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
    layout = _find_columns(files[0], notes)
    tables, rows = [], []
    for number, file in enumerate(files):
        table, groups = _read_labels(file, layout)
        tables.append(table)
        place = [np.stack([np.full(n, g), np.arange(n)], axis=1) for g, n in enumerate(groups)]
        inside = np.concatenate([*place, np.empty((0, 2), np.int64)])
        rows.append(np.concatenate([np.full((len(inside), 1), number), inside], axis=1).astype(np.int64))
    where = np.concatenate(rows)
    labels, pairs = _labels(tables, layout, len(where))
    keys = _keys(files, tables, layout)
    bad = tuple(BadFile(keys[i], "scan", "the row has no label") for i in np.flatnonzero(labels < 0))
    order = np.array([i for i in key_order(keys) if labels[i] >= 0], dtype=np.int64)
    if not len(order):
        raise no_images(path, bad)
    keys = [keys[i] for i in order]
    labels, where = labels[order], where[order]
    classes, imagenet_ids = build_classes(pairs)
    if len(classes) == 1:
        notes.append(f"one class only: {classes[0].name}")
    seen = [file.stat() for file in files]
    stamps = [file_stamp(stat.st_size, stat.st_mtime_ns) for stat in seen]
    return Source(
        path=path,
        kind="parquet",
        keys=keys,
        labels=labels,
        classes=classes,
        bad=bad,
        notes=tuple(notes),
        digest=digest_lines(keys, labels, (stamps[i] for i in where[:, 0].tolist()), classes),
        imagenet_ids=imagenet_ids,
        reader=_ParquetReader(files, layout.image, where),
    )


def _find_columns(file: Path, notes: list[str]) -> _Layout:
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise D2CError("this file is not readable Parquet", where=file, found=error) from error
    images = [field for field in schema if _image_leaf(field) is not None]
    if not images:
        raise D2CError(
            "this Parquet file has no image column",
            where=file,
            found=f"columns {some([f'{field.name}: {field.type}' for field in schema], 12)}",
            expected="a binary column, or a struct with a binary field `bytes`",
        )
    image = min(images, key=lambda field: _rank(field.name, _IMAGE_NAMES))
    if len(images) > 1:
        notes.append(f"images are read from column {image.name}, not {some([f.name for f in images if f != image])}")
    features = _features(schema)
    named = [
        name for name, feature in features.items() if feature.get("_type") == "ClassLabel" and name in schema.names
    ]
    label = _pick_label(file, schema, named)
    names = features.get(label, {}).get("names", ()) if label in named else ()
    leaf = _image_leaf(image)
    has_path = pa.types.is_struct(image.type) and image.type.get_field_index("path") >= 0
    return _Layout(str(leaf), f"{image.name}.path" if has_path else None, label, tuple(names))


def _image_leaf(field: Any) -> str | None:
    def binary(kind: Any) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    if binary(field.type):
        return str(field.name)
    if pa.types.is_struct(field.type):
        inner = field.type.get_field_index("bytes")
        if inner >= 0 and binary(field.type.field(inner).type):
            return f"{field.name}.bytes"
    return None


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """The hub's column descriptions; metadata that is not theirs counts as absent."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _rank(name: str, preferred: Sequence[str]) -> int:
    lower = name.lower()
    return preferred.index(lower) if lower in preferred else len(preferred)


def _pick_label(file: Path, schema: Any, named: list[str]) -> str | None:
    if named:
        return min(named, key=lambda name: _rank(name, _LABEL_NAMES))
    usable = [field.name for field in schema if _is_label(field.type)]
    known = [name for name in usable if name.lower() in _LABEL_NAMES]
    if known or len(usable) <= 1:
        return min(known or usable, key=lambda name: _rank(name, _LABEL_NAMES), default=None)
    raise D2CError(
        "it is not clear which column of this Parquet file is the label",
        where=file,
        found=f"columns {some(usable, 12)}",
        expected="one integer or string column, or one called `label`",
        hint="rename the label column to `label`",
    )


def _is_label(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _read_labels(file: Path, layout: _Layout) -> tuple[Any, list[int]]:
    """Labels and paths of one file, and its rows per row group."""
    columns = [name for name in (layout.label, layout.path) if name]
    try:
        with pq.ParquetFile(file) as parquet:
            groups = [parquet.metadata.row_group(g).num_rows for g in range(parquet.metadata.num_row_groups)]
            missing = {name.split(".")[0] for name in (*columns, layout.image)} - set(parquet.schema_arrow.names)
            if missing:
                raise D2CError("a Parquet file lacks a column of the others", where=file, expected=sorted(missing))
            return parquet.read(columns=columns), groups
    except (pa.ArrowException, OSError) as error:
        raise D2CError("this file is not readable Parquet", where=file, found=error) from error


def _labels(tables: Sequence[Any], layout: _Layout, count: int) -> tuple[npt.NDArray[np.int32], list[tuple[str, str]]]:
    """[N] class ids, -1 where there is no label, and (source_id, name) of each class in order."""
    if layout.label is None:
        return np.zeros(count, np.int32), [("images", "images")]
    values = [value for table in tables for value in table.column(layout.label).to_pylist()]
    # Hubs write -1 where a label is withheld.
    present = sorted({value for value in values if value is not None and value != -1})
    ids = {value: i for i, value in enumerate(present)}
    labels = np.array([ids.get(value, -1) for value in values], dtype=np.int32)
    names = list(layout.names)
    ids_by_name = synsets_by_name(names) or (names if len(set(names)) == len(names) else [])
    pairs = [(_at(ids_by_name, value), _at(names, value)) for value in present]
    return labels, pairs


def _at(names: Sequence[str], value: int | str) -> str:
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else str(value)


def _keys(files: Sequence[Path], tables: Sequence[Any], layout: _Layout) -> list[str]:
    if layout.path:
        struct = layout.path.split(".")[0]
        paths = [p for table in tables for p in pc.struct_field(table.column(struct), "path").to_pylist()]
        if all(path and not unsafe_name(path) for path in paths) and len(set(paths)) == len(paths):
            return paths
    return [f"{file.stem}/{row:08d}" for file, table in zip(files, tables, strict=True) for row in range(len(table))]
