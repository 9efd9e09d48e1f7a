"""Duplicates among scored images, and between them and a held-out source: found, noted, and dropped where asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from d2c import batches, duplicates, runtime
from d2c.duplicates import KEEP, Found, Keep, Read
from d2c.errors import UsageError
from d2c.labelling import OWN
from d2c.progress import Progress
from d2c.score_table import Merged
from d2c.sources import Source
from d2c.workspace import DUPLICATES, LEAKS

Duplicates: TypeAlias = Literal["report", "drop", "off"]
"""What becomes of duplicates: they are listed, or all but one of each group are dropped too, or nobody looks."""
_BATCH = 256


def check(what: Duplicates, keep: Keep) -> None:
    """Refuse choices that there are not.

    Raises:
        UsageError: this is one.
    """
    if what not in get_args(Duplicates):
        raise UsageError(
            "nobody knows what to do with duplicates", found=what, expected=", ".join(get_args(Duplicates))
        )
    if keep not in KEEP:
        raise UsageError("unknown rule for keeping duplicates", found=keep, expected=", ".join(KEEP))


@dataclass(frozen=True)
class Deduplication:
    """What to do with duplicates; ``held_out`` images are looked for among the scored ones."""

    duplicates: Duplicates
    keep: Keep
    size: int
    threads: int
    labels: str

    def run(
        self, merged: Merged, source: Source, held_out: Source | None, progress: Progress
    ) -> tuple[Merged, dict[str, Any], dict[str, pa.Table]]:
        """Find duplicates and leaks.

        Returns:
            What stays; the summary: ``duplicates`` (then, removed, groups, images, removable, conflicts, examples,
            skipped), None where nobody looked, ``leaks`` and ``held_out`` (images, bad), None without a held-out
            source; and the tables ``duplicates.parquet`` and ``leaks.parquet``, empty where nobody looked.
        """
        found_in_source: dict[str, Any] | None = None
        listed, leaks, theirs = _NO_DUPLICATES, None, None
        if self.duplicates != "off" or held_out is not None:
            prints, places = merged.prints, _places(source, merged.scores["key"])
            if held_out is not None:
                theirs, rows = self._describe(held_out, progress)
                prints = pa.concat_tables([prints, theirs.select(prints.column_names)])
                places = np.concatenate([places, rows])
            found = duplicates.find(prints, self._reader(source, held_out, merged.scores.num_rows, places))
            if found.skipped:
                progress.warn(f"{found.skipped:,} comparisons of very similar images were left out: some may be missed")
            if self.duplicates != "off":
                listed, found_in_source = self._resolve(merged.scores, found)
            if theirs is not None:
                leaks = duplicates.leaks(merged.scores["key"], theirs["key"], found)
        removed = 0
        if self.duplicates == "drop":
            gone = listed.filter(pc.invert(listed["kept"]))["key"]
            removed = len(gone)
            merged = merged.without(pc.is_in(merged.scores["key"], value_set=gone.combine_chunks()).to_numpy())
        return (
            merged,
            {
                "duplicates": None
                if found_in_source is None
                else {"then": self.duplicates, "removed": removed, **found_in_source},
                "leaks": None if leaks is None else leaks.num_rows,
                "held_out": None if theirs is None or held_out is None else _told(held_out, theirs.num_rows, progress),
            },
            {DUPLICATES: listed, LEAKS: _NO_LEAKS if leaks is None else leaks},
        )

    def _resolve(self, scores: pa.Table, found: Found) -> tuple[pa.Table, dict[str, Any]]:
        if self.labels == OWN:
            return duplicates.resolve(scores, found, self.keep)
        # Clusters are no labels that could contradict each other.
        place = scores.column_names.index("label")
        one = scores.set_column(place, "label", pa.array(np.zeros(scores.num_rows, np.int32)))
        listed, summary = duplicates.resolve(one, found, self.keep)
        own = scores["label"].take(pc.index_in(listed["key"], value_set=scores["key"].combine_chunks()))
        return listed.set_column(listed.column_names.index("label"), "label", own), summary

    def _describe(self, held_out: Source, progress: Progress) -> tuple[pa.Table, npt.NDArray[np.int64]]:
        """key, pixels_xxh3 and phash of the readable images of a held-out source, and their indices in it."""
        keys, pixels, hashed, rows = [], [], [], [np.empty(0, np.int64)]
        with progress.bar("held-out", len(held_out), "image") as bar:
            order = held_out.storage_order().tolist()
            for batch in batches.load(held_out, order, self.size, batch=_BATCH, threads=self.threads):
                prints = duplicates.fingerprints(batch.pixels)
                keys += [held_out.keys[index] for index in batch.indices]
                pixels += prints[0]
                hashed += prints[1]
                rows.append(batch.indices)
                bar.advance(len(batch) + len(batch.bad))
        if not keys:
            raise UsageError("no held-out image can be read", where=held_out.location, found=f"{len(held_out)} files")
        columns = {"key": keys, "pixels_xxh3": pixels, "phash": pa.array(hashed, pa.binary())}
        return pa.table(columns), np.concatenate(rows)

    def _pixels(self, source: Source, indices: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.uint8]]:
        """Pixels of all ``indices``, in order; what can no longer be read is noise, which is like no other image."""
        for start in range(0, len(indices), _BATCH):
            wanted = indices[start : start + _BATCH].tolist()
            loaded = next(batches.load(source, wanted, self.size, batch=_BATCH, threads=self.threads))
            found = dict(zip(loaded.indices.tolist(), loaded.pixels, strict=True))
            for index in set(wanted) - set(found):
                noise = runtime.rng("unreadable", source.keys[index]).integers(0, 256, (self.size, self.size, 3))
                found[index] = noise.astype(np.uint8)
            yield np.stack([found[index] for index in wanted])

    def _reader(self, source: Source, held_out: Source | None, ours: int, places: npt.NDArray[np.int64]) -> Read:
        def read(rows: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.uint8]]:
            for where, chosen in ((source, rows[rows < ours]), (held_out, rows[rows >= ours])):
                if where is not None:
                    yield from self._pixels(where, places[chosen])

        return read


def _told(held_out: Source, images: int, progress: Progress) -> dict[str, int]:
    bad = len(held_out) + len(held_out.bad) - images
    for note in held_out.notes:
        progress.say(f"held-out: {note}")
    if bad:
        progress.warn(f"{bad} held-out files cannot be used, so leaks of them are not seen")
    return {"images": images, "bad": bad}


def _places(source: Source, keys: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    if len(keys) == len(source):
        return np.arange(len(keys))  # all of them, and both are sorted
    return np.asarray(pc.index_in(keys, value_set=pa.array(source.keys)).to_numpy(), dtype=np.int64)


_NO_DUPLICATES = pa.schema(
    [
        ("group", pa.int32()),
        ("key", pa.string()),
        ("label", pa.int32()),
        ("kind", pa.string()),
        ("distance", pa.float32()),
        ("twin", pa.string()),
        ("kept", pa.bool_()),
        ("conflict", pa.bool_()),
    ]
).empty_table()
_NO_LEAKS = pa.schema(
    [("key", pa.string()), ("held_out_key", pa.string()), ("kind", pa.string()), ("distance", pa.float32())]
).empty_table()
