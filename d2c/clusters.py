"""Classes for pictures that have none: k-means on a plain description of each, which needs no download.

The clusters group pictures by layout of edges and colours, not by what they show: on CIFAR-10, 10 clusters reach
a normalised mutual information of 0.12 with the true classes, 100 reach 0.14. Better features give better clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2c import batches
from d2c.errors import UsageError
from d2c.progress import Progress, Silent
from d2c.sources import Source

Features = npt.NDArray[np.float32]
_CELLS, _BINS = 4, 8
# Measured on CIFAR-10: twice or half of it gives clusters further from the classes.
_COLOUR_WEIGHT = 0.15
# In many dimensions a centre that starts on one picture is too far from all others to ever gain a second: with all 176,
# 45 % of 1,000 clusters of CIFAR-10 have fewer than five pictures; with 32, 3 %.
_AXES = 32


@dataclass(frozen=True)
class FeatureSpace:
    """``compute`` maps u1 [n, size, size, 3] to f4 [n, d]; ``name`` identifies it, weights included."""

    name: str
    size: int
    compute: Callable[[npt.NDArray[np.uint8]], Features]


def edges_and_colours(pixels: npt.NDArray[np.uint8]) -> Features:
    """A description of 16 px pictures: u1 [n, 16, 16, 3] -> f4 [n, 176].

    In each of 4 x 4 cells, the square roots of the shares of 8 edge directions in the picture's whole gradient, and the
    mean colour.
    """
    n, side = len(pixels), pixels.shape[1]
    cell = side // _CELLS
    grey = pixels.mean(axis=3, dtype=np.float32) / 255
    down, across = np.gradient(grey, axis=(1, 2))
    strength = np.hypot(across, down)
    angle = np.arctan2(down, across) % np.pi * (_BINS / np.pi)
    lower = np.floor(angle).astype(np.int64) % _BINS
    share = angle - np.floor(angle)
    edges = np.empty((n, _CELLS, _CELLS, _BINS), np.float32)
    for direction in range(_BINS):
        nearest = (lower == direction) * (1 - share) + ((lower + 1) % _BINS == direction) * share
        edges[..., direction] = (strength * nearest).reshape(n, _CELLS, cell, _CELLS, cell).sum(axis=(2, 4))
    # A picture without edges has no directions; 1e-3 is a third of one grey level in one pixel.
    edges = np.sqrt(edges / (edges.sum(axis=(1, 2, 3), keepdims=True) + 1e-3))
    colours = pixels.reshape(n, _CELLS, cell, _CELLS, cell, 3).mean(axis=(2, 4), dtype=np.float32) / 255
    return np.concatenate([edges.reshape(n, -1), _COLOUR_WEIGHT * colours.reshape(n, -1)], axis=1)


PLAIN = FeatureSpace("edges-and-colours-1", 16, edges_and_colours)


def wanted(labels: str) -> int | None:
    """K of ``clusters:K``; None where ``labels`` asks for no clusters.

    Raises:
        UsageError: K is no number from 2 on.
    """
    word, colon, number = labels.partition(":")
    if word != "clusters":
        return None
    if not colon or not number.isdecimal() or int(number) < 2:
        raise UsageError("clusters need a number", found=labels, expected="clusters:K with K of at least 2")
    return int(number)


def cluster(
    source: Source,
    k: int,
    *,
    seed: int = 0,
    features: FeatureSpace = PLAIN,
    threads: int = 4,
    progress: Progress | None = None,
) -> npt.NDArray[np.int32]:
    """k-means of all pictures: int32 [N] cluster numbers 0, 1, ... without gaps; fewer than ``k`` if some stay empty.

    The same source, seed and features give the same clusters. A picture that cannot be read is in cluster 0: whatever
    reads it next excludes it. Memory: N x d x 4 bytes.

    Raises:
        UsageError: fewer readable pictures than clusters.
    """
    found, readable = _describe(source, features, threads, progress or Silent())
    if len(found) < k:
        raise UsageError("there are fewer pictures than clusters", found=len(found), expected=f"at least {k}")
    labels = np.zeros(len(source), np.int32)
    # Numbers without gaps: a class without pictures could not be trained or selected from.
    labels[readable] = np.unique(_k_means(found, k, seed), return_inverse=True)[1]
    return labels


def cluster_names(labels: npt.NDArray[np.int32]) -> list[str]:
    """One name per cluster: "cluster 000", ..."""
    return [f"cluster {number:03d}" for number in range(int(labels.max()) + 1)]


def _describe(
    source: Source, features: FeatureSpace, threads: int, progress: Progress
) -> tuple[Features, npt.NDArray[np.int64]]:
    """Features f4 [n, d] of the readable pictures and their indices int64 [n], both in the source's order."""
    order = source.storage_order().tolist()
    found: Features | None = None
    readable = np.zeros(len(source), dtype=bool)
    with progress.bar("describe", len(order), "image") as bar:
        for batch in batches.load(source, order, features.size, batch=256, threads=threads):
            if len(batch):
                computed = features.compute(batch.pixels)
                if found is None:
                    found = np.empty((len(source), computed.shape[1]), np.float32)
                found[batch.indices] = computed
                readable[batch.indices] = True
            bar.advance(len(batch) + len(batch.bad))
    rows = np.flatnonzero(readable)
    if found is None:
        return np.empty((0, 0), np.float32), rows
    return (found if len(rows) == len(source) else found[rows]), rows


def _k_means(found: Features, k: int, seed: int) -> npt.NDArray[Any]:
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    # Sums over several threads differ from run to run.
    with threadpool_limits(1):
        low = found @ _main_axes(found, _AXES)
        fitted = MiniBatchKMeans(k, random_state=seed, n_init=1, batch_size=4096, max_iter=20).fit(low)
        return np.asarray(fitted.predict(low))


def _main_axes(found: Features, count: int) -> Features:
    """The directions of largest variance: f4 [n, d] -> f4 [d, min(d, count)]."""
    mean = found.mean(axis=0, dtype=np.float64)
    spread = np.zeros((found.shape[1], found.shape[1]))
    for start in range(0, len(found), 65536):
        centred = found[start : start + 65536] - mean
        spread += centred.T @ centred
    axes: Features = np.linalg.eigh(spread)[1][:, -count:].astype(np.float32)
    return axes
