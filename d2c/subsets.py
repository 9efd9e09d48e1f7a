"""How far a subset is from the images it was chosen from, in one feature space, beside random ones of the same quotas.

A distance alone says little: it depends on the number of images and on the space. Random subsets that take as many
images of every class show what the number would be without any choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from d2c import metrics, neighbours, runtime
from d2c.errors import D2CError

Array: TypeAlias = np.ndarray[Any, Any]
SOME = 10_000
"""Images of the full set that recall and coverage look at, at most (as in `d2c.seen`)."""
WORST = 0.05
"""Share of the classes, those farthest from their images, whose mean distance is told."""
CLUSTERS = 1_000
_BLOCK = 4096
_AXES = 32  # in more dimensions most clusters of k-means have a single image: see d2c.clusters
_FITTED = 50_000  # images that k-means is fitted to, at most: 10,000 need 400 MB in 2,048 dimensions


@dataclass(frozen=True, eq=False)
class Measured:
    """A subset against the full set. None: too few images to tell.

    distance: Frechet. recall: share of images within the picks' manifold. coverage: share of images that have a pick
    among their k nearest. by_class: f8 [C], distance of each class's images, NaN with fewer than two on a side.
    class_distance: its mean. worst: its mean over the farthest `WORST` of the classes.
    """

    distance: float
    recall: float | None
    coverage: float | None
    by_class: Array
    class_distance: float | None
    worst: float | None


@dataclass(frozen=True, eq=False)
class FullSet:
    """What every comparison with the full set needs of it. Classes are compared by means and deviations [C, D] only:
    hardly any has more picks than there are dimensions.
    """

    stats: metrics.Stats
    means: Array
    deviations: Array
    """NaN for classes of fewer than two images."""
    some: Array
    """Random images of the full set: f4 [at most SOME, D]."""
    radii: Array
    """Squared distances of ``some`` to their third nearest, for recall, and to the ``nearest``-th, for coverage."""
    nearest: int

    @staticmethod
    def of(features: Array, labels: Array, classes: int, picks: int) -> FullSet:
        """From features [N, D], perhaps memory-mapped, which are read once, in blocks.

        ``picks``: the size of the subsets to come. A pick is looked for among an image's ``nearest`` images, so many
        that random picks are found for most of them.

        Raises:
            D2CError: there are fewer than six images, or NaN among their features.
        """
        stats, means, deviations = _moments(features, labels, classes)
        rows = np.sort(runtime.rng("subsets", "some").permutation(len(features))[:SOME])
        some = np.asarray(features[rows], dtype=np.float32)
        nearest = min(max(5, math.ceil(2 * len(some) / picks)), len(some) - 1)
        radii = neighbours.manifold_radii(some, nearest)
        return FullSet(stats, means, deviations, some, radii, nearest)

    def measure(self, features: Array, labels: Array) -> Measured:
        """A subset of at least two images: features [n, D], labels [n]."""
        stats, means, deviations = _moments(features, labels, len(self.means))
        distance = metrics.frechet_distance(stats, self.stats)
        recall = coverage = None
        if len(features) > 3:
            found = neighbours.manifold(self.some, features, self.radii, self.nearest)
            recall, coverage = found.recall, found.coverage
        by_class = ((means - self.means) ** 2 + (deviations - self.deviations) ** 2).sum(axis=1)
        known = np.sort(by_class[np.isfinite(by_class)])[::-1]
        mean, worst = (
            (float(known.mean()), float(known[: math.ceil(WORST * len(known))].mean())) if len(known) else (None, None)
        )
        return Measured(distance.value, recall, coverage, by_class, mean, worst)


def _moments(features: Array, labels: Array, classes: int) -> tuple[metrics.Stats, Array, Array]:
    """Mean and covariance of all rows; means and unbiased deviations [C, D] of the classes, else NaN."""
    count, dim = features.shape
    # Sums of squares lose digits where the mean is far from 0.
    shift = np.asarray(features[:_BLOCK], dtype=np.float64).mean(axis=0)
    sums, squares, products = np.zeros((classes, dim)), np.zeros((classes, dim)), np.zeros((dim, dim))
    for start in range(0, count, _BLOCK):
        own = labels[start : start + _BLOCK]
        order = np.argsort(own, kind="stable")
        block = np.asarray(features[start : start + _BLOCK], dtype=np.float64)[order] - shift
        present, firsts = np.unique(own[order], return_index=True)
        sums[present] += np.add.reduceat(block, firsts, axis=0)
        products += block.T @ block
        squares[present] += np.add.reduceat(np.square(block, out=block), firsts, axis=0)
    mean = sums.sum(axis=0) / count
    if not np.isfinite(products).all():
        raise D2CError(
            "features hold NaN or infinity",
            found=f"{count} images",
            expected="finite numbers",
            hint="mend the table, or delete the folder of these features in the workspace, and run the command again",
        )
    sigma = (products - count * np.outer(mean, mean)) / max(1, count - 1)
    sizes = np.bincount(labels, minlength=classes).astype(np.float64)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        means = sums / sizes
        variances = (squares - sizes * means**2) / np.where(sizes > 1, sizes - 1, np.nan)
    return metrics.Stats(mean + shift, sigma, count), means + shift, np.sqrt(np.maximum(variances, 0))


def random_like(labels: Array, quotas: Array, seed: int) -> Array:
    """Rows of a random subset of ``labels`` [N] that has ``quotas`` [C] of each class; sorted."""
    draws = runtime.rng("subsets", "random", seed).random(len(labels))
    order = np.lexsort((draws, labels))
    own = labels[order]
    places = np.arange(len(own)) - np.searchsorted(own, own)
    return np.sort(order[places < quotas[own]])


class Clusters:
    """k-means of the full set on its main axes, as a map from features to clusters."""

    def __init__(self, features: Array, stats: metrics.Stats, picks: int) -> None:
        """``features`` [N, D], ``stats`` of all of them; half as many clusters as ``picks``, at most `CLUSTERS`."""
        from scipy.linalg import eigh
        from sklearn.cluster import MiniBatchKMeans
        from threadpoolctl import threadpool_limits

        dim = len(stats.mu)
        self._mean = stats.mu
        self._axes = eigh(stats.sigma, subset_by_index=[max(0, dim - _AXES), dim - 1])[1]
        rows = np.sort(runtime.rng("subsets", "clusters").permutation(len(features))[:_FITTED])
        self.count = max(2, min(CLUSTERS, picks // 2, len(rows) // 2))
        with threadpool_limits(1):  # sums over several threads differ from run to run
            points = self._points(features[rows])
            self._fitted = MiniBatchKMeans(self.count, random_state=0, n_init=1, batch_size=4096).fit(points)

    def covered(self, features: Array) -> float:
        """Share of the clusters that hold at least one of ``features`` [n, D]."""
        return float(len(np.unique(self._fitted.predict(self._points(features))))) / self.count

    def _points(self, features: Array) -> Array:
        points = [
            (np.asarray(features[start : start + _BLOCK], dtype=np.float64) - self._mean) @ self._axes
            for start in range(0, len(features), _BLOCK)
        ]
        return np.concatenate(points)


def beside(value: float | None, random: Sequence[float | None]) -> dict[str, float | None]:
    """A measure of a subset and of random ones: ``value``, ``random_mean``, ``random_sd``, and how far apart, ``z``."""
    known = np.array([one for one in random if one is not None], dtype=np.float64)
    if value is None or len(known) < 2:
        return {"value": value, "random_mean": None, "random_sd": None, "z": None}
    mean, sd = float(known.mean()), float(known.std(ddof=1))
    # Subsets that are all alike (every image is picked) differ by rounding only.
    apart = (value - mean) / sd if sd > 1e-9 * abs(mean) else None
    return {"value": value, "random_mean": mean, "random_sd": sd, "z": apart}
