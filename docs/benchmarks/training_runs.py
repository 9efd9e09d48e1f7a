"""What pages of trained arms share: their reports, how far two arms are apart, and whether that is noise."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tables import read, spread

SEEDS = 3
T = 2.78
"""The 5 % point of Student's t with 4 degrees of freedom, which two arms of 3 runs have."""
Figure = Callable[[dict[str, Any]], float]
MEASURES: dict[str, tuple[Figure, int]] = {
    "FD": (lambda report: report["rows"][0]["distance"], 2),
    "mean FD of classes": (lambda report: report["rows"][0]["class_distance"], 2),
    "held-out loss": (lambda report: report["held_out"], 4),
    "precision": (lambda report: report["rows"][0]["precision"], 3),
    "recall": (lambda report: report["rows"][0]["recall"], 3),
    "copy rate": (lambda report: report["rows"][0]["copy_rate"], 4),
}
"""Columns: where the figure lies in a run's report, and digits."""


def reports(out: Path, arms: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Of each arm whose runs are all there: `fid.json` of each, with the last held-out loss of its clock."""
    found = {}
    for arm in arms:
        runs = [out / "runs" / f"{arm}-{seed}" for seed in range(SEEDS)]
        if all((run / "fid" / "fid.json").exists() for run in runs):
            found[arm] = [{**read(run / "fid" / "fid.json"), "held_out": last(run)} for run in runs]
    return found


def last(run: Path) -> float:
    """The held-out loss of a finished run."""
    lines = (run / "memorisation.jsonl").read_text(encoding="utf-8").splitlines()
    return float(json.loads(lines[-1])["held_out"])


def row(arm: str, found: list[dict[str, Any]]) -> list[str]:
    """An arm's figures: mean and standard deviation over its runs."""
    return [arm, *(spread([figure(report) for report in found], digits) for figure, digits in MEASURES.values())]


def verdict(arm: str, base: str, found: dict[str, list[dict[str, Any]]], measures: Sequence[str]) -> str:
    """One line: how far an arm's runs are from those of ``base``."""
    told = []
    for name in measures:
        figure, digits = MEASURES[name]
        one, other = (np.array([figure(report) for report in found[which]]) for which in (arm, base))
        gap = one.mean() - other.mean()
        error = np.sqrt(one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other))
        size = abs(gap) / error if error else 0.0
        word = "within the noise" if size < T else "beyond the noise"
        told.append(
            f"{name} {abs(gap):.{digits}f} {'lower' if gap < 0 else 'higher'} ({size:.1f} standard errors, {word})"
        )
    return f"- `{arm}`: {'; '.join(told)}."
