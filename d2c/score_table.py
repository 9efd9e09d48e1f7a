"""The table of scores, from the losses of every image: means, errors, and the same losses weighted otherwise.

Columns: key, label, score (mean loss), stderr, evals, the named scores of `weighted`, gradient
(`d2c.images.gradient_energy`, a score that needs no model), losses (one per evaluation), xxh3 (of the file's bytes),
bytes, width, height.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from d2c.errors import D2CError
from d2c.estimator import standard_errors
from d2c.transport import Objective
from formats.files import read_table
from formats.hashing import xxh3_lines

Array = np.ndarray[Any, np.dtype[np.float64]]

PART_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int32()),
        ("losses", pa.list_(pa.float32())),
        ("times", pa.list_(pa.float32())),
        ("xxh3", pa.string()),
        ("bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("gradient", pa.float32()),
        ("pixels_xxh3", pa.string()),
        ("phash", pa.binary()),
        ("reason", pa.string()),
    ]
)
"""One row an image of a part: ``times`` where each image has its own, ``reason`` where it could not be read.

``pixels_xxh3`` (of the cropped pixels) and ``phash`` are what duplicates are found by (`d2c.duplicates`)."""

PRINTS = ["pixels_xxh3", "phash"]
BANDS = {"score_low_noise": (0.0, 1 / 3), "score_mid_noise": (1 / 3, 2 / 3), "score_high_noise": (2 / 3, 1.0)}
"""Named scores: the mean loss over the evaluations whose time t, 0 data and 1 noise, lies in [from, to)."""


@dataclass(frozen=True)
class Merged:
    """``scores`` sorted by key, ``bad`` the rows that have a reason instead, ``losses`` [N, evals] of ``scores``.

    ``prints``: pixels_xxh3 and phash of ``scores``.
    """

    scores: pa.Table
    bad: pa.Table
    losses: Array
    prints: pa.Table

    def without(self, dropped: npt.NDArray[np.bool_]) -> Merged:
        """The same but for some of ``scores``: bool [N]."""
        kept = pa.array(~dropped)
        return Merged(self.scores.filter(kept), self.bad, self.losses[~dropped], self.prints.filter(kept))

    @property
    def fingerprint(self) -> str:
        """xxh3 over "key, bytes, xxh3" of every image in key order: the same wherever the same images lie."""
        return "xxh3-128:" + xxh3_lines(self._lines())

    def _lines(self) -> Iterator[str]:
        for batch in self.scores.select(["key", "bytes", "xxh3"]).to_batches(max_chunksize=65_536):
            for key, size, digest in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield f"{key}\t{size}\t{digest}"


def merge(
    parts: Sequence[Path], where: str, times: Array | None, objective: Objective, *, prints: bool = True
) -> Merged:
    """Join the parts' tables; ``times`` [evals] are those that all images share, None where the parts hold them.

    Without ``prints`` the table of what duplicates are found by has no columns.

    Raises:
        D2CError: no image could be read.
    """
    dropped = {*(() if times is None else ("times",)), *(() if prints else PRINTS)}
    columns = [name for name in PART_SCHEMA.names if name not in dropped]
    table = pa.concat_tables([read_table(path, columns) for path in parts])
    bad = table.filter(table["reason"].is_valid()).select(["key", "reason"]).combine_chunks()
    if bad.num_rows == table.num_rows:
        found = f"{bad.num_rows} files, the first: {bad['key'][0]}: {bad['reason'][0]}"
        raise D2CError("no image could be read", where=where, found=found)
    # One copy, not one each for filtering and sorting, and of one column at a time: a million rows are hundreds of
    # megabytes.
    order = pc.sort_indices(table["key"])
    order = order.filter(table["reason"].is_null().combine_chunks().take(order))
    sorted_columns = {}
    for name in table.column_names:
        if name != "reason":
            sorted_columns[name] = pa.chunked_array([table[name].combine_chunks().take(order)])
        table = table.drop_columns([name])
    good = pa.table(sorted_columns)
    losses = _matrix(good["losses"])
    drawn = _matrix(good["times"]) if times is None else times[None]
    named = {
        "score": losses.mean(axis=1),
        "stderr": standard_errors(losses),
        "evals": np.full(len(losses), losses.shape[1], np.int32),
        **weighted(losses, drawn, objective),
    }
    scores = good.select(["key", "label"])
    for name, values in named.items():
        scores = scores.append_column(name, pa.array(values, from_pandas=True))
    for name in ("gradient", "losses", "xxh3", "bytes", "width", "height"):
        scores = scores.append_column(name, good[name])
    return Merged(scores, bad, losses, good.select(PRINTS if prints else []))


def weighted(losses: Array, times: Array, objective: Objective) -> dict[str, Array]:
    """Other scores from the same losses [N, E] at ``times`` [N or 1, E]: each is a column [N] of its own.

    `BANDS`, and what the error of the same predictions is when read as noise (``score_eps``) or as velocity
    (``score_velocity``): the model's own reading is ``score``. NaN for an image without an evaluation in a band.
    """
    columns = {}
    for name, (start, end) in BANDS.items():
        inside = ((times >= start) & (times < end)) | ((end == 1.0) & (times >= end))
        count = np.broadcast_to(inside, losses.shape).sum(axis=1)
        total = np.where(inside, losses, 0).sum(axis=1)
        columns[name] = np.divide(total, count, out=np.full(len(losses), np.nan), where=count > 0)
    for reading in ("eps", "velocity"):
        if reading != objective.name:
            columns[f"score_{reading}"] = (losses * _factor(objective, reading, times)).mean(axis=1)
    return columns


def _factor(objective: Objective, reading: str, times: Array) -> Array:
    """What the squared error of a prediction is multiplied by when it is read as noise or velocity."""
    t = torch.from_numpy(np.ascontiguousarray(times, np.float64)).reshape(-1)
    zero, one = (torch.full((len(t), 1, 1, 1), value, dtype=torch.float64) for value in (0.0, 1.0))
    # Every reading is linear in the prediction, so two predictions that differ by one tell by how much it grows.
    low, high = (getattr(objective.convert(value, zero, t), reading) for value in (zero, one))
    return np.asarray((high - low).square().reshape(times.shape).numpy())


def _matrix(column: pa.ChunkedArray) -> Array:
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    matrix: Array = flat.reshape(len(column), -1).astype(np.float64)
    return matrix
