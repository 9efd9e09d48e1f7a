"""Pictures that are there twice: in one source, where one of them may go, or in a held-out source too, where it leaks.

Exact duplicates have the same cropped pixels. Near and mirrored ones have close perceptual hashes and then, in pictures
read once more, small differences between 16 x 16 thumbnails.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from d2c.errors import D2CError, UsageError
from d2c.phash import close, hashes, thumbnail_distances, thumbnails
from formats.hashing import xxh3

Keep: TypeAlias = Literal["first", "largest", "easiest", "hardest"]
"""Which of some duplicates stays: the first key, most original pixels (then bytes), the lowest or the highest score."""
KEEP: tuple[Keep, ...] = get_args(Keep)
Read: TypeAlias = Callable[[npt.NDArray[np.int64]], Iterable[npt.NDArray[np.uint8]]]
"""Reads rows: their pixels u1 [n, S, S, 3] in that order, in pieces of any size."""

CONFIRMED = 0.5
"""The largest distance of near duplicates: see `d2c.phash.thumbnail_distances`."""
_ORDERS: dict[Keep, list[tuple[str, str]]] = {
    "first": [],
    "largest": [("area", "descending"), ("bytes", "descending")],
    "easiest": [("score", "ascending")],
    "hardest": [("score", "descending")],
}


def fingerprints(pixels: npt.NDArray[np.uint8]) -> tuple[list[str], list[bytes]]:
    """What `find` needs of ``pixels`` u1 [N, S, S, 3]: the columns ``pixels_xxh3`` and ``phash`` (32 bytes each)."""
    packed = hashes(pixels).astype("<u8").tobytes()
    return [xxh3(picture.tobytes()) for picture in pixels], [packed[i : i + 32] for i in range(0, len(packed), 32)]


@dataclass(frozen=True)
class Found:
    """Duplicates among N rows, before anybody decides what to do with them.

    pictures: i8 [N], equal for rows with equal pixels. pairs: i8 [M, 2], pictures that are near or mirrored duplicates,
    mirrored: bool [M], distances: f4 [M]. candidates: pairs of close hashes, of which M were confirmed. skipped:
    comparisons of hashes that were too many to make.
    """

    pictures: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64]
    mirrored: npt.NDArray[np.bool_]
    distances: npt.NDArray[np.float32]
    candidates: int
    skipped: int


def find(images: pa.Table, read: Read) -> Found:
    """Find the duplicates among ``images`` (columns pixels_xxh3, phash).

    Pictures of one colour are duplicates only where they are equal.

    Raises:
        D2CError: ``read`` gave another number of pictures than it was asked for.
    """
    pictures = _numbered(images["pixels_xxh3"])
    first = np.unique(pictures, return_index=True)[1]
    words = images["phash"].cast(pa.binary(32)).take(pa.array(first)).combine_chunks()
    known = np.frombuffer(words.buffers()[1], "<u8", count=4 * len(words)).reshape(-1, 4)
    shaped = np.flatnonzero(known.any(axis=1))
    known = known[shaped].astype(np.uint64)
    del words
    # A million rows are hundreds of megabytes that Arrow keeps for later.
    pa.default_memory_pool().release_unused()
    with ThreadPoolExecutor(2) as threads:  # numpy lets go of the interpreter's lock
        ways = threads.map(lambda mirrored: close(known, mirrored=mirrored), (False, True))
        straight, turned = ways
    pairs = shaped[np.concatenate([straight.pairs, turned.pairs])]
    mirrored = np.arange(len(pairs)) >= len(straight.pairs)
    wanted, places = np.unique(pairs, return_inverse=True)
    rows = first[wanted]
    order = np.argsort(rows)
    apart = thumbnail_distances(_seen(read, rows[order]), np.argsort(order)[places.reshape(-1, 2)], mirrored)
    # A symmetric picture is near in both ways: the closer one counts.
    by = np.lexsort((mirrored, apart, pairs[:, 1], pairs[:, 0]))
    by = by[apart[by] <= CONFIRMED]
    by = by[np.r_[True, (pairs[by][1:] != pairs[by][:-1]).any(axis=1)][: len(by)]]
    return Found(pictures, pairs[by], mirrored[by], apart[by], len(pairs), straight.skipped + turned.skipped)


def resolve(images: pa.Table, found: Found, keep: Keep) -> tuple[pa.Table, dict[str, Any]]:
    """Group the duplicates among ``images`` and say which of them stay.

    Args:
        images: columns key, label and what ``keep`` looks at (width, height, bytes, or score). These are the first
            rows that `find` saw; held-out ones may follow there.
        found: what `find` found.
        keep: which one stays. Ties go to the smaller key.

    Returns:
        A row for each image that has a duplicate, sorted by group and key, and a summary. Columns: group (whatever
        duplicates tie together, directly or through others), key, label, kind, distance, twin, kept, conflict. An
        image that is not kept has a duplicate of its own label that is kept: kind, distance and twin (a key) tell of
        that one. Of one that is kept they tell of the nearest duplicate. conflict: the group has several labels.
        Duplicates with different labels are never a reason to drop one: nobody knows which label is wrong.

    Raises:
        UsageError: the rule is unknown.
    """
    if keep not in KEEP:
        raise UsageError("unknown rule for keeping duplicates", found=keep, expected=", ".join(KEEP))
    pictures = found.pictures[: images.num_rows]
    here = np.bincount(pictures, minlength=int(found.pictures.max(initial=-1)) + 1)
    ties = _Ties.among(here > 0, here > 0, found)
    involved = here > 1
    involved[ties.ours] = True
    table = images.append_column("picture", pa.array(pictures)).filter(pa.array(involved[pictures]))
    # From here on a row's number is its rank: of two duplicates the smaller one stays.
    table = _ranked(table, keep)
    picture, label = table["picture"].to_numpy(), table["label"].to_numpy().astype(np.int64)
    # The first row with the same pixels and label stands for all of them.
    codes = picture * (label.max(initial=0) + 1) + label
    _, leaders, equal = np.unique(codes, return_index=True, return_inverse=True)
    leader = leaders[equal]
    kept = leader == np.arange(len(leader))
    twins = _nearest(picture, ties, len(here))
    twins = twins.where(kept, _Twins.exact(leader))
    gone = _repeats(picture, label, leaders, ties).of(leader)
    twins = gone.where(gone.rows >= 0, twins)
    kept &= gone.rows < 0
    group = _groups(table, ties, len(here))
    several = np.zeros(len(group), dtype=bool)
    several[group[label != label[np.unique(group, return_index=True)[1][group]]]] = True
    kind = np.where(picture[twins.rows] == picture, "exact", np.where(twins.mirrored, "mirrored", "near"))
    result = pa.table(
        {
            "group": pa.array(group, pa.int32()),
            "key": table["key"],
            "label": table["label"],
            "kind": pa.array(kind, pa.string()),
            "distance": twins.distances,
            "twin": table["key"].take(pa.array(twins.rows)),
            "kept": kept,
            "conflict": several[group],
        }
    ).sort_by([("group", "ascending"), ("key", "ascending")])
    return result, _summary(result, found)


def leaks(source: pa.Array, held_out: pa.Array, found: Found) -> pa.Table:
    """Images of a source that a held-out source holds too.

    Args:
        source: keys of the first rows that `find` saw.
        held_out: keys of the rows after those.
        found: what `find` found.

    Returns:
        A row for each image of the source that the other has too, sorted by key, with the nearest one there. Columns:
        key, held_out_key, kind, distance.
    """
    ours, theirs = found.pictures[: len(source)], found.pictures[len(source) :]
    count = int(found.pictures.max(initial=-1)) + 1
    # The smallest key stands for equal pictures of the held-out source.
    best = _first_rows(theirs, pc.sort_indices(held_out).to_numpy(), count)
    ties = _Ties.among(np.bincount(ours, minlength=count) > 0, best >= 0, found)
    rank = np.argsort(pc.sort_indices(held_out).to_numpy())
    near = ties.nearest(rank[best], count).of(ours)
    near = _Twins(np.where(near.rows >= 0, best[near.rows], -1), near.distances, near.mirrored)
    exact = best[ours] >= 0
    twins = _Twins.exact(best[ours]).where(exact, near)
    kind = np.where(exact, "exact", np.where(twins.mirrored, "mirrored", "near"))
    leaked = np.flatnonzero(twins.rows >= 0)
    return pa.table(
        {
            "key": source.take(pa.array(leaked)),
            "held_out_key": held_out.take(pa.array(twins.rows[leaked])),
            "kind": pa.array(kind[leaked], pa.string()),
            "distance": twins.distances[leaked],
        }
    ).sort_by("key")


@dataclass(frozen=True)
class _Twins:
    """For each of some items another one (-1: none), how far off it is, and whether mirrored."""

    rows: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]
    mirrored: npt.NDArray[np.bool_]

    @staticmethod
    def exact(rows: npt.NDArray[np.int64]) -> _Twins:
        return _Twins(rows, np.zeros(len(rows), dtype=np.float32), np.zeros(len(rows), dtype=bool))

    @staticmethod
    def none(count: int) -> _Twins:
        return _Twins.exact(np.full(count, -1))

    def of(self, items: npt.NDArray[np.int64]) -> _Twins:
        return _Twins(self.rows[items], self.distances[items], self.mirrored[items])

    def where(self, mine: npt.NDArray[np.bool_], other: _Twins) -> _Twins:
        """These where ``mine``, elsewhere the others."""
        return _Twins(
            np.where(mine, self.rows, other.rows),
            np.where(mine, self.distances, other.distances),
            np.where(mine, self.mirrored, other.mirrored),
        )


@dataclass(frozen=True)
class _Ties:
    """Each pair of pictures twice, seen from either."""

    ours: npt.NDArray[np.int64]
    theirs: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]
    mirrored: npt.NDArray[np.bool_]

    @staticmethod
    def among(ours: npt.NDArray[np.bool_], theirs: npt.NDArray[np.bool_], found: Found) -> _Ties:
        """The pairs of one of ``ours`` with one of ``theirs`` (flags of the pictures)."""
        both = np.concatenate([found.pairs, found.pairs[:, ::-1]])
        distances, mirrored = np.tile(found.distances, 2), np.tile(found.mirrored, 2)
        taken = ours[both[:, 0]] & theirs[both[:, 1]]
        return _Ties(both[taken, 0], both[taken, 1], distances[taken], mirrored[taken])

    def nearest(self, rank: npt.NDArray[np.int64], count: int) -> _Twins:
        """For each of ``count`` pictures the nearest one; where two are as near, the one of the smaller ``rank``."""
        by = np.lexsort((rank[self.theirs], self.distances, self.ours))[::-1]
        twins = _Twins.none(count)
        # Written from the last to the first, so that the first one stays.
        twins.rows[self.ours[by]] = self.theirs[by]
        twins.distances[self.ours[by]] = self.distances[by]
        twins.mirrored[self.ours[by]] = self.mirrored[by]
        return twins


def _first_rows(pictures: npt.NDArray[np.int64], order: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    # The row of each of ``count`` pictures that comes first in ``order``; -1 where there is none.
    rows = np.full(count, -1)
    rows[pictures[order[::-1]]] = order[::-1]
    return rows


def _nearest(picture: npt.NDArray[np.int64], ties: _Ties, count: int) -> _Twins:
    # Of each row: another with the same pixels, else the first of the nearest picture.
    rows = np.arange(len(picture))
    best = _first_rows(picture, rows, count)
    second = _first_rows(picture, np.flatnonzero(best[picture] != rows), count)
    equal = np.where(best[picture] == rows, second[picture], best[picture])
    near = ties.nearest(best, count).of(picture)
    near = _Twins(best[near.rows], near.distances, near.mirrored)
    return _Twins.exact(equal).where(equal >= 0, near)


def _repeats(
    picture: npt.NDArray[np.int64], label: npt.NDArray[np.int64], leaders: npt.NDArray[np.int64], ties: _Ties
) -> _Twins:
    # Of each leader that goes: the nearest that stays, of its own label and an earlier rank.
    tied = leaders[np.isin(picture[leaders], ties.ours)]
    rows: dict[int, dict[int, int]] = defaultdict(dict)
    for row, of, its in zip(tied.tolist(), picture[tied].tolist(), label[tied].tolist(), strict=True):
        rows[of][its] = row
    earlier: dict[int, list[tuple[float, int, bool]]] = defaultdict(list)
    columns = (ties.ours, ties.theirs, ties.distances, ties.mirrored)
    for ours, theirs, distance, turned in zip(*(column.tolist() for column in columns), strict=True):
        for its, row in rows[ours].items():
            other = rows[theirs].get(its)
            if other is not None and other < row:
                earlier[row].append((distance, other, turned))
    gone = _Twins.none(len(picture))
    for row in sorted(earlier):
        standing = [twin for twin in earlier[row] if gone.rows[twin[1]] < 0]
        if standing:
            gone.distances[row], gone.rows[row], gone.mirrored[row] = min(standing)
    return gone


def _groups(table: pa.Table, ties: _Ties, count: int) -> npt.NDArray[np.int64]:
    # Numbers of the connected rows, in order of their smallest keys.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    joined = coo_array((np.ones(len(ties.ours), dtype=bool), (ties.ours, ties.theirs)), shape=(count, count))
    component = connected_components(joined, directed=False)[1][table["picture"].to_numpy()]
    by_key = pc.sort_indices(table["key"]).to_numpy()
    _, first, group = np.unique(component[by_key], return_index=True, return_inverse=True)
    numbers = np.empty(len(group), dtype=np.int64)
    numbers[by_key] = np.argsort(np.argsort(first))[group]
    return numbers


def _ranked(table: pa.Table, keep: Keep) -> pa.Table:
    if keep == "largest":
        area = pc.multiply(table["width"].cast(pa.int64()), table["height"].cast(pa.int64()))
        table = table.append_column("area", area)
    return table.sort_by([*_ORDERS[keep], ("key", "ascending")]).combine_chunks()


def _numbered(digests: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    # Numbers of equal digests, in the order of the digests, whatever the order of the rows.
    order = pc.sort_indices(digests)
    ordered = digests.take(order).combine_chunks()
    new = pc.not_equal(ordered[1:], ordered[:-1]).to_numpy(zero_copy_only=False)
    numbers = np.zeros(len(order), dtype=np.int64)
    numbers[order.to_numpy()[1:]] = np.cumsum(new)
    return numbers


def _seen(read: Read, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
    # Thumbnails of the rows.
    pieces = read(rows) if len(rows) else ()
    seen = np.concatenate([thumbnails(np.zeros((0, 1, 1, 3), dtype=np.uint8)), *(thumbnails(p) for p in pieces)])
    if len(seen) != len(rows):
        raise D2CError(
            "some images can no longer be read",
            found=f"{len(seen)} of {len(rows)} that look like duplicates",
            hint="run d2c score again: it takes note of what changed",
        )
    return seen


def _summary(result: pa.Table, found: Found) -> dict[str, Any]:
    conflicts = result.filter(result["conflict"])
    groups = conflicts.group_by("group").aggregate([("key", "list"), ("label", "list")]).sort_by("group")
    return {
        "groups": pc.count_distinct(result["group"]).as_py(),
        "images": result.num_rows,
        "removable": result.num_rows - pc.sum(result["kept"]).as_py() if result.num_rows else 0,
        "conflicts": groups.num_rows,
        "examples": groups.slice(0, 5).drop_columns("group").to_pylist(),
        "skipped": found.skipped,
    }
