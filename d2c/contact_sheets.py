"""Small pictures of a selection: of picks, of rejected images, and of rejected images that are nearly picks."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from d2c import batches, neighbours, runtime
from d2c.progress import Progress
from d2c.report import Thumbnail
from d2c.sources import Source

Array: TypeAlias = np.ndarray[Any, Any]
SIDE = 72
"""Of a thumbnail in px, at most."""
NEIGHBOURS = 5_000
"""Rejected images of a class among which borderline ones are looked for, at most; drawn at random."""
_QUALITY = 75


@dataclass(frozen=True, eq=False)
class Chosen:
    """The scored images as columns in key order, N long, and the rows of the picks among them.

    scores: f8 [N], those that the selection went by. features: [N, D], perhaps memory-mapped.
    """

    keys: pa.ChunkedArray
    labels: Array
    scores: Array
    features: Array | None
    names: list[str]
    """Of the classes."""
    rows: Array

    @cached_property
    def picked(self) -> Array:
        """Bool [N]."""
        found = np.zeros(len(self.labels), dtype=bool)
        found[self.rows] = True
        return found

    @cached_property
    def ranks(self) -> Array:
        """[N] Of each image in its class, 0 the easiest."""
        order = np.lexsort((np.arange(len(self.scores)), self.scores, self.labels))
        own = self.labels[order]
        ranks = np.empty(len(order), dtype=np.int64)
        ranks[order] = np.arange(len(order)) - np.searchsorted(own, own)
        return ranks

    @cached_property
    def sizes(self) -> Array:
        """[C] Images of each class."""
        return np.bincount(self.labels, minlength=len(self.names))

    @cached_property
    def quotas(self) -> Array:
        """[C] Picks of each class."""
        return np.bincount(self.labels[self.rows], minlength=len(self.names))

    def places(self, source: Source, rows: Array) -> Array:
        """Indices into the source of ``rows``, -1 of those that are gone."""
        found = pc.index_in(self.keys.take(pa.array(rows)), value_set=pa.array(source.keys))
        return np.asarray(pc.fill_null(found, -1).to_numpy(), dtype=np.int64)


@dataclass(frozen=True)
class Sheet:
    """Rows of the images to show: picks and rejected ones, easiest first; pairs of a rejected image and a pick."""

    picked: list[int]
    rejected: list[int]
    borderline: list[tuple[int, int]]

    @property
    def rows(self) -> list[int]:
        """All of them."""
        return [*self.picked, *self.rejected, *(row for pair in self.borderline for row in pair)]


def draw(chosen: Chosen, shown: int, pairs: int, *, by_features: bool, seed: int, label: int | None = None) -> Sheet:
    """Choose ``shown`` picks and as many rejected images of one class, or of all, at random by ``seed``.

    The ``pairs`` borderline ones are those nearest to a pick of their class: in features, or in rank by score. Of all
    classes together they come from as many different ones as possible.
    """
    rng = runtime.rng("contact sheets", seed, label)
    inside = np.arange(len(chosen.labels)) if label is None else np.flatnonzero(chosen.labels == label)
    picked = inside[chosen.picked[inside]]
    others = inside[~chosen.picked[inside]]
    drawn = [_easiest_first(chosen, rng.permutation(rows)[:shown]) for rows in (picked, others)]
    mixed = np.flatnonzero((chosen.quotas > 0) & (chosen.quotas < chosen.sizes))
    classes = rng.permutation(mixed)[:pairs] if label is None else mixed[mixed == label]
    found: list[tuple[int, int]] = []
    for place, one in enumerate(classes.tolist()):
        share = (pairs - len(found)) // (len(classes) - place)
        found += _borderline(chosen, one, max(1, share), by_features, rng)
    return Sheet(drawn[0], drawn[1], found)


def _easiest_first(chosen: Chosen, rows: Array) -> list[int]:
    return [int(row) for row in rows[np.lexsort((rows, chosen.scores[rows]))]]


def _borderline(
    chosen: Chosen, label: int, count: int, by_features: bool, rng: np.random.Generator
) -> list[tuple[int, int]]:
    members = np.flatnonzero(chosen.labels == label)
    picks, others = members[chosen.picked[members]], members[~chosen.picked[members]]
    others = rng.permutation(others)[:NEIGHBOURS]
    if by_features and chosen.features is not None:
        near, which = neighbours.nearest(chosen.features[others], chosen.features[picks])
    else:
        picks = picks[np.argsort(chosen.ranks[picks])]
        taken, ranks = chosen.ranks[picks], chosen.ranks[others]
        above = np.searchsorted(taken, ranks)
        sides = np.stack([np.maximum(above - 1, 0), np.minimum(above, len(picks) - 1)])
        apart = np.abs(taken[sides] - ranks)
        near, which = apart.min(axis=0), sides[apart.argmin(axis=0), np.arange(len(others))]
    nearest = np.argsort(near, kind="stable")[:count]
    return [(int(others[row]), int(picks[which[row]])) for row in nearest]


def thumbnails(
    chosen: Chosen, rows: Sequence[int], source: Source, size: int, *, threads: int, progress: Progress
) -> dict[int, Thumbnail]:
    """Small pictures of ``rows``, whose images are ``size`` px; those that cannot be read any more are left out."""
    wanted = np.unique(np.asarray(rows, dtype=np.int64))
    places = chosen.places(source, wanted)
    row_of = dict(zip(places.tolist(), wanted.tolist(), strict=True))
    row_of.pop(-1, None)
    found, side = dict[int, Thumbnail](), min(size, SIDE)
    with progress.bar("pictures", len(row_of), "image") as bar:
        for batch in batches.load(source, list(row_of), side, batch=64, threads=threads):
            for place, pixels in zip(batch.indices.tolist(), batch.pixels, strict=True):
                row = row_of[place]
                found[row] = Thumbnail(_webp(pixels), side, _told(chosen, row))
            bar.advance(len(batch) + len(batch.bad))
    return found


def _webp(pixels: Array) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", quality=_QUALITY)
    return stream.getvalue()


def _told(chosen: Chosen, row: int) -> str:
    label = int(chosen.labels[row])
    return (
        f"{chosen.keys[row].as_py()}: {chosen.names[label]}, score {chosen.scores[row]:.4g}, "
        f"rank {chosen.ranks[row]:,} of {chosen.sizes[label]:,}"
    )
