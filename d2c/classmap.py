"""A user's own map from a source's classes to a scorer's: a JSON object, or CSV lines ``source_id,index``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2c.errors import D2CError
from formats.files import read_json

_HEADER = ["source_id", "index"]
_FORM = '{"n01440764": 0, ...} or lines n01440764,0'


def read_class_map(path: Path) -> dict[str, int]:
    """The scorer's class index by the source's own name of the class (its ``source_id``).

    Raises:
        D2CError: the file is missing, no such map, or names a class twice.
    """
    if not path.is_file():
        raise D2CError("there is no such class map", where=path, expected=f"a file with {_FORM}")
    pairs: list[tuple[Any, Any]]
    if path.suffix.lower() == ".json":
        content = read_json(path)  # which refuses a name that is there twice
        pairs = list(content.items()) if isinstance(content, dict) else [(None, content)]
    else:
        pairs = _rows(path)
    mapping: dict[str, int] = {}
    for name, index in pairs:
        if not isinstance(name, str) or type(index) is not int or index < 0:
            raise D2CError("this is no class map", where=path, found=f"{name}: {index}", expected=_FORM)
        if name in mapping:
            raise D2CError("the class map names a class twice", where=path, found=name)
        mapping[name] = index
    return mapping


def _rows(path: Path) -> list[tuple[Any, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise D2CError("this is no class map", where=path, found=error, expected=_FORM) from error
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    rows = rows[1:] if rows[:1] == [_HEADER] else rows
    return [(row[0], int(row[1])) if len(row) == 2 and row[1].isdecimal() else (None, row) for row in rows]


def mapped_classes(path: Path, names: Sequence[str], known: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The scorer's index of each class in ``names``: int64 [C]. Several classes may share one of the scorer's.

    Args:
        path: the map; it may name more classes than the source has.
        names: the source's own names (``source_id``) of its classes, in order.
        known: classes of the scorer.

    Raises:
        D2CError: a class has no entry, or its index is none of the scorer's; and as `read_class_map`.
    """
    mapping = read_class_map(path)
    if absent := [name for name in names if name not in mapping]:
        found = f"no entry for {len(absent)} of {len(names)} classes: {', '.join(absent[:3])}"
        raise D2CError("the class map leaves out classes of the source", where=path, found=found)
    if outside := [f"{name}: {mapping[name]}" for name in names if mapping[name] >= known]:
        found, expected = ", ".join(outside[:3]), f"0 .. {known - 1}"
        raise D2CError(
            "the class map points at classes that the scorer lacks", where=path, found=found, expected=expected
        )
    return np.array([mapping[name] for name in names], dtype=np.int64)
