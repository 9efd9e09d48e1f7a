"""Images as the measurements see them: features and small vectors, never all the pixels at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2c.features import FeatureSpace

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Real:
    """Real images: features [N, d], labels [N], keys."""

    features: Array
    labels: Array


@dataclass(frozen=True)
class Seen:
    """Images as the measurements see them, one row each; pixels are kept only as vectors of at most 32 x 32 px."""

    features: Array
    mirrored: Array
    flat: Array
    labels: Array

    @staticmethod
    def of(chunks: Iterable[tuple[Array, Array]], space: FeatureSpace) -> Seen:
        """From chunks of labels [n] and pixels u1 [n, S, S, 3], which are let go one by one."""
        rows = [
            (space(pixels).astype(np.float32), space(mirrored(pixels)).astype(np.float32), flat_pixels(pixels), labels)
            for labels, pixels in chunks
        ]
        return Seen(*(np.concatenate(column) for column in zip(*rows, strict=True)))

    @property
    def real(self) -> Real:
        return Real(self.features, self.labels)


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
