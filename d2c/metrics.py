"""Distances between two sets of features, in float64: Frechet, precision and recall, coverage, copying.

Every function takes features as [n, d] arrays of any real dtype. Distance matrices are built tile by tile, so memory
stays within a few hundred MiB whatever n is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from scipy import linalg, stats

from d2c.errors import D2CError

Array: TypeAlias = np.ndarray[Any, Any]

_TILE = 4096  # rows and columns of one block of distances: 128 MiB of float64


@dataclass(frozen=True)
class Stats:
    """Mean mu [d] and unbiased covariance sigma [d, d] of n features, float64."""

    mu: Array
    sigma: Array
    n: int

    @property
    def rank_deficient(self) -> bool:
        """Whether n is too small for a covariance of full rank (n <= d)."""
        return self.n <= len(self.mu)


@dataclass(frozen=True)
class Frechet:
    """A squared Frechet distance; if ``rank_deficient``, a covariance had no full rank and the value is biased."""

    value: float
    mean_part: float
    covariance_part: float
    rank_deficient: bool


@dataclass(frozen=True)
class ClassFrechet:
    """Frechet distances class by class; ``skipped`` had fewer than two images on one side."""

    value: float
    per_class: dict[int, float]
    skipped: tuple[int, ...]
    covariance: Literal["full", "diagonal"]


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1]: generated images inside the real manifold, real images inside the generated one."""

    precision: float
    recall: float


@dataclass(frozen=True)
class DensityCoverage:
    """Density (>= 0, 1 for the real distribution) and coverage in [0, 1]."""

    density: float
    coverage: float


@dataclass(frozen=True)
class CopyRate:
    """Share of generated images nearer to a training image than real held-out images are, and who copies whom.

    ``distance``, ``index`` and ``flipped`` [n] belong to the generated images: the nearest training image and whether
    it was the mirrored generated image that came so near. ``flagged``: see `copy_rate`.
    """

    rate: float
    held_out_rate: float
    threshold: float
    flagged: bool
    distance: Array
    index: Array
    flipped: Array

    def closest(self, count: int) -> Array:
        """Indices of the ``count`` generated images nearest to the training set, nearest first."""
        return np.argsort(self.distance, kind="stable")[:count]


def _checked(features: Array, what: str, at_least: int = 1) -> Array:
    if features.ndim != 2 or len(features) < at_least:
        raise D2CError(
            f"too few {what} to measure" if features.ndim == 2 else f"{what} must be one row per image",
            found=f"an array of shape {features.shape}",
            expected=f"[n, d] with n >= {at_least}",
            hint="measure on more images",
        )
    if features.dtype.kind == "f":
        finite = np.isfinite(features).all(axis=1)
        if not finite.all():
            raise D2CError(
                f"{what} hold NaN or infinity",
                found=f"{np.count_nonzero(~finite)} of {len(features)} rows, first {int(np.argmin(finite))}",
                expected="finite numbers",
                hint="look at the images: a diverged model samples NaN; train again with a lower learning rate",
            )
    return features


def _same_width(a: Array, b: Array) -> None:
    if a.shape[1:] != b.shape[1:]:
        raise D2CError(
            "the two sets come from different feature spaces",
            found=f"{a.shape[1:]} and {b.shape[1:]} values an image",
            expected="the same width",
            hint="compute both with the same extractor",
        )


def statistics(features: Array) -> Stats:
    """Mean and unbiased covariance of features [n, d], summed in float64.

    Raises:
        D2CError: fewer than two rows, or NaN or infinity among them.
    """
    features = _checked(features, "features", at_least=2)
    n, d = features.shape
    mu = features.mean(axis=0, dtype=np.float64)
    sigma = np.zeros((d, d))
    for start in range(0, n, _TILE):
        centred = features[start : start + _TILE].astype(np.float64) - mu
        sigma += centred.T @ centred
    return Stats(mu, sigma / (n - 1), n)


def _factor(sigma: Array) -> Array:
    """F [d, r] with F F^T = sigma; eigenvalues that are rounding noise are left out."""
    values, vectors = linalg.eigh(sigma)
    keep = values > max(float(values[-1]), 0.0) * len(values) * np.finfo(np.float64).eps
    factor: Array = vectors[:, keep] * np.sqrt(values[keep])
    return factor


