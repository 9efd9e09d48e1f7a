"""Tables with an image column, as dataset hubs write them: which columns hold what, and the labels and keys of rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from d2c.errors import D2CError
from d2c.sources.base import (
    ONE_CLASS,
    BadFile,
    Kind,
    Labels,
    Reader,
    Source,
    build_classes,
    digest_lines,
    key_order,
    no_images,
    some,
    unsafe_name,
)
from d2c.sources.imagenet import synsets_by_name

_IMAGE_NAMES = ("image", "img", "jpg", "png", "picture", "bytes")
Places = npt.NDArray[np.int64]
"""[N, 2]: the file and the row in it of each picture."""
_LABEL_NAMES = ("label", "labels", "class", "class_id", "cls", "target", "category", "synset", "fine_label", "y")


@dataclass(frozen=True)
class Layout:
    """Names of columns: ``image`` and ``path`` as Parquet names leaves ("image.bytes"); ``names`` are the classes'."""

    image: str
    path: str | None
    label: str | None
    names: tuple[str, ...]
    unlabelled: bool

    @property
    def columns(self) -> list[str]:
        """What must be read to open the source."""
        return [name for name in (self.label, self.path) if name]


@dataclass(frozen=True)
class Table:
    """The label and path columns of one file; ``stem`` begins its keys, ``stamp`` is its identity."""

    stem: str
    stamp: str
    rows: Any


def find_columns(where: str, schema: Any, labels: Labels, notes: list[str], features: Any = None) -> Layout:
    """Find the columns by type, then by name; ``features`` are the hub's descriptions where they lie beside the data.

    Raises:
        D2CError: no image column, or several that may be the label.
    """
    images = [field for field in schema if _image_leaf(field) is not None]
    if not images:
        raise D2CError(
            "this table has no image column",
            where=where,
            found=f"columns {some([f'{field.name}: {field.type}' for field in schema], 12)}",
            expected="a binary column, or a struct with a binary field `bytes`",
        )
    image = min(images, key=lambda field: _rank(field.name, _IMAGE_NAMES))
    if len(images) > 1:
        notes.append(f"images are read from column {image.name}, not {some([f.name for f in images if f != image])}")
    leaf = str(_image_leaf(image))
    has_path = pa.types.is_struct(image.type) and image.type.get_field_index("path") >= 0
    path = f"{image.name}.path" if has_path else None
    if labels == "none":
        return Layout(leaf, path, None, (), True)
    described = features or _hub_features(schema)
    features = {name: facts for name, facts in described.items() if isinstance(facts, dict)} if described else {}
    named = [
        name for name, feature in features.items() if feature.get("_type") == "ClassLabel" and name in schema.names
    ]
    label = _pick_label(where, schema, named)
    names = features.get(label, {}).get("names", ()) if label in named else ()
    return Layout(leaf, path, label, tuple(names), False)


def assemble(
    kind: Kind,
    location: str,
    layout: Layout,
    files: Sequence[Table],
    notes: list[str],
    reader: Callable[[Places], Reader],
) -> Source:
    """The source of all rows that have a label; ``reader`` is told where each picture is.

    Raises:
        D2CError: no rows with a label.
    """
    lengths = [len(file.rows) for file in files]
    places = np.empty((sum(lengths), 2), np.int64)
    places[:, 0] = np.repeat(np.arange(len(lengths)), lengths)
    places[:, 1] = np.arange(len(places)) - np.repeat(np.cumsum([0, *lengths])[:-1], lengths)
    labels, pairs = _labels(files, layout, len(places))
    keys = _keys(files, layout)
    bad = tuple(BadFile(keys[i], "scan", "the row has no label") for i in np.flatnonzero(labels < 0))
    order = np.array([i for i in key_order(keys) if labels[i] >= 0], dtype=np.int64)
    if not len(order):
        raise no_images(location, bad)
    keys, labels, places = [keys[i] for i in order], labels[order], places[order]
    classes, imagenet_ids = build_classes(pairs, notes)
    if len(classes) == 1 and not layout.unlabelled:
        notes.append(f"one class only: {classes[0].name}")
    return Source(
        location=location,
        kind=kind,
        keys=keys,
        labels=labels,
        classes=classes,
        bad=bad,
        notes=tuple(notes),
        digest=digest_lines(keys, labels, (files[i].stamp for i in places[:, 0].tolist()), classes),
        imagenet_ids=imagenet_ids,
        reader=reader(places),
        stamp=lambda index: files[int(places[index, 0])].stamp,
    )


def image_bytes(column: Any) -> Any:
    """The binary column inside an image column."""
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


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


def _hub_features(schema: Any) -> Any:
    """The hub's column descriptions in the schema; metadata that is not theirs counts as absent."""
    try:
        return json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return None


def _rank(name: str, preferred: Sequence[str]) -> int:
    lower = name.lower()
    return preferred.index(lower) if lower in preferred else len(preferred)


def _pick_label(where: str, schema: Any, named: list[str]) -> str | None:
    if named:
        return min(named, key=lambda name: _rank(name, _LABEL_NAMES))
    usable = [field.name for field in schema if _is_label(field.type)]
    known = [name for name in usable if name.lower() in _LABEL_NAMES]
    if known or len(usable) <= 1:
        return min(known or usable, key=lambda name: _rank(name, _LABEL_NAMES), default=None)
    raise D2CError(
        "it is not clear which column of this table is the label",
        where=where,
        found=f"columns {some(usable, 12)}",
        expected="one integer or string column, or one called `label`",
        hint="rename the label column to `label`",
    )


def _is_label(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _labels(files: Sequence[Table], layout: Layout, count: int) -> tuple[npt.NDArray[np.int32], list[tuple[str, str]]]:
    """[N] class ids, -1 where there is no label, and (source_id, name) of each class in order."""
    if layout.label is None:
        name = ONE_CLASS if layout.unlabelled else "images"
        return np.zeros(count, np.int32), [(name, name)]
    values = [value for file in files for value in file.rows.column(layout.label).to_pylist()]
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


def _keys(files: Sequence[Table], layout: Layout) -> list[str]:
    if layout.path:
        struct = layout.path.split(".")[0]
        paths = [p for file in files for p in pc.struct_field(file.rows.column(struct), "path").to_pylist()]
        if all(path and not unsafe_name(path) for path in paths) and len(set(paths)) == len(paths):
            return paths
    return [f"{file.stem}/{row:08d}" for file in files for row in range(len(file.rows))]
