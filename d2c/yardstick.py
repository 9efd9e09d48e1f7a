"""Images compared with a reference: one line of a report, and the table of its classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from d2c import intervals, metrics, neighbours, runtime
from d2c.metrics import ClassFrechet, Frechet, Stats
from d2c.neighbours import K_COVERAGE, K_MANIFOLD, Manifold
from d2c.seen import Images

Array: TypeAlias = np.ndarray[Any, Any]

MANIFOLD = 10_000
"""Real images in precision, recall, density and coverage, at most (ADM's reference has as many)."""
KERNEL = 5_000
"""Images on either side of the kernel distance, at most."""
WORST = 0.05
"""Share of the classes, those farthest from their real images, whose mean distance is told (at least one)."""


@dataclass(frozen=True, eq=False)
class Compared:
    """Images beside a reference. None: too few images on a side, or no real images at hand, only their statistics."""

    images: Images
    distance: Frechet
    by_class: ClassFrechet | None
    near: Manifold | None
    kernel: float | None

    @property
    def worst(self) -> float | None:
        """Mean distance of the worst `WORST` of the classes."""
        if self.by_class is None:
            return None
        ordered = sorted(self.by_class.per_class.values(), reverse=True)
        return float(np.mean(ordered[: math.ceil(WORST * len(ordered))]))


@dataclass(frozen=True, eq=False)
class Yardstick:
    """A reference to compare others with; what every comparison needs of it is computed once.

    ``selected`` bool [M]: which images of the ``manifold`` the run was trained on.
    """

    stats: Stats
    real: Images | None
    manifold: Images | None
    """The images that precision, recall, density and coverage look at: at most MANIFOLD."""
    radii: Array | None
    selected: Array | None

    @staticmethod
    def of(stats: Stats, real: Images | None, contents: Array | None = None) -> Yardstick:
        """``contents``: digests of the files that the run was trained on; no use where ``real`` are no files."""
        if real is None or len(real) <= K_COVERAGE:
            return Yardstick(stats, real, None, None, None)
        some = real.take(runtime.rng("manifold").permutation(len(real))[:MANIFOLD])
        selected = None
        if contents is not None and np.any(some.digests != ""):
            selected = np.isin(some.digests, contents[contents != ""])
        return Yardstick(stats, real, some, neighbours.manifold_radii(some.features), selected)

    def compare(self, images: Images, covariance: str | None = None) -> Compared:
        """``covariance``: how classes are to be compared, as a `ClassFrechet` names it; None: as these images allow.

        Raises:
            D2CError: there are fewer than two images, or they are of another space.
        """
        distance = metrics.frechet_distance(metrics.statistics(images.features), self.stats)
        near = kernel = None
        if self.manifold is not None and len(images) > K_MANIFOLD:
            near = neighbours.manifold(self.manifold.features, images.features, self.radii)
        if self.real is not None and len(self.real) > 1:
            chosen = [runtime.rng("kernel").permutation(len(one))[:KERNEL] for one in (self.real, images)]
            kernel = metrics.kernel_distance(self.real.features[chosen[0]], images.features[chosen[1]])
        return Compared(images, distance, self._by_class(images, covariance), near, kernel)

    def row(self, name: str, compared: Compared) -> dict[str, Any]:
        """One line of the report. ``in_reference``: of these ``reference_n`` real images, how many are ``images``."""
        near, by_class, images = compared.near, compared.by_class, compared.images
        real = self.real.digests if self.real is not None else np.empty(0, "U32")
        unselected = None
        if near and self.selected is not None and not self.selected.all():
            unselected = float(near.covered[~self.selected].mean())
        return {
            "name": name,
            "n": len(images),
            "reference_n": self.stats.n or None,
            "in_reference": int(np.isin(real, images.digests[images.digests != ""]).sum()),
            "distance": round(compared.distance.value, 4),
            "rank_deficient": compared.distance.rank_deficient,
            "class_distance": _rounded(by_class.value if by_class else None),
            "worst_class_distance": _rounded(compared.worst),
            "class_covariance": by_class.covariance if by_class else None,
            "kernel_distance": _rounded(compared.kernel, 6),
            "precision": _rounded(near.precision if near else None),
            "recall": _rounded(near.recall if near else None),
            "density": _rounded(near.density if near else None),
            "coverage": _rounded(near.coverage if near else None),
            "coverage_unselected": _rounded(unselected),
            "copy_rate": None,
        }

    def classes(self, compared: Compared, names: Mapping[int, str]) -> list[dict[str, Any]]:
        """A line for each class that can be compared, the farthest from its real images first."""
        if compared.by_class is None or self.real is None:
            return []
        found = []
        for number, distance in sorted(compared.by_class.per_class.items(), key=lambda item: (-item[1], item[0])):
            own, covered = compared.images.labels == number, None
            if self.manifold is not None and compared.near is not None:
                covered = compared.near.covered[self.manifold.labels == number]
            found.append(
                {
                    "class": names.get(number, str(number)),
                    "n": int(own.sum()),
                    "reference_n": int((self.real.labels == number).sum()),
                    "distance": round(distance, 4),
                    "precision": _mean(compared.near.inside[own]) if compared.near else None,
                    "coverage": _mean(covered) if covered is not None else None,
                }
            )
        return found

    def intervals(self, compared: Compared, seed: int) -> dict[str, list[float] | None]:
        """95 % intervals by `d2c.intervals`; precision and density move with the generated images, the others with the
        real ones.
        """
        features, near = compared.images.features, compared.near
        rng = runtime.rng("intervals", seed)
        distance = intervals.distance_interval(features, self.stats, compared.distance.value, rng)
        found: dict[str, list[float] | None] = {"distance": _ends(distance)}
        if near:
            per_image = {
                "precision": near.inside,
                "recall": near.recalled,
                "density": near.balls / near.k,
                "coverage": near.covered,
            }
            found.update({name: _ends(intervals.mean_interval(values, rng)) for name, values in per_image.items()})
        return found

    def _by_class(self, images: Images, covariance: str | None) -> ClassFrechet | None:
        """Over the classes that the run knows; None where none of them has two images on both sides, or too few for
        the ``covariance`` that is wanted.
        """
        if self.real is None:
            return None
        known, given = self.real.labels >= 0, images.labels >= 0
        sizes = [np.bincount(labels, minlength=1) for labels in (self.real.labels[known], images.labels[given])]
        shared = min(map(len, sizes))
        if not np.any(np.minimum(sizes[0][:shared], sizes[1][:shared]) >= 2):
            return None
        found = metrics.class_frechet(
            self.real.features[known],
            self.real.labels[known],
            images.features[given],
            images.labels[given],
            diagonal=covariance == "diagonal",
        )
        return found if covariance in (None, found.covariance) else None


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)


def _mean(values: Array) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None


def _ends(interval: tuple[float, float] | None) -> list[float] | None:
    return [round(end, 4) for end in interval] if interval else None
