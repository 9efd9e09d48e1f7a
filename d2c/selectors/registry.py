"""The selection methods by name, and what each needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from d2c.selectors import geometry, matching, ranks
from d2c.selectors.base import Candidates, Rows, Selector, features_of
from d2c.selectors.ot import Weights, ot


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


def _ot(candidates: Candidates, budget: int, taken: Rows) -> Rows:
    features = features_of(candidates)
    scale = np.sqrt(SPREAD * Weights().epsilon / matching.median_square(features))
    return ot(replace(candidates, features=features * np.float32(scale)), budget, taken)


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
    "ot": Method(_ot, "the class's distribution (partial optimal transport, as GADC)", features=True, seeded=True),
    "match": Method(matching.match, "the class's distribution and its difficulty together", features=True),
}
