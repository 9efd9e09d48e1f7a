"""Who is near whom in a feature space: precision, recall, density, coverage, nearest images.

Every function takes features as [n, d] arrays of any real dtype. Distances are built tile by tile, so memory stays
within a few hundred MiB whatever n is. Tiles are float32 products, which cost half of float64 ones; where rounding
could decide, the pair is computed again in float64 from its difference, so that the answers are those of float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from d2c.metrics import checked, same_width

Array: TypeAlias = np.ndarray[Any, Any]

_TILE = 4096  # rows and columns of one block of distances: 64 MiB of float32
_SPARE = 2  # neighbours beyond the k-th that rounding may have put behind it
_ROUNDING = 32 * float(np.finfo(np.float32).eps)  # of a distance, in squared norms: far above what sums of 4,096 lose
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


def _queries(rows: Array, centre: Array) -> Array:
    """[-2 q, |q|^2, 1]: times `_references`, the squared distances, in one product and no pass over them after it."""
    values = np.empty((len(rows), rows.shape[1] + 2), np.float32)
    values[:, :-2] = rows - centre
    values[:, -2] = np.einsum("nd,nd->n", values[:, :-2], values[:, :-2], dtype=np.float64)
    values[:, :-2] *= -2
    values[:, -1] = 1
    return values


def _references(rows: Array, centre: Array) -> Array:
    """[r, 1, |r|^2]."""
    values = np.empty((len(rows), rows.shape[1] + 2), np.float32)
    values[:, :-2] = rows - centre
    values[:, -2] = 1
    values[:, -1] = np.einsum("nd,nd->n", values[:, :-2], values[:, :-2], dtype=np.float64)
    return values


def _exact(queries: Array, references: Array, index: Array) -> Array:
    """Squared distances float64 [n] of each query to reference ``index`` [n]; the same to the last bit either way."""
    found = np.empty(len(queries))
    for rows in _slices(len(queries)):
        difference = queries[rows].astype(np.float64) - references[index[rows]]
        found[rows] = np.einsum("nd,nd->n", difference, difference)
    return found


def _slices(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _TILE, count)) for start in range(0, count, _TILE))


def _tiles(queries: Array, references: Array) -> Iterator[tuple[slice, slice, Array, float]]:
    """Squared distances, block by block: (query rows, reference rows, float32 block, how far rounding moves one)."""
    # Small numbers lose fewer digits, and a common shift changes no distance.
    centre = references.mean(axis=0, dtype=np.float64)
    for rows in _slices(len(queries)):
        q = _queries(queries[rows], centre)
        for columns in _slices(len(references)):
            r = _references(references[columns], centre)
            yield rows, columns, q @ r.T, _ROUNDING * float(q[:, -2].max() + r[:, -1].max())


def _within(block: Array, squared: Array, rounding: float, queries: Array, references: Array) -> Array:
    """Whether each pair of a block is no farther apart than ``squared`` ([1, columns] or [rows, 1])."""
    inside: Array = block <= (squared - rounding).astype(np.float32)
    near, unsure = np.nonzero((block <= (squared + rounding).astype(np.float32)) & ~inside)
    limits = np.broadcast_to(squared, block.shape)
    for part in _slices(len(near)):
        i, j = near[part], unsure[part]
        inside[i, j] = _exact(queries[i], references, j) <= limits[i, j]
    return inside


def squared_radii(features: Array, ks: Sequence[int] = (K_MANIFOLD,), what: str = "real features") -> Array:
    """Squared distances [n, len(ks)] of each row to its k-th nearest other row, float64.

    Raises:
        D2CError: there are no more rows than the largest k.
    """
    import torch  # only here: `explain` must not wait for it

    checked(features, what, at_least=max(ks) + 1)
    count = min(max(ks) + 1 + _SPARE, len(features))  # the nearest is the row itself
    centre = features.mean(axis=0, dtype=np.float64)
    best = torch.full((len(features), count), torch.inf)
    index = torch.zeros((len(features), count), dtype=torch.int64)

    def keep(rows: slice, columns: slice, block: torch.Tensor) -> None:
        near, at = block.topk(min(count, block.shape[1]), largest=False)
        values, place = torch.cat([best[rows], near], dim=1).topk(count, largest=False)
        best[rows], index[rows] = values, torch.cat([index[rows], at + columns.start], dim=1).gather(1, place)

    for rows in _slices(len(features)):
        q = _queries(features[rows], centre)
        for columns in _slices(len(features)):
            if columns.start < rows.start:
                continue  # a block below the diagonal is one above it, transposed
            block = torch.from_numpy(q @ _references(features[columns], centre).T)
            keep(rows, columns, block)
            if columns != rows:
                keep(columns, rows, block.T.contiguous())
    found = np.stack([_exact(features, features, column) for column in index.T.numpy()], axis=1)
    radii: Array = np.sort(found, axis=1)[:, list(ks)]
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
    for rows, columns, block, rounding in _tiles(fake, real):
        some = fake[rows], real[columns]
        inside[rows] |= _within(block, of_real[None, columns, 0], rounding, *some).any(axis=1)
        recalled[columns] |= _within(block, of_fake[rows, :1], rounding, *some).any(axis=0)
        held = _within(block, of_real[None, columns, 1], rounding, *some)
        balls[rows] += np.count_nonzero(held, axis=1)
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
    for rows, columns, block, _ in _tiles(queries, references):
        if but_itself:
            own = np.arange(max(rows.start, columns.start), min(rows.stop, columns.stop))
            block[own - rows.start, own - columns.start] = np.inf
        at = block.argmin(axis=1)
        value = block[np.arange(len(at)), at]
        closer = value < best[rows]
        best[rows] = np.where(closer, value, best[rows])
        index[rows] = np.where(closer, at + columns.start, index[rows])
    return np.sqrt(_exact(queries, references, index)), index


def nearest_either(
    queries: Array, flipped_queries: Array, references: Array, *, but_itself: bool = False
) -> tuple[Array, Array, Array]:
    """`nearest` over both orientations of each query: distance, index, and whether the flipped one was nearer."""
    straight = nearest(queries, references, but_itself=but_itself)
    mirrored = nearest(flipped_queries, references, but_itself=but_itself)
    flipped = mirrored[0] < straight[0]
    return np.where(flipped, mirrored[0], straight[0]), np.where(flipped, mirrored[1], straight[1]), flipped
