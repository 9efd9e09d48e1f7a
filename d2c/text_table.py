"""Text embeddings of the user's own, from a file: one row per class, found by the class and not by a prompt."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from d2c.encoders import EncoderInfo, first_line, weights_digest
from d2c.errors import D2CError
from d2c.text import TOKENS
from formats.files import read_table

KEYS = ("source_id", "name")
"""Columns that may name the class; the first that is there does."""
EMBEDS, MASK = "text_embeds", "text_mask"
_FORM = (
    f"{' or '.join(KEYS)}: the class; {EMBEDS}: numbers [{TOKENS}, W], or [W] for one token; "
    f"and, if wanted, {MASK}: 0 or 1 [{TOKENS}]"
)


@dataclass(frozen=True)
class TextTable:
    """What a table says of C classes: embeds float16 [C, 16, W], mask uint8 [C, 16]; masked positions are zero.

    ``info.weights_xxh3`` is the digest of these two arrays, so it does not depend on the file's kind or order.
    """

    info: EncoderInfo
    embeds: NDArray[np.float16]
    mask: NDArray[np.uint8]


def is_table(name: str | None) -> bool:
    """Whether a text encoder's name means a table."""
    return name is not None and name.endswith((".parquet", ".npz"))


def load(path: Path, classes: Sequence[Mapping[str, Any]]) -> TextTable:
    """The rows of ``classes`` (each with ``source_id`` and ``name``), in that order; other rows are left alone.

    A Parquet file has these as columns (lists, or lists of lists), an npz file as arrays with the classes first:
    ``source_id`` or ``name`` (text), ``text_embeds`` [16, W] or [W], and where not every token counts ``text_mask``
    [16]. A row of one token gets that one alone.

    Raises:
        D2CError: the file is missing or no such table; a class is missing or there twice, has no token, or has values
            that are NaN or do not fit float16.
    """
    columns = _read(path)
    key = next((name for name in KEYS if name in columns), None)
    if key is None or EMBEDS not in columns:
        raise _no_table(path, f"columns {', '.join(sorted(columns))}")
    rows = _rows(path, [str(value) for value in columns[key].tolist()], [str(row[key]) for row in classes])
    values = columns[EMBEDS][rows]
    if values.dtype.kind not in "fiu" or values.shape[1:-1] not in ((), (TOKENS,)) or values.shape[-1] < 1:
        raise _no_table(path, f"{EMBEDS} of {values.dtype} {list(values.shape)}")
    if values.ndim == 2:
        alone = np.zeros((len(rows), TOKENS, values.shape[1]), values.dtype)
        alone[:, 0] = values
        values, mask = alone, np.broadcast_to(np.arange(TOKENS) == 0, (len(rows), TOKENS))
    else:
        mask = columns[MASK][rows] if MASK in columns else np.ones((len(rows), TOKENS), np.uint8)
    if mask.shape != values.shape[:2] or not np.isin(mask, (0, 1)).all():
        raise _no_table(path, f"{MASK} of {mask.dtype} {list(mask.shape)}")
    with np.errstate(over="ignore"):
        embeds = np.where(mask[..., None] == 1, values, 0).astype(np.float16)
    for problem, wrong in {
        "a class has no token that counts": ~mask.any(axis=1),
        "a class has text embeddings that are NaN or too large for float16": ~np.isfinite(embeds).all(axis=(1, 2)),
    }.items():
        if wrong.any():
            raise D2CError(problem, where=path, found=f"{key} {classes[int(wrong.argmax())][key]}", hint="mend its row")
    whole = mask.astype(np.uint8)
    info = EncoderInfo(
        name="table",
        source=f"file:{path.name}",
        revision="",
        weights_xxh3=weights_digest({EMBEDS: torch.from_numpy(embeds), MASK: torch.from_numpy(whole)}),
        dim=embeds.shape[2],
        tokens=TOKENS,
        layer="the user's own",
        settings=(("class", key),),
    )
    return TextTable(info, embeds, whole)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise D2CError("there is no such table of text embeddings", where=path, hint="check the path")
    if path.suffix == ".parquet":
        table = read_table(path)
        return {name: _array(path, name, table[name]) for name in table.column_names if name in (*KEYS, EMBEDS, MASK)}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: np.atleast_1d(arrays[name]) for name in arrays.files if name in (*KEYS, EMBEDS, MASK)}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise _no_table(path, first_line(error)) from error


def _array(path: Path, name: str, column: pa.ChunkedArray) -> NDArray[Any]:
    """A column of numbers, texts, or lists of lists of numbers, all of one length, as one array."""
    values, shape = column.combine_chunks(), [len(column)]
    while isinstance(values, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            raise _no_table(path, f"{name} with rows of {sorted(map(str, lengths))[:3]} values")
        shape.append(lengths[0])
        values = values.flatten()
    found: NDArray[Any] = values.to_numpy(zero_copy_only=False).reshape(shape)
    return found


def _rows(path: Path, listed: list[str], wanted: list[str]) -> list[int]:
    places = {name: row for row, name in enumerate(listed)}
    if len(places) < len(listed):
        twice = next(name for row, name in enumerate(listed) if places[name] != row)
        raise D2CError("a class is in the table of text embeddings twice", where=path, found=twice)
    missing = [name for name in wanted if name not in places]
    if missing:
        raise D2CError(
            "the table of text embeddings lacks classes",
            where=path,
            found=f"{len(missing)} of {len(wanted)} missing: {', '.join(missing[:5])}",
            expected=f"a row for each, such as {', '.join(listed[:3])}",
        )
    return [places[name] for name in wanted]


def _no_table(path: Path, found: str) -> D2CError:
    return D2CError("this is no table of text embeddings", where=path, found=found, expected=_FORM)
