"""Distances between the distributions of two sets of features, in float64: Frechet, kernel, Inception score.

Every function takes features as [n, d] arrays of any real dtype. What looks at pairs of images is in `d2c.neighbours`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from scipy import linalg, special

from d2c.errors import D2CError

Array: TypeAlias = np.ndarray[Any, Any]

_TILE = 4096  # rows that are summed at once: 64 MiB of float64 at 2,048 features
SPLIT = 5_000
"""Images in one split of the Inception score, as ADM's evaluator takes them."""


@dataclass(frozen=True)
class Stats:
    """Mean mu [d] and unbiased covariance sigma [d, d] of n features, float64. ``n``: 0 where nobody noted it."""

    mu: Array
    sigma: Array
    n: int

    @property
    def rank_deficient(self) -> bool:
        """Whether n is too small for a covariance of full rank (n <= d)."""
        return 0 < self.n <= len(self.mu)


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


def checked(features: Array, what: str, at_least: int = 1) -> Array:
    """``features`` as they are.

    Raises:
        D2CError: they are no matrix of at least so many rows, or hold NaN or infinity.
    """
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


def same_width(a: Array, b: Array) -> None:
    """Raises: D2CError: the two sets have not as many features an image."""
    if a.shape[1:] != b.shape[1:]:
        raise D2CError(
            "the two sets come from different feature spaces",
            found=f"{a.shape[1:]} and {b.shape[1:]} values an image",
            expected="the same width",
            hint="compute both with the same extractor",
        )


@dataclass
class Moments:
    """Mean and covariance of features that come in chunks, of which none is kept.

    Rows are summed in blocks of one size whatever the chunks are, so that statistics do not depend on a batch size.
    """

    n: int = 0
    _mean: Array = field(default_factory=lambda: np.zeros(0))
    _scatter: Array = field(default_factory=lambda: np.zeros((0, 0)))
    _waiting: list[Array] = field(default_factory=list)

    @property
    def seen(self) -> int:
        """Rows so far."""
        return self.n + sum(map(len, self._waiting))

    def add(self, features: Array) -> None:
        """Take in [n, d]. Raises: D2CError: NaN or infinity among them."""
        checked(features, "features", at_least=0)
        while len(features):
            room = _TILE - sum(map(len, self._waiting))
            self._waiting.append(features[:room])
            features = features[room:]
            if sum(map(len, self._waiting)) == _TILE:
                self._flush()

    def stats(self) -> Stats:
        """Of all rows so far.

        Raises:
            D2CError: there are fewer than two.
        """
        self._flush()
        if self.n < 2:
            raise D2CError(
                "too few features to measure",
                found=f"{self.n} images",
                expected="n >= 2 for a covariance, and more images than features for one of full rank",
                hint="measure on more images",
            )
        return Stats(self._mean, self._scatter / (self.n - 1), self.n)

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting).astype(np.float64)
        self._waiting = []
        mean = rows.mean(axis=0)
        rows -= mean
        scatter = rows.T @ rows
        if not self.n:
            self.n, self._mean, self._scatter = len(rows), mean, scatter
            return
        # Chan, Golub & LeVeque 1979: two sets' scatters join by the distance of their means.
        total, apart = self.n + len(rows), mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(apart, apart) * (self.n * len(rows) / total)
        self._mean = self._mean + apart * (len(rows) / total)
        self.n = total


def statistics(features: Array) -> Stats:
    """Mean and unbiased covariance of features [n, d], summed in float64.

    Raises:
        D2CError: fewer than two rows, or NaN or infinity among them.
    """
    moments = Moments()
    moments.add(checked(features, "features", at_least=2))
    return moments.stats()


def factor(sigma: Array) -> Array:
    """F [d, r] with F F^T = sigma; eigenvalues that are rounding noise are left out."""
    values, vectors = linalg.eigh(sigma, driver="evd")
    keep = values > max(float(values[-1]), 0.0) * len(values) * np.finfo(np.float64).eps
    found: Array = vectors[:, keep] * np.sqrt(values[keep])
    return found


