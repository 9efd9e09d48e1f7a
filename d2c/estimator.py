"""The estimator behind a score: which timesteps and noise an image is tried with, and how far the ranking is known."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from d2c import runtime


def timesteps_of(estimator: str, seed: int, j: int, evals: int, keys: list[str]) -> torch.Tensor:
    """Times in [0, 1] (1 = noise) of evaluation ``j`` of ``evals`` for the images ``keys``: float32 [N].

    ``stratified``: one draw from stratum j, the same for all images. ``paper``: uniform, from (seed, key, j).
    """
    if estimator == "stratified":
        u = torch.rand((), generator=runtime.generator("timestep", seed, j))
        return ((j + u) / evals).expand(len(keys))
    return torch.stack([torch.rand((), generator=runtime.generator("timestep", seed, j, key)) for key in keys])


def noise_of(estimator: str, seed: int, j: int, keys: list[str], shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise of evaluation ``j``: [1, *shape] shared (``stratified``) or [N, *shape] (``paper``)."""
    if estimator == "stratified":
        return torch.randn(1, *shape, generator=runtime.generator("noise", seed, j))
    return torch.stack([torch.randn(*shape, generator=runtime.generator("noise", seed, j, key)) for key in keys])


def standard_errors(losses: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Standard error of each image's mean loss *relative to the other images*: [N, evals] -> [N].

    The mean of each evaluation over all images is taken out first: what is common to all images moves no rank.
    """
    residual = losses - losses.mean(axis=0, keepdims=True)
    spread: np.ndarray[Any, np.dtype[np.float64]] = residual.std(axis=1, ddof=1) / np.sqrt(losses.shape[1])
    return spread


@dataclass(frozen=True)
class Reliability:
    """How far a second, independent scoring would agree in rank, inside a class (mean over classes)."""

    split_half: float
    """Spearman correlation between the means of the even and of the odd evaluations."""
    expected: float
    """The same for two full scorings, by the Spearman-Brown formula 2r / (1 + r)."""
    evaluations: int
    classes: int
    """Classes with at least 10 images, over which the mean was taken."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def reliability(
    losses: np.ndarray[Any, np.dtype[np.float64]], labels: np.ndarray[Any, np.dtype[Any]], smallest: int = 10
) -> Reliability:
    """Split-half reliability of the ranking: ``losses`` [N, evals], ``labels`` [N].

    Where no class has ``smallest`` images, all images are taken as one class.
    """
    half, classes = agreement(losses[:, 0::2].mean(axis=1), losses[:, 1::2].mean(axis=1), labels, smallest)
    return Reliability(
        split_half=round(half, 4),
        expected=round(2 * half / (1 + half), 4) if half > -1 else -1.0,
        evaluations=losses.shape[1],
        classes=classes,
    )


def agreement(
    one: np.ndarray[Any, Any], other: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], smallest: int = 10
) -> tuple[float, int]:
    """Spearman correlation of two scorings [N] inside a class, its mean over classes, and how many those were."""
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    large = [group for group in groups if len(group) >= smallest] or [order]
    return float(np.mean([_spearman(one[group], other[group]) for group in large])), len(large)


def _spearman(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a, b).statistic)
