"""How many evaluations a score needs: two independent scorings of a few images, with more and more evaluations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from d2c import batches, runtime
from d2c.difficulty import Difficulty, Settings
from d2c.errors import D2CError
from d2c.estimator import agreement
from d2c.progress import Progress
from d2c.sources import Source

CANDIDATES = (4, 8, 16, 32, 64, 128)
_CLASSES, _IMAGES = 16, 64
"""At most so many classes, and images of each."""


@dataclass(frozen=True)
class Pilot:
    """``evals`` is the first of `CANDIDATES` at which two scorings agree as wanted, the last where none does."""

    evals: int
    reached: bool
    tried: list[dict[str, float]]
    images: int
    classes: int


def run(config: Settings, source: Source, target: float, progress: Progress) -> Pilot:
    """Score the same images twice, with seeds of their own, until the ranks agree at ``target``."""
    device = runtime.resolve_device(config.device)
    chosen = _chosen(source.labels, config.seed)
    labels = source.labels[chosen]
    with runtime.one_thread(device), progress.bar("pilot", 2 * sum(CANDIDATES) * len(chosen), "evaluation") as bar:
        difficulty = Difficulty.open(config, source)
        read = batches.load(source, chosen.tolist(), config.size, batch=config.batch_size, threads=config.threads)
        loaded = [batch for batch in read if len(batch)]
        if not loaded:
            raise D2CError("none of the images to try can be read", where=source.location, found=len(chosen))
        tried = []
        for evals in CANDIDATES:
            scores = []
            for half in range(2):
                settings = replace(config, evals=evals, seed=runtime.seed_of("pilot", config.seed, half) % 2**31)
                judge = replace(difficulty, settings=settings)
                means = []
                for batch in loaded:
                    keys = [source.keys[i] for i in batch.indices]
                    own = difficulty.labels[source.labels[batch.indices]]
                    means.append(judge.losses(batch.pixels, keys, own)[0].numpy().mean(axis=1))
                    bar.advance(evals * len(keys))
                scores.append(np.concatenate(means))
            good = np.isin(chosen, np.concatenate([batch.indices for batch in loaded]))
            found, classes = agreement(scores[0], scores[1], labels[good])
            tried.append({"evals": evals, "rank_correlation": round(found, 4)})
            if found >= target:
                break
    return Pilot(evals, found >= target, tried, int(good.sum()), classes)


def _chosen(
    labels: np.ndarray[tuple[int], np.dtype[np.int32]], seed: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Indices of images from a few classes, many of each, since ranks are compared inside a class; sorted."""
    rng = runtime.rng("pilot", seed)
    counts = np.bincount(labels)
    large = np.flatnonzero(counts >= min(10, counts.max()))
    taken = [
        rng.permutation(np.flatnonzero(labels == label))[:_IMAGES]
        for label in rng.permutation(large)[:_CLASSES].tolist()
    ]
    return np.sort(np.concatenate(taken))
