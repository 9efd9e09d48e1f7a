"""Pictures in a folder that ``datasets`` saved (``save_to_disk``): Arrow streams, mapped into memory, and two JSONs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from d2c.errors import D2CError
from d2c.images import BadImage
from d2c.sources.base import Labels, Source, some
from d2c.sources.columns import Places, Table, assemble, find_columns, image_bytes
from d2c.sources.places import local_file
from formats.hashing import parse_json

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


@dataclass(frozen=True)
class _SavedReader:
    columns: Sequence[Any]  # of each file, the pictures' bytes
    rows: Places

    def read(self, index: int) -> bytes:
        file, row = self.rows[index].tolist()
        data: bytes | None = self.columns[file][row].as_py()
        if data is None:
            raise BadImage("the row has no image bytes")
        return data

    def positions(self) -> npt.NDArray[np.int64]:
        return (self.rows[:, 0] << 40) | self.rows[:, 1]


def is_saved(path: Path) -> bool:
    """Whether ``datasets`` has saved a dataset, or several splits of one, in this folder."""
    return (path / _SPLITS).is_file() or ((path / _STATE).is_file() and (path / _INFO).is_file())


def open_saved(path: Path, labels: Labels) -> Source:
    """Read labels and paths of all rows, no picture. Of several splits, ``train`` is used.

    Columns, labels and keys are found as in Parquet; classes are named by ``dataset_info.json``.

    Raises:
        D2CError: a damaged or missing file, no ``train`` among several splits, or what `find_columns` says.
    """
    notes: list[str] = []
    base = path
    if (path / _SPLITS).is_file():
        base = path / _choose_split(path, notes)
    names = [entry["filename"] for entry in _json(base / _STATE, "_data_files", list)]
    features = _json(base / _INFO, "features", dict)
    tables, columns = [], []
    layout = None
    for name in names:
        rows = _map(base / name)
        if layout is None:
            layout = find_columns(str(base / name), rows.schema, labels, notes, features)
        found = local_file(base / name)
        tables.append(Table(found.stem, found.stamp, rows))
        columns.append(_pictures(base / name, rows, layout.image))
    if layout is None:
        raise D2CError("this saved dataset has no data files", where=base / _STATE)
    return assemble("dataset", str(path.resolve()), layout, tables, notes, lambda rows: _SavedReader(columns, rows))


def _choose_split(path: Path, notes: list[str]) -> str:
    splits = [str(name) for name in _json(path / _SPLITS, "splits", list)]
    if "train" not in splits and len(splits) != 1:
        raise D2CError(
            "it is not clear which split of this dataset to read",
            where=path,
            found=some(splits, 12),
            expected="a split called train, or a single one",
            hint=f"give the folder of a split, such as {path / splits[0]}" if splits else None,
        )
    chosen = "train" if "train" in splits else splits[0]
    others = [name for name in splits if name != chosen]
    notes.append(f"images are read from {chosen}/" + (f"; not from {some(others)}" if others else ""))
    return chosen


def _map(file: Path) -> Any:
    try:
        with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
            return stream.read_all()
    except (pa.ArrowException, OSError) as error:
        raise D2CError("this file is not a readable Arrow stream", where=file, found=error) from error


def _pictures(file: Path, rows: Any, image: str) -> Any:
    try:
        column = image_bytes(rows.column(image.split(".", maxsplit=1)[0]))
        # Arrow trusts its offsets: a damaged one would end the process instead of raising.
        column.validate(full=True)
        return column
    except (pa.ArrowException, KeyError) as error:
        raise D2CError("this file of a saved dataset is damaged", where=file, found=error) from error


def _json(file: Path, name: str, kind: type) -> Any:
    try:
        value = parse_json(file.read_text("utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise D2CError("this file of a saved dataset cannot be read", where=file, found=error) from error
    if not isinstance(value, kind):
        raise D2CError("this file of a saved dataset is not as expected", where=file, found=f"{name}: {value}")
    return value
