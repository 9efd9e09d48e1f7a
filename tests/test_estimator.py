"""The estimator: seeds, strata, and what its reliability figures promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2c.estimator import noise_of, reliability, standard_errors, timesteps_of

KEYS = [f"{i:03d}.png" for i in range(6)]


def test_stratified_times_cover_every_stratum_and_are_shared() -> None:
    times = torch.stack([timesteps_of("stratified", 0, j, 8, KEYS) for j in range(8)])
    assert torch.equal((times * 8).floor(), torch.arange(8.0)[:, None].expand(8, 6))
    assert all(len(set(row)) == 1 for row in times.tolist())


def test_shared_noise_is_one_draw_and_own_noise_one_a_key() -> None:
    assert noise_of("stratified", 0, 3, KEYS, (3, 4, 4)).shape == (1, 3, 4, 4)
    own = noise_of("paper", 0, 3, KEYS, (3, 4, 4))
    assert own.shape == (6, 3, 4, 4)
    assert not torch.equal(own[0], own[1])


@pytest.mark.parametrize("estimator", ["stratified", "paper"])
def test_an_images_draws_do_not_depend_on_its_batch(estimator: str) -> None:
    alone = timesteps_of(estimator, 1, 2, 8, KEYS[2:3]), noise_of(estimator, 1, 2, KEYS[2:3], (3, 4, 4))
    among = timesteps_of(estimator, 1, 2, 8, KEYS), noise_of(estimator, 1, 2, KEYS, (3, 4, 4)).expand(6, 3, 4, 4)
    assert torch.equal(alone[0][0], among[0][2])
    assert torch.equal(alone[1][0], among[1][2])


def simulated(evals: int, noise: float, images: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=images)
    common = rng.normal(size=evals) * 10  # moves every image alike, as a timestep does
    losses = difficulty[:, None] + common + noise * rng.normal(size=(images, evals))
    return losses, difficulty


def test_the_expected_rank_correlation_is_that_of_two_independent_scorings() -> None:
    first, difficulty = simulated(8, 1.5)
    second = difficulty[:, None] + 1.5 * np.random.default_rng(1).normal(size=(4000, 8))
    from scipy.stats import spearmanr

    between = spearmanr(first.mean(1), second.mean(1)).statistic
    assert reliability(first, np.zeros(4000)).expected == pytest.approx(between, abs=0.02)


def test_standard_errors_leave_out_what_all_images_share() -> None:
    losses, _ = simulated(16, 0.5)
    assert standard_errors(losses).mean() == pytest.approx(0.5 / 4, rel=0.05)


def test_reliability_is_measured_inside_classes() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 500)
    losses = labels[:, None] * 100.0 + rng.normal(size=(1000, 8))  # classes differ, images inside do not
    assert abs(reliability(losses, labels).split_half) < 0.1


def test_tiny_classes_are_pooled_and_constant_scores_have_no_rank() -> None:
    losses, _ = simulated(4, 0.1, images=20)
    assert reliability(losses, np.arange(20)).classes == 1
    assert reliability(np.ones((20, 4)), np.zeros(20)).expected == 0.0
