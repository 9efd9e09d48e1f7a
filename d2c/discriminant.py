"""How sure a linear classifier is of each image's class: cross-entropies, in the space of given features.

A network's last layer is a linear classifier on its own features, so one fitted to them stands for it: linear
discriminant analysis (Gaussian classes of one covariance, equally probable), the covariance shrunk as Ledoit and Wolf
(2004, lemma 3.2) do, and one temperature (Guo et al. 2017), without which the posteriors are too sure of themselves.

Images are dealt into `FOLDS` folds, and each is judged by a classifier that was fitted without its fold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from d2c import runtime
from d2c.budgets import quotas
from d2c.errors import D2CError
from d2c.progress import Progress, Silent

Array: TypeAlias = np.ndarray[Any, Any]
Values: TypeAlias = npt.NDArray[np.float64]
FOLDS = 5
FITTED = 50_000
"""Images that a classifier is fitted to, at most, as many of each class as can be: 50 of each of ImageNet's."""
LARGEST = -float(np.log(1e-12))
"""Cross-entropies end here, as GADC's do."""
_TEMPERED = 5_000
"""Images that the temperature is found with, at most: their logits are in memory together."""
_RIDGE = 1e-6
"""Share of each feature's variance that is added, so that features that never differ can be divided by."""
_BLOCK = 2048


@dataclass(frozen=True, eq=False)
class Judged:
    """cross_entropies: f8 [N], -log p(own class | features) in nats, at most `LARGEST`.

    accuracy: the mean over classes of the share that is classified right, by classifiers that had not seen the images;
    None where that is not known: every class has one image, or there is one class. classes: that have images.
    fitted: images of the largest fit. temperature: what logits were divided by.
    """

    cross_entropies: Values
    accuracy: float | None
    classes: int
    fitted: int
    temperature: float


@dataclass(frozen=True, eq=False)
class Discriminant:
    """A linear classifier: weights f8 [C, D], bias f8 [C]. shrinkage: of its covariance, 0 to 1."""

    weights: Values
    bias: Values
    shrinkage: float = 0.0

    def log_posteriors(self, features: Array) -> Values:
        """f8 [n, C] of features f8 [n, D]."""
        logits: Values = features @ self.weights.T
        logits += self.bias
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logits

    def tempered(self, temperature: float) -> Discriminant:
        """The same, less sure of itself for temperatures above 1."""
        return replace(self, weights=self.weights / temperature, bias=self.bias / temperature)


def fit(features: Array, labels: Array, rows: Array) -> Discriminant:
    """From ``rows`` of features [N, D], perhaps memory-mapped; their ``labels`` [N] are 0 to C - 1, all of them.

    Features are divided by their deviation inside the classes first. Where no class has two rows, the covariance is
    that of all rows around their mean.
    """
    counts = np.bincount(labels[rows])
    count, classes, dim = len(rows), len(counts), features.shape[1]
    means = np.zeros((classes, dim))
    for own, block in _blocks(features, labels, rows):
        order = np.argsort(own, kind="stable")
        present, firsts = np.unique(own[order], return_index=True)
        means[present] += np.add.reduceat(block[order], firsts, axis=0)
    means /= counts[:, None]
    centres = means if count > classes else np.broadcast_to(means.mean(axis=0), means.shape)
    squares = np.zeros(dim)
    for own, block in _blocks(features, labels, rows):
        squares += np.square(block - centres[own]).sum(axis=0)
    scale = np.sqrt(squares / count)
    # What is left of a constant by rounding is no deviation.
    scale[scale <= 1e-9 * np.abs(means).max(axis=0)] = 1.0
    products, fourth = np.zeros((dim, dim)), 0.0
    for own, block in _blocks(features, labels, rows):
        block -= centres[own]
        block /= scale
        products += block.T @ block
        fourth += float(np.square(np.einsum("nd,nd->n", block, block)).sum())
    products /= count
    covariance, shrinkage = _shrunk(products, fourth, count)
    origin = means.mean(axis=0)
    goals = (means - origin) / scale
    weights = np.linalg.solve(covariance, goals.T).T
    bias = -0.5 * np.einsum("cd,cd->c", weights, goals)
    weights /= scale
    return Discriminant(weights, bias - weights @ origin, shrinkage)


def _shrunk(products: Values, fourth: float, count: int) -> tuple[Values, float]:
    """The covariance ``products`` [D, D] of ``count`` rows, drawn towards a multiple of 1, and how far.

    ``fourth``: the sum of the rows' lengths to the fourth.
    """
    dim = len(products)
    level, squares = float(np.trace(products)) / dim, float(np.square(products).sum())
    apart = (squares - dim * level**2) / dim
    noise = min((fourth / count - squares) / (dim * count), apart)
    shrinkage = max(0.0, noise) / apart if apart > 0 else 0.0
    products *= 1 - shrinkage
    products[np.diag_indices(dim)] += shrinkage * level + _RIDGE
    return products, shrinkage