def frechet_distance(a: Stats, b: Stats) -> Frechet:
    """Squared Frechet distance |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, eq. 6).

    With S = F F^T the trace of the root is the sum of the singular values of F_a^T F_b: no matrix root, no complex
    numbers, and a set has distance 0 to itself even where its covariance has no full rank.

    Raises:
        D2CError: the two sets have features of different widths.
    """
    same_width(a.mu[None], b.mu[None])
    difference = a.mu - b.mu
    mean_part = float(difference @ difference)
    cross = factor(a.sigma).T @ factor(b.sigma)
    root = float(linalg.svdvals(cross).sum()) if cross.size else 0.0
    covariance_part = float(np.trace(a.sigma) + np.trace(b.sigma)) - 2 * root
    value = max(0.0, mean_part + covariance_part)  # rounding can leave -1e-12
    return Frechet(value, mean_part, covariance_part, a.rank_deficient or b.rank_deficient)


def class_frechet(
    real: Array, real_labels: Array, fake: Array, fake_labels: Array, *, diagonal: bool = False
) -> ClassFrechet:
    """Mean over the classes of the Frechet distance between a class's real and generated features.

    One definition serves all classes of a call: full covariances where every measured class has more images than
    features on both sides; otherwise, or with ``diagonal``, diagonal ones, whose distance is
    |mu_r - mu_f|^2 + |s_r - s_f|^2 with standard deviations s [d], defined from two images on. ``covariance`` names
    which; the two must not be compared.

    Raises:
        D2CError: no class has two images on both sides.
    """
    real, fake = checked(real, "real features"), checked(fake, "generated features")
    same_width(real, fake)
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
    full = not diagonal and all(sizes[c] > real.shape[1] for c in measured)
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


@dataclass
class InceptionScore:
    """Salimans et al. 2016 over consecutive splits of ``split`` images, never shuffled, of logits without their bias.

    A split's score is exp of the mean over its images of KL(p(y|x) || p(y)), p(y) being the split's mean; the value is
    the mean over the splits, the last of which may be smaller, as in ADM's evaluator.
    """

    split: int = SPLIT
    _scores: list[float] = field(default_factory=list)
    _n: int = 0
    _marginal: Array = field(default_factory=lambda: np.zeros(0))
    _negentropy: float = 0.0

    def add(self, logits: Array) -> None:
        """Take in the next images' logits [n, classes]."""
        while len(logits):
            part = checked(logits[: self.split - self._n], "logits").astype(np.float64)
            logits = logits[len(part) :]
            log_p = special.log_softmax(part, axis=1)
            p = np.exp(log_p)
            self._marginal = p.sum(axis=0) + (self._marginal if self._n else 0.0)
            self._negentropy += float((p * log_p).sum())
            self._n += len(part)
            if self._n == self.split:
                self._close()

    def value(self) -> float | None:
        """Of all images so far; None without any."""
        if self._n:
            self._close()
        return float(np.mean(self._scores)) if self._scores else None

    def _close(self) -> None:
        marginal = self._marginal / self._n
        entropy = -float(special.xlogy(marginal, marginal).sum())
        self._scores.append(float(np.exp(self._negentropy / self._n + entropy)))
        self._n, self._negentropy = 0, 0.0


def kernel_distance(a: Array, b: Array) -> float:
    """Unbiased squared MMD of all of a [n, d] and b [m, d] under (x.y / d + 1)^3: KID (Binkowski et al. 2018).

    Published values are means over subsets of 1,000; this has the same expectation and less noise. It may be negative.

    Raises:
        D2CError: a side has fewer than two rows, or the widths differ.
    """
    checked(a, "real features", at_least=2)
    checked(b, "generated features", at_least=2)
    same_width(a, b)
    n, m = len(a), len(b)
    within = _kernel_sum(a, None) / (n * (n - 1)) + _kernel_sum(b, None) / (m * (m - 1))
    return within - 2 * _kernel_sum(a, b) / (n * m)


def _kernel_sum(a: Array, b: Array | None) -> float:
    """Over all pairs of rows, or, without ``b``, over pairs of different rows of ``a``."""
    other, total = a if b is None else b, 0.0
    for top in range(0, len(a), _TILE):
        x = a[top : top + _TILE].astype(np.float64)
        for left in range(top if b is None else 0, len(other), _TILE):
            y = other[left : left + _TILE].astype(np.float64)
            kernel = (x @ y.T / a.shape[1] + 1) ** 3
            total += float(kernel.sum()) * (2 if b is None and left > top else 1)
            if b is None and left == top:
                total -= float(np.trace(kernel))
    return total
