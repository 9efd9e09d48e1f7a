"""Intervals of a measurement, against what repeating it shows."""

from __future__ import annotations

import numpy as np
from features_fixture import features

from d2c.intervals import distance_interval, mean_interval
from d2c.metrics import frechet_distance, statistics


def test_the_distances_interval_is_about_as_wide_as_repetitions_spread() -> None:
    """It errs on the wide side where a subsample is small beside all images."""
    reference = statistics(features(0, 5000))
    values, widths = [], []
    for seed in range(1, 25):
        x = 1.2 * features(seed, 800, mean=0.2)
        values.append(frechet_distance(statistics(x), reference).value)
        ends = distance_interval(x, reference, values[-1], np.random.default_rng(seed))
        assert ends is not None
        assert ends[0] < values[-1] < ends[1]
        widths.append(ends[1] - ends[0])
    spread = 2 * 1.96 * np.std(values, ddof=1)
    assert 0.7 * spread < np.mean(widths) < 2.5 * spread


def test_the_interval_of_a_mean_is_that_of_the_binomial() -> None:
    inside = np.arange(1000) < 300
    low, high = mean_interval(inside, np.random.default_rng(0))
    error = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert abs(low - (0.3 - error)) < 0.01
    assert abs(high - (0.3 + error)) < 0.01


def test_too_few_images_have_no_interval() -> None:
    x = features(0, 7)
    assert distance_interval(x, statistics(x), 0.0, np.random.default_rng(0)) is None