def frechet_distance(a: Stats, b: Stats) -> Frechet:
    """Squared Frechet distance |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, eq. 6).

    With S = F F^T the trace of the root is the sum of the singular values of F_a^T F_b: no matrix root, no complex
    numbers, and a set has distance 0 to itself even where its covariance has no full rank.

    Raises:
        D2CError: the two sets have features of different widths.
    """
    _same_width(a.mu[None], b.mu[None])
    difference = a.mu - b.mu
    mean_part = float(difference @ difference)
    cross = _factor(a.sigma).T @ _factor(b.sigma)
    root = float(linalg.svdvals(cross).sum()) if cross.size else 0.0
    covariance_part = float(np.trace(a.sigma) + np.trace(b.sigma)) - 2 * root
    value = max(0.0, mean_part + covariance_part)  # rounding can leave -1e-12
    return Frechet(value, mean_part, covariance_part, a.rank_deficient or b.rank_deficient)


def class_frechet(real: Array, real_labels: Array, fake: Array, fake_labels: Array) -> ClassFrechet:
    """Mean over the classes of the Frechet distance between a class's real and generated features.

    One definition serves all classes of a call: full covariances where every measured class has more images than
    features on both sides; otherwise diagonal ones, whose distance is |mu_r - mu_f|^2 + |s_r - s_f|^2 with standard
    deviations s [d], defined from two images on. ``covariance`` names which; the two must not be compared.

    Raises:
        D2CError: no class has two images on both sides.
    """
    real, fake = _checked(real, "real features"), _checked(fake, "generated features")
    _same_width(real, fake)
    classes = np.union1d(real_labels, fake_labels)
    sizes = {int(c): min(np.count_nonzero(real_labels == c), np.count_nonzero(fake_labels == c)) for c in classes}
    measured = [c for c, size in sizes.items() if size >= 2]
    if not measured:
        raise D2CError(
            "no class has two images on both sides",
            found=f"{len(sizes)} classes, at most {max(sizes.values())} images in common",
            expected="at least 2 real and 2 generated images in a class",
            hint="sample more images, with balanced labels",
        )
    full = all(sizes[c] > real.shape[1] for c in measured)
    per_class = {}
    for c in measured:
        a, b = real[real_labels == c], fake[fake_labels == c]
        if full:
            per_class[c] = frechet_distance(statistics(a), statistics(b)).value
        else:
            means = a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)
            deviations = a.std(axis=0, ddof=1, dtype=np.float64) - b.std(axis=0, ddof=1, dtype=np.float64)
            per_class[c] = float(means @ means + deviations @ deviations)
    skipped = tuple(c for c, size in sizes.items() if size < 2)
    return ClassFrechet(float(np.mean(list(per_class.values()))), per_class, skipped, "full" if full else "diagonal")


def _tiles(queries: Array, references: Array) -> Iterator[tuple[slice, slice, Array]]:
    """Squared Euclidean distances, block by block: (query rows, reference rows, float64 block)."""
    for top in range(0, len(queries), _TILE):
        rows = slice(top, min(top + _TILE, len(queries)))
        q = queries[rows].astype(np.float64)
        q_norm = np.einsum("nd,nd->n", q, q)
        for left in range(0, len(references), _TILE):
            columns = slice(left, min(left + _TILE, len(references)))
            r = references[columns].astype(np.float64)
            block = q @ r.T
            block *= -2
            block += q_norm[:, None]
            block += np.einsum("nd,nd->n", r, r)[None, :]
            yield rows, columns, np.maximum(block, 0, out=block)


def squared_radii(features: Array, k: int = 3, what: str = "real features") -> Array:
    """Squared distance [n] of each row to its k-th nearest other row, float64.

    Raises:
        D2CError: there are k rows or fewer.
    """
    _checked(features, what, at_least=k + 1)
    best = np.full((len(features), k + 1), np.inf)
    for rows, _, block in _tiles(features, features):
        part = block if block.shape[1] <= k + 1 else np.partition(block, k, axis=1)[:, : k + 1]
        best[rows] = np.partition(np.concatenate([best[rows], part], axis=1), k, axis=1)[:, : k + 1]
    return best[:, k]  # the smallest of the k + 1 is the row itself


def _inside(queries: Array, references: Array, squared_radii: Array) -> tuple[Array, Array]:
    """How many balls around references hold each query; which balls hold any query."""
    balls, hit = np.zeros(len(queries), np.int64), np.zeros(len(references), bool)
    for rows, columns, block in _tiles(queries, references):
        inside = block <= squared_radii[columns]
        balls[rows] += inside.sum(axis=1)
        hit[columns] |= inside.any(axis=0)
    return balls, hit


