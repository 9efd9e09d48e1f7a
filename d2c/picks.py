"""The picked images, joined by key and content hash with the source they came from."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from d2c import batches, runtime
from d2c.batches import Batch
from d2c.classmap import mapped_classes
from d2c.errors import D2CError
from d2c.images import BadImage
from d2c.progress import Bar
from d2c.scorers import Denoiser
from d2c.sources import Source
from d2c.workspace import SCORES, SELECTION, Workspace
from formats.files import read_table
from formats.hashing import xxh3

_AT_ONCE = 256


@dataclass(frozen=True)
class Picks:
    """A table of picked images, sorted by key.

    Columns: key, label, score, class_rank, rank, and from the scores xxh3 (of the file's bytes), bytes, width, height.
    """

    table: pa.Table

    @property
    def keys(self) -> list[str]:
        return list(self.table["key"].to_pylist())

    def __len__(self) -> int:
        return int(self.table.num_rows)


def load(workspace: Workspace, selection: str) -> Picks:
    """The picks of a finished selection."""
    chosen = read_table(workspace.selection(selection).output(SELECTION))
    scored = read_table(workspace.scores.output(SCORES), columns=["key", "xxh3", "bytes", "width", "height"])
    joined = chosen.join(scored, keys="key", join_type="inner")
    if joined.num_rows != chosen.num_rows:
        raise D2CError(
            "the selection names images that have no score",
            where=workspace.path,
            found=f"{chosen.num_rows - joined.num_rows} of {chosen.num_rows} keys",
            hint="run d2c select again",
        )
    return Picks(joined.sort_by("key"))


def everything(source: Source, *, limit: int, seed: int) -> Picks:
    """All images of an unscored source, or a random ``limit`` of them; what only scoring finds out is null."""
    rows = np.arange(len(source))
    if len(source) > limit:
        rows = np.sort(runtime.rng("subset", seed).permutation(len(source))[:limit])
    table = pa.table({"key": [source.keys[row] for row in rows], "label": pa.array(source.labels[rows], pa.int32())})
    for name, kind in _UNKNOWN.items():
        table = table.append_column(name, pa.nulls(len(rows), kind))
    return Picks(table)


_UNKNOWN = {
    "score": pa.float64(),
    "class_rank": pa.int32(),
    "rank": pa.int32(),
    "xxh3": pa.string(),
    "bytes": pa.int64(),
    "width": pa.int32(),
    "height": pa.int32(),
}


def read(
    source: Source, picks: Picks, rows: Sequence[int], size: int, *, batch: int, threads: int, keep_bad: bool = False
) -> Iterator[Batch]:
    """Read the picks in ``rows``, in batches; the batch's ``indices`` are rows of ``picks``.

    Raises:
        D2CError: an image is gone, unreadable (unless ``keep_bad``, which leaves it out), or not the one that was
            scored.
    """
    keys = picks.table["key"]
    digests = picks.table["xxh3"]
    row_of = {_locate(source, keys[row].as_py()): row for row in rows}
    for loaded in batches.load(source, list(row_of), size, batch=batch, threads=threads):
        for bad in loaded.bad:
            if not keep_bad:
                raise D2CError(
                    "a picked image can no longer be read",
                    where=f"{source.location}: {bad.key}",
                    found=bad.reason,
                    hint="run d2c score again: it takes note of what changed",
                )
        own = [row_of[int(index)] for index in loaded.indices]
        for row, digest in zip(own, loaded.digests, strict=True):
            expected = digests[row].as_py()
            if expected is not None:
                check_same(source, keys[row].as_py(), digest, expected)
        yield replace(loaded, indices=np.asarray(own, dtype=np.int64))


def check_same(source: Source, key: str, digest: str, scored: str) -> None:
    """Hold the xxh3 of an image's file against that which was scored.

    Raises:
        D2CError: they differ.
    """
    if digest != scored:
        raise D2CError(
            "an image changed since it was scored",
            where=f"{source.location}: {key}",
            found=f"xxh3 {digest}",
            expected=f"xxh3 {scored}",
            hint="run d2c score again",
        )


def changed(source: Source, picks: Picks, bar: Bar, *, threads: int) -> list[str]:
    """Keys of the picks whose files cannot be read, or are not those of the table; every file is read once.

    Raises:
        D2CError: an image is gone.
    """
    found: list[str] = []
    for looked, others in _looked_at(source, picks.keys, picks.table["xxh3"].to_pylist(), threads):
        found += others
        bar.advance(looked)
    return found


def unchanged(source: Source, table: pa.Table, size: int, *, threads: int) -> bool:
    """Whether the images of ``table`` (key, xxh3) have the bytes they had, whatever the times of their files.

    Where xxh3 is null, the image could not be used then and must not be usable now, at ``size`` pixels. Files are read
    until one differs.

    Raises:
        D2CError: an image is gone.
    """
    good, bad = (table.filter(mask) for mask in (table["xxh3"].is_valid(), table["xxh3"].is_null()))
    for _, others in _looked_at(source, good["key"].to_pylist(), good["xxh3"].to_pylist(), threads):
        if others:
            return False
    unusable = [_locate(source, key) for key in bad["key"].to_pylist()]
    return not any(map(len, batches.load(source, unusable, size, batch=_AT_ONCE, threads=threads)))


def _looked_at(
    source: Source, keys: Sequence[str], digests: Sequence[str], threads: int
) -> Iterator[tuple[int, list[str]]]:
    """How many images were read, and the keys of those whose bytes have another xxh3; a few at a time."""
    rows = [(_locate(source, key), digest) for key, digest in zip(keys, digests, strict=True)]
    with ThreadPoolExecutor(threads) as pool:
        # A few at a time, so that an interruption need not wait for all of them.
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            same = pool.map(lambda row: _is(source, *row), some)
            yield len(some), [source.keys[index] for (index, _), good in zip(some, same, strict=True) if not good]


def _is(source: Source, index: int, digest: str) -> bool:
    try:
        return xxh3(source.read(index)) == digest
    except BadImage:
        return False


def _locate(source: Source, key: str) -> int:
    index = bisect_left(source.keys, key)
    if index == len(source.keys) or source.keys[index] != key:
        raise D2CError(
            "a picked image is no longer in the source",
            where=source.location,
            found=f"no {key}",
            hint="run d2c score again",
        )
    return index


def class_indices(
    source: Source, scorer: Denoiser, class_map: Path | None = None
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The scorer's index of each class of the source: int64 [C].

    By ``class_map`` where there is one (`d2c.classmap`); else by name where the scorer knows its classes, by the
    official order for ImageNet-1k, else by number, where the numbers of classes agree.

    Raises:
        D2CError: the scorer was trained on another class list.
    """
    names, known = [row.source_id for row in source.classes], scorer.spec.num_classes
    if class_map is not None:
        return mapped_classes(class_map, names, known)
    if scorer.classes is not None and set(names) <= set(scorer.classes):
        return np.array([scorer.classes.index(name) for name in names], dtype=np.int64)
    if scorer.classes is None and source.imagenet_ids is not None and known == 1000:
        return source.imagenet_ids
    if scorer.classes is None and known == len(names):
        return np.arange(known, dtype=np.int64)
    strange = [name for name in names if name not in (scorer.classes or ())]
    raise D2CError(
        "the scorer was trained on another class list than the source's",
        where=source.location,
        found=f"{len(names)} classes" + (f", unknown: {', '.join(strange[:3])}" if scorer.classes else ""),
        expected=f"{known} classes" + (f": {', '.join(scorer.classes[:3])} ..." if scorer.classes else ""),
        hint="say which class is which with --class-map FILE.csv, or use a scorer of this data: --scorer train",
    )
