"""Images as the measurements see them: features and small vectors, never all the pixels at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from d2c.copying import RULE, copy_rate
from d2c.features import FeatureSpace, activations
from d2c.metrics import InceptionScore, Moments, Stats

PAIRS = 64
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


@dataclass(frozen=True, eq=False)
class Seen:
    """All that one pass over N images leaves of them.

    ``second``: features in a second space, if one was given. ``mirrored`` and ``flat`` are for the copy check, pixels
    being kept only as vectors of at most 32 x 32 px. ``spatial`` and ``inception_score`` come from Inception alone.
    ``rows`` [N]: the images' numbers in the set that they come from.
    """

    images: Images
    rows: Array
    mirrored: Array
    flat: Array
    second: Images | None
    spatial: Stats | None
    inception_score: float | None

    def __len__(self) -> int:
        return len(self.images)

    @staticmethod
    def of(
        chunks: Iterable[tuple[Array, Array, Array, Array]], space: FeatureSpace, second: FeatureSpace | None = None
    ) -> Seen | None:
        """From chunks of labels [n], pixels u1 [n, S, S, 3], digests [n] and rows [n], which are let go one by one.

        None without images.
        """
        columns: list[tuple[Array, ...]] = []
        spatial, score = Moments(), InceptionScore()
        for labels, pixels, digests, rows in chunks:
            if not len(labels):
                continue
            found = activations(space, pixels)
            if found.spatial is not None and found.logits is not None:
                spatial.add(found.spatial)
                score.add(found.logits)
            columns.append(
                (
                    found.features.astype(np.float32),
                    labels,
                    digests,
                    rows,
                    space(mirrored(pixels)).astype(np.float32),
                    flat_pixels(pixels),
                    second(pixels).astype(np.float32) if second else np.empty((len(labels), 0), np.float32),
                )
            )
        if not columns:
            return None
        features, labels, digests, rows, flipped, flat, other = map(np.concatenate, zip(*columns, strict=True))
        return Seen(
            images=Images(features, labels, digests),
            rows=rows,
            mirrored=flipped,
            flat=flat,
            second=Images(other, labels, digests) if second else None,
            spatial=spatial.stats() if len(labels) > 1 and spatial.seen else None,
            inception_score=score.value(),
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
    """Copy rates in pixels and in features, both orientations; and the closest pairs in pixels (generated, trained).

    ``worse`` names the one of the two in which more images count as copies.
    """
    features = copy_rate(
        generated.images.features,
        train.images.features,
        unseen.images.features,
        flipped_generated=generated.mirrored,
        flipped_held_out=unseen.mirrored,
    )
    pixels = copy_rate(
        generated.flat,
        train.flat,
        unseen.flat,
        flipped_generated=mirrored_flat(generated.flat),
        flipped_held_out=mirrored_flat(unseen.flat),
    )
    found = {
        name: {
            "rate": round(check.rate, 4),
            "interval": [round(end, 4) for end in check.interval],
            "held_out_rate": round(check.held_out_rate, 4),
            "mirrored": round(float(check.flipped[check.closeness <= check.threshold].mean()), 4)
            if check.rate
            else None,
            "threshold": round(check.threshold, 4),
            "flagged": check.flagged,
        }
        for name, check in (("pixels", pixels), ("features", features))
    }
    closest = pixels.closest(PAIRS)
    facts = {
        **found,
        "worse": "pixels" if pixels.rate > features.rate else "features",
        "calibrated_on": len(unseen),
        "flagged": pixels.flagged or features.flagged,
        "rule": RULE,
    }
    return facts, closest.tolist(), pixels.index[closest].tolist()