def precision_recall(real: Array, fake: Array, k: int = 3, real_radii: Array | None = None) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019): a point is inside if any k-NN ball holds it.

    ``real_radii``: `squared_radii` of ``real`` for this k, where many sets are compared with one.

    Raises:
        D2CError: a side has k rows or fewer, or the widths differ.
    """
    _same_width(real, fake)
    radii = squared_radii(real, k) if real_radii is None else real_radii
    in_real, _ = _inside(fake, real, radii)
    in_fake, _ = _inside(real, fake, squared_radii(fake, k, "generated features"))
    return PrecisionRecall(float(np.mean(in_real > 0)), float(np.mean(in_fake > 0)))


def density_coverage(real: Array, fake: Array, k: int = 5, real_radii: Array | None = None) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020): real k-NN balls around a generated image, over k; balls that are hit.

    ``real_radii``: `squared_radii` of ``real`` for this k, where many sets are compared with one.

    Raises:
        D2CError: there are k real rows or fewer, or the widths differ.
    """
    _same_width(real, fake)
    radii = squared_radii(real, k) if real_radii is None else real_radii
    balls, hit = _inside(_checked(fake, "generated features"), real, radii)
    return DensityCoverage(float(balls.mean()) / k, float(hit.mean()))


def nearest(queries: Array, references: Array) -> tuple[Array, Array]:
    """Euclidean distance float64 [n] to, and index int64 [n] of, each query's nearest reference.

    The winner's distance is computed from the difference, so that a duplicate has distance exactly 0.

    Raises:
        D2CError: a side is empty, holds NaN, or the widths differ.
    """
    _checked(queries, "queries")
    _checked(references, "references")
    _same_width(queries, references)
    best, index = np.full(len(queries), np.inf), np.zeros(len(queries), np.int64)
    for rows, columns, block in _tiles(queries, references):
        at = block.argmin(axis=1)
        value = block[np.arange(len(at)), at]
        closer = value < best[rows]
        best[rows] = np.where(closer, value, best[rows])
        index[rows] = np.where(closer, at + columns.start, index[rows])
    distance = np.empty(len(queries))
    for top in range(0, len(queries), _TILE):
        rows = slice(top, top + _TILE)
        difference = queries[rows].astype(np.float64) - references[index[rows]].astype(np.float64)
        distance[rows] = np.linalg.norm(difference, axis=1)
    return distance, index


def nearest_either(queries: Array, flipped_queries: Array, references: Array) -> tuple[Array, Array, Array]:
    """`nearest` over both orientations of each query: distance, index, and whether the flipped one was nearer."""
    straight, mirrored = nearest(queries, references), nearest(flipped_queries, references)
    flipped = mirrored[0] < straight[0]
    return np.where(flipped, mirrored[0], straight[0]), np.where(flipped, mirrored[1], straight[1]), flipped


def copy_rate(
    generated: Array,
    train: Array,
    held_out: Array,
    quantile: float = 0.01,
    *,
    flipped_generated: Array | None = None,
    flipped_held_out: Array | None = None,
) -> CopyRate:
    """Copying, calibrated on real images that the model has not seen.

    The threshold is the ``quantile`` of the held-out images' distances to their nearest training image; the rate is
    the share of generated images at or below it. Held-out images have a rate of about ``quantile`` by construction.
    ``flagged``: the generated rate is at least three times the held-out rate and Fisher's exact test, one-sided, gives
    p < 0.001. In pixel space flat or blurred images are near to everything: read that rate beside the one in features.

    Raises:
        D2CError: a set is empty or the widths differ.
    """
    if (flipped_generated is None) != (flipped_held_out is None):
        raise ValueError("give both flipped sets or none: a threshold from one orientation does not fit two")
    if flipped_generated is None or flipped_held_out is None:
        distance, index = nearest(generated, train)
        flipped = np.zeros(len(distance), bool)
        reference, _ = nearest(held_out, train)
    else:
        distance, index, flipped = nearest_either(generated, flipped_generated, train)
        reference, _, _ = nearest_either(held_out, flipped_held_out, train)
    threshold = float(np.quantile(reference, quantile, method="lower"))
    near, near_held_out = np.count_nonzero(distance <= threshold), np.count_nonzero(reference <= threshold)
    table = [[near, len(distance) - near], [near_held_out, len(reference) - near_held_out]]
    rate, held_out_rate = near / len(distance), near_held_out / len(reference)
    flagged = bool(rate >= 3 * held_out_rate and stats.fisher_exact(table, alternative="greater")[1] < 0.001)
    return CopyRate(rate, held_out_rate, threshold, flagged, distance, index, flipped)
