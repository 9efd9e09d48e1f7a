"""Images as the measurements see them: features and small vectors, never all the pixels at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from d2c import metrics, runtime
from d2c.features import FeatureSpace

MANIFOLD = 10_000
"""Real images in precision and recall, at most (ADM's reference has as many)."""
PAIRS = 32
"""Generated images shown beside the training image closest to them."""
Array = np.ndarray[Any, Any]


def _no_digests() -> Array:
    return np.empty(0, dtype="U32")


@dataclass(frozen=True, eq=False)
class Images:
    """Features [N, d] and labels int64 [N] as the run numbers its classes, -1 for a class that it does not know.

    ``digests`` [N] are the xxh3 of the original bytes where these images have a file, else empty.
    """

    features: Array
    labels: Array
    digests: Array = field(default_factory=_no_digests)

    def __len__(self) -> int:
        return len(self.features)

    def take(self, rows: Array | Sequence[int]) -> Images:
        """These rows, or those under a mask, of images that have files."""
        return Images(self.features[rows], self.labels[rows], self.digests[rows])


@dataclass(frozen=True)
class Seen:
    """Images as the copy check sees them, one row each; pixels are kept only as vectors of at most 32 x 32 px."""

    features: Array
    mirrored: Array
    flat: Array
    labels: Array

    @staticmethod
    def of(chunks: Iterable[tuple[Array, Array]], space: FeatureSpace) -> Seen | None:
        """From chunks of labels [n] and pixels u1 [n, S, S, 3], which are let go one by one; None without images."""
        rows = [
            (space(pixels).astype(np.float32), space(mirrored(pixels)).astype(np.float32), flat_pixels(pixels), labels)
            for labels, pixels in chunks
            if len(labels)
        ]
        return Seen(*(np.concatenate(column) for column in zip(*rows, strict=True))) if rows else None


@dataclass(frozen=True, eq=False)
class Yardstick:
    """Real images to compare others with; what every comparison needs of them is computed once."""

    real: Images
    stats: metrics.Stats
    manifold: Array
    """The features that precision and recall are taken in: [at most MANIFOLD, d]."""
    radii: Array | None
    """Of the manifold, squared; None where it is too small for precision and recall."""

    @staticmethod
    def of(real: Images) -> Yardstick:
        """Raises: D2CError: there are fewer than two images."""
        manifold = real.features[runtime.rng("manifold").permutation(len(real))[:MANIFOLD]]
        radii = metrics.squared_radii(manifold) if len(manifold) > 3 else None
        return Yardstick(real, metrics.statistics(real.features), manifold, radii)

    def row(self, name: str, images: Images) -> dict[str, Any]:
        """One line of the report. ``in_reference``: of these ``reference_n`` real images, how many are ``images``."""
        distance = metrics.frechet_distance(metrics.statistics(images.features), self.stats)
        by_class = self._class_distance(images)
        measurable = self.radii is not None and len(images) > 3
        near = metrics.precision_recall(self.manifold, images.features, real_radii=self.radii) if measurable else None
        return {
            "name": name,
            "n": len(images),
            "reference_n": len(self.real),
            "in_reference": int(np.isin(self.real.digests, images.digests).sum()),
            "distance": round(distance.value, 4),
            "rank_deficient": distance.rank_deficient,
            "class_distance": round(by_class.value, 4) if by_class else None,
            "class_covariance": by_class.covariance if by_class else None,
            "precision": round(near.precision, 4) if near else None,
            "recall": round(near.recall, 4) if near else None,
            "copy_rate": None,
        }

    def _class_distance(self, images: Images) -> metrics.ClassFrechet | None:
        """Over the classes that the run knows; None where none of them has two images on both sides."""
        known, given = self.real.labels >= 0, images.labels >= 0
        sizes = [np.bincount(labels, minlength=1) for labels in (self.real.labels[known], images.labels[given])]
        shared = min(map(len, sizes))
        if not np.any(np.minimum(sizes[0][:shared], sizes[1][:shared]) >= 2):
            return None
        return metrics.class_frechet(
            self.real.features[known], self.real.labels[known], images.features[given], images.labels[given]
        )


def flat_pixels(pixels: Array) -> Array:
    """Pixels as vectors, area-averaged to at most 32 px a side: [N, S, S, 3] -> float32 [N, s * s * 3]."""
    side = pixels.shape[1]
    block = max(1, side // 32)
    cut = pixels[:, : side // block * block, : side // block * block].astype(np.float32)
    means = cut.reshape(len(pixels), side // block, block, side // block, block, 3).mean(axis=(2, 4))
    flat: Array = means.reshape(len(pixels), -1)
    return flat


def mirrored(pixels: Array) -> Array:
    """Images [N, S, S, 3] with left and right exchanged."""
    return np.ascontiguousarray(pixels[:, :, ::-1])


def mirrored_flat(flat: Array) -> Array:
    """`flat_pixels` of the mirrored images."""
    side = math.isqrt(flat.shape[1] // 3)
    other: Array = mirrored(flat.reshape(len(flat), side, side, 3)).reshape(flat.shape)
    return other


def copy_check(generated: Seen, train: Seen, unseen: Seen) -> tuple[dict[str, Any], list[int], list[int]]:
    """Copy rates in pixels and in features, both orientations; and the closest pairs in pixels (generated, trained)."""
    features = metrics.copy_rate(
        generated.features,
        train.features,
        unseen.features,
        flipped_generated=generated.mirrored,
        flipped_held_out=unseen.mirrored,
    )
    pixels = metrics.copy_rate(
        generated.flat,
        train.flat,
        unseen.flat,
        flipped_generated=mirrored_flat(generated.flat),
        flipped_held_out=mirrored_flat(unseen.flat),
    )
    found = {
        name: {"rate": round(check.rate, 4), "held_out_rate": round(check.held_out_rate, 4), "flagged": check.flagged}
        for name, check in (("pixels", pixels), ("features", features))
    }
    closest = pixels.closest(PAIRS)
    facts = {**found, "calibrated_on": len(unseen.labels), "flagged": pixels.flagged or features.flagged}
    return facts, closest.tolist(), pixels.index[closest].tolist()
