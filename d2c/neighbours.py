"""Who is near whom in a feature space: precision, recall, density, coverage, nearest images.

Every function takes features as [n, d] arrays of any real dtype. Distances are float64 and built tile by tile, so
memory stays within a few hundred MiB whatever n is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from d2c.metrics import checked, same_width

Array: TypeAlias = np.ndarray[Any, Any]

_TILE = 4096  # rows and columns of one block of distances: 128 MiB of float64
K_MANIFOLD = 3
"""Neighbours whose distance is a ball's radius in precision and recall, as in ADM's evaluator."""
K_COVERAGE = 5
"""The same in density and coverage (Naeem et al. 2020)."""


@dataclass(frozen=True)
class Manifold:
    """Real and generated images inside each other's k-NN balls, one value an image.

    ``inside`` bool [m]: generated images in a real ball of `K_MANIFOLD`. ``recalled`` bool [n]: real images in a
    generated ball of `K_MANIFOLD`. ``balls`` int64 [m]: how many real balls of ``k`` hold a generated image;
    ``covered`` bool [n]: whether such a ball holds any.
    """

    inside: Array
    recalled: Array
    balls: Array
    covered: Array
    k: int = K_COVERAGE

    @property
    def precision(self) -> float:
        """Share of generated images inside the real manifold (Kynkaanniemi et al. 2019)."""
        return float(self.inside.mean())

    @property
    def recall(self) -> float:
        """Share of real images inside the generated manifold."""
        return float(self.recalled.mean())

    @property
    def density(self) -> float:
        """Real balls around a generated image, over k: 1 for the real distribution, above it for crowding."""
        return float(self.balls.mean()) / self.k

    @property
    def coverage(self) -> float:
        """Share of real images whose ball holds a generated one."""
        return float(self.covered.mean())


def _prepared(rows: Array) -> tuple[Array, Array]:
    values = rows.astype(np.float64)
    return values, np.einsum("nd,nd->n", values, values)


def _block(q: tuple[Array, Array], r: tuple[Array, Array]) -> Array:
    """Squared Euclidean distances [queries, references] of prepared rows."""
    block: Array = q[0] @ r[0].T
    block *= -2
    block += q[1][:, None]
    block += r[1][None, :]
    return np.maximum(block, 0, out=block)


def _slices(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _TILE, count)) for start in range(0, count, _TILE))


def _tiles(queries: Array, references: Array) -> Iterator[tuple[slice, slice, Array]]:
    """Squared distances, block by block: (query rows, reference rows, float64 block)."""
    for rows in _slices(len(queries)):
        q = _prepared(queries[rows])
        for columns in _slices(len(references)):
            yield rows, columns, _block(q, _prepared(references[columns]))


def squared_radii(features: Array, ks: Sequence[int] = (K_MANIFOLD,), what: str = "real features") -> Array:
    """Squared distances [n, len(ks)] of each row to its k-th nearest other row, float64.

    Raises:
        D2CError: there are no more rows than the largest k.
    """
    count = max(ks) + 1  # the smallest of them is the row itself
    checked(features, what, at_least=count)
    best = torch.full((len(features), count), torch.inf, dtype=torch.float64)

    def keep(rows: slice, block: torch.Tensor) -> None:
        near = block.topk(min(count, block.shape[1]), largest=False).values
        best[rows] = torch.cat([best[rows], near], dim=1).topk(count, largest=False).values

    for rows in _slices(len(features)):
        q = _prepared(features[rows])
        for columns in _slices(len(features)):
            if columns.start < rows.start:
                continue  # a block below the diagonal is one above it, transposed
            r = q if columns == rows else _prepared(features[columns])
            block = torch.from_numpy(_block(q, r))
            keep(rows, block)
            if columns != rows:
                keep(columns, block.T.contiguous())
    radii: Array = best.sort(dim=1).values[:, list(ks)].numpy()
    return radii


def manifold(real: Array, fake: Array, real_radii: Array | None = None, k: int = K_COVERAGE) -> Manifold:
    """Precision, recall, density and coverage in one pass over all pairs.

    A point on the edge of a ball is inside. ``real_radii``: `manifold_radii` of ``real`` for this ``k``, the number of
    neighbours in density and coverage, where many sets are compared with one.

    Raises:
        D2CError: a side has too few rows, or the widths differ.
    """
    same_width(real, fake)
    of_real = manifold_radii(real, k) if real_radii is None else real_radii
    checked(fake, "generated features", at_least=K_MANIFOLD + 1)
    of_fake = squared_radii(fake, what="generated features")
    inside, recalled = np.zeros(len(fake), bool), np.zeros(len(real), bool)
    balls, covered = np.zeros(len(fake), np.int64), np.zeros(len(real), bool)
    for rows, columns, block in _tiles(fake, real):
        inside[rows] |= (block <= of_real[columns, 0]).any(axis=1)
        recalled[columns] |= (block <= of_fake[rows, :1]).any(axis=0)
        held = block <= of_real[columns, 1]
        balls[rows] += held.sum(axis=1)
        covered[columns] |= held.any(axis=0)
    return Manifold(inside, recalled, balls, covered, k)


def manifold_radii(real: Array, k: int = K_COVERAGE) -> Array:
    """What `manifold` needs to know of the real images: [n, 2].

    Raises:
        D2CError: there are no more rows than neighbours.
    """
    return squared_radii(real, (K_MANIFOLD, k))


def nearest(queries: Array, references: Array, *, but_itself: bool = False) -> tuple[Array, Array]:
    """Euclidean distance float64 [n] to, and index int64 [n] of, each query's nearest reference.

    The winner's distance is computed from the difference, so that a duplicate has distance exactly 0. With
    ``but_itself`` row i of the references is not looked at for query i.

    Raises:
        D2CError: a side is empty, holds NaN, or the widths differ.
    """
    checked(queries, "queries")
    checked(references, "references", at_least=1 + but_itself)
    same_width(queries, references)
    best, index = np.full(len(queries), np.inf), np.zeros(len(queries), np.int64)
    for rows, columns, block in _tiles(queries, references):
        if but_itself:
            own = np.arange(max(rows.start, columns.start), min(rows.stop, columns.stop))
            block[own - rows.start, own - columns.start] = np.inf
        at = block.argmin(axis=1)
        value = block[np.arange(len(at)), at]
        closer = value < best[rows]
        best[rows] = np.where(closer, value, best[rows])
        index[rows] = np.where(closer, at + columns.start, index[rows])
    distance = np.empty(len(queries))
    for rows in _slices(len(queries)):
        difference = queries[rows].astype(np.float64) - references[index[rows]].astype(np.float64)
        distance[rows] = np.linalg.norm(difference, axis=1)
    return distance, index


def nearest_either(
    queries: Array, flipped_queries: Array, references: Array, *, but_itself: bool = False
) -> tuple[Array, Array, Array]:
    """`nearest` over both orientations of each query: distance, index, and whether the flipped one was nearer."""
    straight = nearest(queries, references, but_itself=but_itself)
    mirrored = nearest(flipped_queries, references, but_itself=but_itself)
    flipped = mirrored[0] < straight[0]
    return np.where(flipped, mirrored[0], straight[0]), np.where(flipped, mirrored[1], straight[1]), flipped