def judge(features: Array, labels: Array, progress: Progress | None = None) -> Judged:
    """How sure the classifiers are of each of N images' ``labels`` [N], by features [N, D], perhaps memory-mapped.

    Memory is that of a few thousand rows, of `FOLDS` classifiers, and of three covariances.

    Raises:
        D2CError: features are not finite.
    """
    from threadpoolctl import threadpool_limits

    present, own = np.unique(labels, return_inverse=True)
    count, classes = len(own), len(present)
    if classes < 2:
        return Judged(np.zeros(count), None, classes, 0, 1.0)
    order, folds = _dealt(own)
    alone = (np.bincount(own) == 1)[own]
    fits = [_fitted(own, order[(folds[order] != fold) | alone[order]]) for fold in range(FOLDS)]
    progress = progress or Silent()
    with threadpool_limits(1):  # sums over several threads differ from run to run
        found = []
        with progress.bar("fit", FOLDS, "classifier") as bar:
            for rows in fits:
                found.append(fit(features, own, rows))
                bar.advance()
        temperature = _temperature(found, features, own, folds, order[~alone[order]])
        found = [one.tempered(temperature) for one in found]
        entropies, right = np.empty(count), np.empty(count, dtype=bool)
        with progress.bar("classify", count, "image") as bar:
            for start in range(0, count, _BLOCK):
                rows = np.arange(start, min(start + _BLOCK, count))
                entropies[rows], right[rows] = _judged(found, features, own, folds, rows)
                bar.advance(len(rows))
    # What a classifier was fitted to says nothing about it.
    told = np.bincount(own[~alone], minlength=classes)
    hits = np.bincount(own[right & ~alone], minlength=classes)
    accuracy = float((hits[told > 0] / told[told > 0]).mean()) if told.any() else None
    return Judged(np.clip(entropies, 0, LARGEST) + 0.0, accuracy, classes, max(map(len, fits)), temperature)


def _dealt(labels: Array) -> tuple[Array, Array]:
    """[N] The rows class by class, each class in random order, and each row's fold."""
    order = runtime.rng("discriminant").permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    own = labels[order]
    folds = np.empty(len(labels), dtype=np.int64)
    folds[order] = (np.arange(len(own)) - np.searchsorted(own, own)) % FOLDS
    return order, folds


def _fitted(labels: Array, order: Array) -> Array:
    """At most `FITTED` rows of ``order``, which stand class by class: the first of each; sorted."""
    own = labels[order]
    counts = np.bincount(own)
    given = quotas(counts, max(FITTED, len(counts)), spread=True).given
    return np.sort(order[np.arange(len(own)) - np.searchsorted(own, own) < given[own]])


def _temperature(found: list[Discriminant], features: Array, labels: Array, folds: Array, unseen: Array) -> float:
    """What makes the mean cross-entropy of some ``unseen`` rows smallest; 1 without any."""
    from scipy.optimize import minimize_scalar

    if not len(unseen):
        return 1.0
    rows = np.sort(unseen[runtime.rng("discriminant", "temperature").permutation(len(unseen))[:_TEMPERED]])
    by_fold = [rows[folds[rows] == fold] for fold in range(FOLDS)]
    posteriors = np.concatenate(
        [one.log_posteriors(_read(features, own)) for one, own in zip(found, by_fold, strict=True)]
    )
    own = labels[np.concatenate(by_fold)]

    def mean(log_temperature: float) -> float:
        logits = posteriors * np.exp(-log_temperature)
        return float((np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(own)), own]).mean())

    # Classes that nothing confuses would have a temperature of 0.
    return float(np.exp(minimize_scalar(mean, bounds=(-2, 7), method="bounded").x))


def _judged(
    found: list[Discriminant], features: Array, labels: Array, folds: Array, rows: Array
) -> tuple[Array, Array]:
    """[n] Cross-entropies of ``rows``, and whether their class is the most probable one."""
    block, own = _read(features, slice(rows[0], rows[-1] + 1)), labels[rows]
    entropies, right = np.empty(len(rows)), np.empty(len(rows), dtype=bool)
    for fold, one in enumerate(found):
        at = np.flatnonzero(folds[rows] == fold)
        posteriors = one.log_posteriors(block[at])
        entropies[at] = -posteriors[np.arange(len(at)), own[at]]
        right[at] = posteriors.argmax(axis=1) == own[at]
    return entropies, right


def _blocks(features: Array, labels: Array, rows: Array) -> Iterator[tuple[Array, Values]]:
    """Labels [n] and features f8 [n, D] of ``rows``, some at a time."""
    for start in range(0, len(rows), _BLOCK):
        some = rows[start : start + _BLOCK]
        yield labels[some], _read(features, some)


def _read(features: Array, rows: Array | slice) -> Values:
    block = features[rows].astype(np.float64)
    if not np.isfinite(block).all():
        raise D2CError("features hold NaN or infinity", expected="finite numbers", hint="compute the features again")
    return block
