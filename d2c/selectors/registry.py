"""The selection methods by name, and what each needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from d2c.selectors import geometry, matching, ranks
from d2c.selectors.base import Candidates, Features, Rows, Selector, features_of
from d2c.selectors.ot import STEEPEST, Weights, ot


@dataclass(frozen=True)
class Method:
    """``features``: it looks at images, not only at scores; ``seeded``: it depends on a seed."""

    select: Selector
    goal: str
    features: bool = False
    seeded: bool = False

    @property
    def nested(self) -> bool:
        """Whether a smaller budget's picks lie inside a larger one's."""
        return self.select is not ranks.interval


SPREAD = 15
"""Median squared distance of features, in epsilons, that they are scaled to for `ot`, whose epsilon is absolute."""

_OUTER = 100
"""Rows farthest from the mean, among which one of the two that are farthest apart is looked for."""


def transported(candidates: Candidates, budget: int, taken: Rows, *, confidence: float = Weights().confusion) -> Rows:
    """`ot` of features scaled to what its epsilon is for; ``confidence`` weighs the cross-entropies."""
    features, epsilon = features_of(candidates), Weights().epsilon
    # An outlier may be dozens of medians away, where exp(-distance^2 / epsilon) is nothing.
    scale = np.sqrt(
        min(SPREAD * epsilon / matching.median_square(features), 0.9 * STEEPEST * epsilon / _widest(features))
    )
    weights = Weights(confusion=confidence)
    return ot(replace(candidates, features=features * np.float32(scale)), budget, taken, weights=weights)


def _widest(features: Features) -> float:
    """The largest squared distance between one of the outermost rows and any other; 1 where all are equal."""
    centred = features - features.mean(axis=0, dtype=np.float64)
    norms = np.einsum("nd,nd->n", centred, centred)
    outermost = np.argsort(norms, kind="stable")[-_OUTER:]
    squares = norms + norms[outermost, None] - 2 * (centred[outermost] @ centred.T)
    return float(squares.max()) or 1.0


METHODS = {
    "interval": Method(ranks.interval, "evenly over the ranks by score (the paper's rule)"),
    "random": Method(ranks.random, "no goal: the baseline", seeded=True),
    "random-window": Method(ranks.random_window, "random among the easiest 74 %: interval's control", seeded=True),
    "min": Method(ranks.easiest, "the lowest scores"),
    "max": Method(ranks.hardest, "the highest scores"),
    "medium": Method(ranks.medium, "around the median score"),
    "herding": Method(matching.herding, "the class's mean", features=True),
    "k-center": Method(geometry.k_center, "no image far from a pick", features=True),
    "facility-location": Method(geometry.facility_location, "every image near a pick", features=True),
    "moments": Method(matching.moments, "the class's mean and covariance", features=True),
    "kernel": Method(matching.kernel, "the class's distribution (kernel mean)", features=True),
    "ot": Method(
        transported, "the class's distribution (partial optimal transport, as GADC)", features=True, seeded=True
    ),
    "match": Method(matching.match, "the class's distribution and its difficulty together", features=True),
}
