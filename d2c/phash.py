"""A perceptual hash of pictures, its mirror image, and all pairs of hashes that lie close together.

The hash is the signs of the 256 lowest frequencies (DCT) of the brightness, all in exact integers. A change of size,
quality or brightness turns few of them. Mirroring a picture turns the signs of the odd horizontal frequencies and no
others, so the hash of the mirror image is ``hash ^ MIRROR``, at no cost (but for bits of frequencies that a picture
of less than 32 pixels a side cannot have).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Hashes: TypeAlias = npt.NDArray[np.uint64]
"""uint64 [N, 4]: 256 bits a picture; the first word holds the 64 lowest frequencies."""

NEAR_LOW = 8
"""Bits of the first word that may differ between near duplicates: what three bands with two errors each find."""
NEAR_ALL = 64
"""Bits of the whole hash that may differ: pictures that agree in coarse shapes alone are beyond it."""

_GRID = 32
_SMALL = 16
_BANDS = (
    (0, 22),
    (22, 21),
    (43, 21),
)  # (first bit, bits)
_CROWD = 1 << 22  # comparisons that one pair of buckets may ask for
_FOUND = 1 << 24  # pairs held at once
_STEP = 1 << 22  # comparisons made at once


def _frequencies() -> npt.NDArray[np.int64]:
    # [256, 2] (down, across), lowest first; the first 64 are dealt out to the three bands like cards, so that no band
    # holds the low ones alone, on which many pictures agree.
    low = sorted(((u, v) for u in range(_GRID) for v in range(_GRID) if u + v), key=lambda f: (sum(f), f))[:256]
    return np.array([*low[0:64:3], *low[1:64:3], *low[2:64:3], *low[64:]], dtype=np.int64)


def _pack(bits: npt.NDArray[np.bool_]) -> Hashes:
    # Bit i of a word is its i-th frequency, on every machine.
    packed = np.packbits(np.ascontiguousarray(bits), axis=1, bitorder="little")
    words: Hashes = packed.view("<u8").astype(np.uint64)
    return words


_FREQUENCIES = _frequencies()
MIRROR = _pack(_FREQUENCIES[None, :, 1] % 2 == 1)[0]
"""uint64 [4]: the bits that mirroring turns."""


def cells(pixels: npt.NDArray[np.uint8], grid: int) -> npt.NDArray[np.int64]:
    """Sums of ``pixels`` u1 [N, S, S, 3] over ``grid`` x ``grid`` cells: i8 [N, grid, grid, 3].

    A pixel on a border counts for each cell by its share; a cell's weights sum to S^2.
    """
    count, side = pixels.shape[:2]
    edges, starts = np.arange(grid + 1) * side, np.arange(side) * grid
    share = np.minimum(edges[1:, None], starts + grid) - np.maximum(edges[:-1, None], starts)
    # Integers below 2^24 here and below 2^53 in the end: floats add them exactly, in whatever order a library does.
    weights = np.maximum(share, 0).astype(np.float32)
    down = np.empty((count, grid, side * 3), dtype=np.float32)
    for row, picture in enumerate(pixels):
        down[row] = weights @ picture.reshape(side, side * 3).astype(np.float32)
    across = weights.astype(np.float64) @ down.reshape(count, grid, side, 3).astype(np.float64)
    sums: npt.NDArray[np.int64] = across.astype(np.int64)
    return sums


def hashes(pixels: npt.NDArray[np.uint8]) -> Hashes:
    """The hashes of ``pixels`` u1 [N, S, S, 3]; that of a picture of one colour is 0."""
    angles = np.arange(_GRID)[:, None] * (2 * np.arange(_GRID) + 1) * (np.pi / (2 * _GRID))
    cosines = np.rint(np.cos(angles) * 1024)
    levels = 8 * (cells(pixels, _GRID) @ np.array([2, 5, 1])) // pixels.shape[1] ** 2  # in 1/64 of a grey level
    levels -= levels.sum(axis=(1, 2), keepdims=True) // _GRID**2
    found = cosines @ levels.astype(np.float64) @ cosines.T
    return _pack(found[:, _FREQUENCIES[:, 0], _FREQUENCIES[:, 1]] > 0)


def distances(ours: Hashes, theirs: Hashes) -> npt.NDArray[np.int64]:
    """Bits that differ, row by row: i8 [N]."""
    bits: npt.NDArray[np.int64] = _ones(ours ^ theirs).sum(axis=1, dtype=np.int64)
    return bits


def _ones(words: Hashes) -> Hashes:
    # Bits that are set in each word: sums over pairs, fours and bytes at once. Numpy counts them itself only from 2.0.
    words = words - ((words >> np.uint64(1)) & np.uint64(0x5555555555555555))
    words = (words & np.uint64(0x3333333333333333)) + ((words >> np.uint64(2)) & np.uint64(0x3333333333333333))
    words = (words + (words >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (words * np.uint64(0x0101010101010101)) >> np.uint64(56)


def thumbnails(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """Means of 16 x 16 cells of ``pixels`` u1 [N, S, S, 3], in 1/256 of a grey level: u2 [N, 16, 16, 3]."""
    small: npt.NDArray[np.uint16] = (256 * cells(pixels, _SMALL) // pixels.shape[1] ** 2).astype(np.uint16)
    return small


def thumbnail_distances(
    small: npt.NDArray[np.uint16], pairs: npt.NDArray[np.int64], mirrored: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32]:
    """Distances f4 [M] of ``pairs`` [M, 2] of `thumbnails`.

    The root mean square of the difference, each colour about its mean, as a share of the larger contrast (the same
    root mean square of one thumbnail). Unrelated pictures are about 1.4 apart. Two of one colour are 1 apart: without
    contrast nothing can be confirmed.
    """
    found = np.ones(len(pairs), dtype=np.float32)
    for start in range(0, len(pairs), 4096):
        part = slice(start, start + 4096)
        ours, theirs = (small[pairs[part, side]].astype(np.int64) for side in (0, 1))
        theirs[mirrored[part]] = theirs[mirrored[part]][:, :, ::-1]
        # In integers, so that no machine rounds differently: 256 times the value, less the sum of 256.
        ours, theirs = (t * _SMALL**2 - t.sum(axis=(1, 2), keepdims=True) for t in (ours, theirs))
        contrast = np.maximum((ours**2).sum(axis=(1, 2, 3)), (theirs**2).sum(axis=(1, 2, 3)))
        off = ((ours - theirs) ** 2).sum(axis=(1, 2, 3))
        found[part] = np.where(contrast > 0, np.sqrt(off / np.maximum(contrast, 1)), 1)
    return found


@dataclass(frozen=True)
class Close:
    """Pairs of rows, i8 [M, 2] with the smaller first, in order, and comparisons that were too many to make."""

    pairs: npt.NDArray[np.int64]
    skipped: int


def close(known: Hashes, *, mirrored: bool = False) -> Close:
    """All pairs i < j within NEAR_LOW and NEAR_ALL bits; ``mirrored`` compares i with the mirror image of j.

    Exact: eight turned bits leave one of three bands with two at most, so that bands which are equal but for two bits
    meet all pairs. Where thousands of pictures share a band, or millions of pairs are close, comparisons are left out,
    and counted.
    """
    flip = MIRROR if mirrored else np.zeros(4, dtype=np.uint64)
    found, total, skipped = [np.zeros((0, 2), dtype=np.int64)], 0, 0
    for first, width in _BANDS:
        band = _Band.of(known[:, 0], first, width, int(flip[0]))
        for turned in range(3):
            for places in combinations(range(width), turned):
                left, right, comparisons = band.meetings(sum(1 << place for place in places))
                crowded = (comparisons > _CROWD) | (total > _FOUND)
                skipped += int(comparisons[crowded].sum())
                for ours, theirs in band.rows(left[~crowded], right[~crowded]):
                    near = _ones(band.words[ours] ^ band.words[theirs] ^ flip[0]) <= NEAR_LOW
                    pairs = np.stack([band.order[ours[near]], band.order[theirs[near]]], axis=1)
                    pairs = pairs[distances(known[pairs[:, 0]], known[pairs[:, 1]] ^ flip) <= NEAR_ALL]
                    found.append(np.sort(pairs, axis=1).astype(np.int64))
                    total += len(pairs)
    codes = np.concatenate(found) @ np.array([len(known), 1])
    return Close(np.stack(np.divmod(np.unique(codes), max(1, len(known))), axis=1), skipped)


_Places: TypeAlias = npt.NDArray[np.int32]


@dataclass(frozen=True)
class _Band:
    """Some bits of the first words: ``order`` sorts the rows by them, ``words`` are the first words so sorted.

    Value v has ``counts[v]`` rows from place ``starts[v]`` on; ``used`` are the values that occur.
    """

    width: int
    flip: int
    order: _Places
    words: Hashes
    counts: _Places
    starts: _Places
    used: _Places

    @staticmethod
    def of(words: Hashes, first: int, width: int, flip: int) -> _Band:
        values = ((words >> np.uint64(first)) & np.uint64((1 << width) - 1)).astype(np.int32)
        order = np.argsort(values, kind="stable").astype(np.int32)
        counts = np.bincount(values, minlength=1 << width).astype(np.int32)
        starts = np.cumsum(counts, dtype=np.int32) - counts
        used = np.flatnonzero(counts).astype(np.int32)
        return _Band(width, (flip >> first) & ((1 << width) - 1), order, words[order], counts, starts, used)

    def meetings(self, turned: int) -> tuple[_Places, _Places, npt.NDArray[np.int64]]:
        """Values that occur and differ in just the bits ``turned``, each two once, and the comparisons they ask for."""
        change = turned ^ self.flip
        if not change:
            left = right = self.used[self.counts[self.used] > 1]
        else:
            # Of two values the smaller is the one without the highest bit that changes.
            left = self.used[self.used & (1 << change.bit_length() - 1) == 0]
            right = left ^ np.int32(change)
            met = self.counts[right] > 0
            left, right = left[met], right[met]
        return left, right, self.counts[left].astype(np.int64) * self.counts[right]

    def rows(self, left: _Places, right: _Places) -> Iterator[tuple[_Places, _Places]]:
        """Every row of value ``left[k]`` with every row of ``right[k]``, as places in ``order``, in pieces."""
        down, across = self.counts[left], self.counts[right]
        alone = (down == 1) & (across == 1)  # nearly all of them, and cheap
        yield self.starts[left[alone]], self.starts[right[alone]]
        left, right, down, across = left[~alone], right[~alone], down[~alone], across[~alone]
        ends = np.cumsum(down.astype(np.int64) * across)
        cuts = np.searchsorted(ends, np.arange(0, ends.max(initial=0), _STEP)).tolist()
        for begin, stop in pairwise([*cuts, len(left)]):
            sizes = down[begin:stop] * across[begin:stop]
            block = np.repeat(np.arange(begin, stop, dtype=np.int32), sizes)
            within = np.arange(len(block), dtype=np.int32) - np.repeat(np.cumsum(sizes, dtype=np.int32) - sizes, sizes)
            i, j = np.divmod(within, across[block])
            i, j = self.starts[left][block] + i, self.starts[right][block] + j
            apart = (i < j) | (left != right)[block]
            yield i[apart], j[apart]
