"""Features with a covariance of their own, for several tests."""

from __future__ import annotations

import numpy as np


def features(seed: int, n: int, d: int = 16, mean: float = 0.0) -> np.ndarray:
    """Float64 [n, d]."""
    generator = np.random.default_rng(seed)
    mix = np.random.default_rng(7).standard_normal((d, d)) / np.sqrt(d)
    return generator.standard_normal((n, d)) @ mix + mean
