"""Runs of bench.py as arms: grouped with their like, and compared."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from bench_cells import ANEW
from scipy import stats

Row = dict[str, Any]
Group = tuple[str, str, str, int, int]
"""Objective, attachments, scorer, budget and steps: what two arms must share to be compared."""
MEASURES = {
    "distance": ("FD", 2),
    "second_distance": ("FD, teacher", 2),
    "class_distance": ("class FD", 2),
    "held_out": ("held-out loss", 4),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "coverage": ("coverage", 3),
    "copies_pixels": ("copies, pixels", 4),
    "copies_features": ("copies, features", 4),
}
COMPARED = ("class_distance", "second_distance", "held_out")
"""What rules are ranked by: the judge's FD alone misses `max` and favours rules that choose in features like its own;
the teacher is another kind of network; the held-out loss asks for all of the data.
"""
ATTACHED = {"both": "text and vision", "text": "text", "vision": "vision"}
SCORERS = {
    "weak": "a scorer trained for a tenth of the steps",
    "tenth": "a scorer that saw a random tenth of the images",
    "second": "another scorer and other features",
    "third": "a third scorer and third features",
    "fourth": "a fourth scorer and fourth features",
    "fifth": "a fifth scorer and fifth features",
}
ANEW_TOO = ", anew"
"""The arm of a rule whose runs each have their own scorer and features, so their own subset."""
OURS = "kernel"
QUESTIONS = {
    "interval": "Is the paper's interval sampling better than random?",
    "rules": "Are other rules better than random?",
    "ours": "Is our rule, `kernel`, better than interval sampling and than other rules that match?",
    "attach": "Does attaching help?",
    "scorer": "Does another scorer, weaker or of another seed, choose worse?",
    "full": "Are a few random images better than all of them, in as many steps?",
}


@dataclass(frozen=True)
class Arm:
    """The runs of one rule in one group."""

    method: str
    runs: list[Row]

    def values(self, measure: str) -> np.ndarray:
        """One a run; NaN where it was not measured."""
        return np.array([run["figures"].get(measure) for run in self.runs], dtype=float)

    def mean(self, measure: str) -> float:
        return float(self.values(measure).mean())

    def error(self, measure: str) -> float:
        """The standard error of the mean; NaN of a single run."""
        values = self.values(measure)
        return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


Arms = dict[str, Arm]


def grouped(rows: list[Row]) -> dict[Group, Arms]:
    """Arms by group, the plainest first; full data stands in each group that is otherwise alike."""
    found: dict[Group, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        key = (row["objective"], row["attach"], row["scorer"], row["budget"], row["steps"])
        found[key][row["method"]].append(row)
    for (*others, method), runs in _anew(rows).items():
        objective, attach, budget, steps = others
        found[objective, attach, "own", budget, steps][method + ANEW_TOO] = runs
        for scorer in ANEW:
            # What the arm says already.
            arms = found.get((objective, attach, scorer, budget, steps), {})
            if len(arms.get(method, [])) == 1:
                del arms[method]
    full = {(key[0], key[1], key[2], key[4]): arms.pop("full") for key, arms in found.items() if "full" in arms}
    groups: dict[Group, Arms] = {}
    for key in sorted(found, key=lambda k: (k[0] != "sit", k[1] != "none", k[2] != "own", k[3], k[4], k)):
        arms = {method: Arm(method, runs) for method, runs in found[key].items()}
        if not arms:
            continue
        alike = full.get((key[0], key[1], key[2], key[4]))
        if alike:
            arms["full"] = Arm("full", alike)
        groups[key] = dict(sorted(arms.items(), key=lambda item: item[1].mean("class_distance")))
    return groups


def _anew(rows: list[Row]) -> dict[tuple[str, str, int, int, str], list[Row]]:
    """Runs of the scorer that is their seed's, of rules that at least three scorers chose for."""
    found: dict[tuple[str, str, int, int, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["seed"] < len(ANEW) and row["scorer"] == ANEW[row["seed"]]:
            found[row["objective"], row["attach"], row["budget"], row["steps"], row["method"]].append(row)
    return {key: runs for key, runs in found.items() if len(runs) >= 3}


def heading(group: Group) -> str:
    """What the arms of a group have in common."""
    objective, attach, scorer, budget, steps = group
    parts = [f"{budget} images a class, {steps:,} steps"]
    parts += [f"{ATTACHED[attach]} attached"] if attach != "none" else []
    parts += [f"chosen by {SCORERS[scorer]}"] if scorer != "own" else []
    return ", ".join([*parts, *(["DiT's objective"] if objective == "dit" else [])])


@dataclass(frozen=True)
class Comparison:
    """Two arms that have at least three seeds in common; ``paired`` is false where runs of one seed share nothing."""

    question: str
    """Which of `QUESTIONS` it answers."""
    words: str
    where: Group
    arm: Arm
    other: Arm
    paired: bool = True

    @property
    def seeds(self) -> list[int]:
        """Those that both arms have."""
        return sorted({run["seed"] for run in self.arm.runs} & {run["seed"] for run in self.other.runs})

    def gap(self, measure: str) -> tuple[float, float, str]:
        """Mean difference, the same in standard errors, and what a t-test says of it: better, worse or noise.

        All NaN, and no word, where it was not measured in each run.
        """
        values = [{run["seed"]: run["figures"].get(measure) for run in arm.runs} for arm in (self.arm, self.other)]
        one, other = (np.array([found[seed] for seed in self.seeds], dtype=float) for found in values)
        mean = float((one - other).mean())
        if np.isnan(mean):
            return mean, mean, ""
        spread = np.var(one - other, ddof=1) if self.paired else np.var(one, ddof=1) + np.var(other, ddof=1)
        error = float(np.sqrt(spread / len(one)))
        # Alike to the last digit in all runs: nothing to test.
        if not error > 1e-9 * max(1.0, abs(mean)):
            return mean, float("nan"), "noise"
        test = stats.ttest_rel(one, other) if self.paired else stats.ttest_ind(one, other, equal_var=False)
        word = "noise" if not test.pvalue < 0.05 else "better" if mean < 0 else "worse"
        return mean, mean / error, word

    def cell(self, measure: str) -> str:
        """The gap, in words."""
        gap, errors, word = self.gap(measure)
        return f"{gap:+.{MEASURES[measure][1]}f} ({errors:+.1f}): {word}" if word else ""


def comparisons(groups: dict[Group, Arms]) -> list[Comparison]:
    """Every pair of arms that a question is about, as far as both have three runs."""
    found = []
    for key, arms in groups.items():
        objective, attach, scorer, budget, steps = key
        plain = attach == "none" and scorer == "own"
        base = groups.get((objective, "none", "own", budget, steps), {})
        # Another scorer makes another subset: whether a rule was lucky shows against the same random draws.
        random = arms.get("random", base.get("random") if attach == "none" else None)
        chosen = f", by {SCORERS[scorer]}," if scorer != "own" else ""
        given = f", both with {ATTACHED[attach]}" if attach != "none" else ""
        for rule, arm in arms.items():
            question = "interval" if rule.removesuffix(ANEW_TOO) == "interval" else "rules"
            if rule not in ("random", "full") and random:
                found.append(Comparison(question, f"`{rule}`{chosen} against `random`{given}", key, arm, random))
            if not plain and rule in base:
                words = f"`{rule}`, {ATTACHED[attach]} against nothing attached" if scorer == "own" else (
                    f"`{rule}`, {SCORERS[scorer]} against the usual one"
                )  # fmt: skip
                found.append(Comparison("attach" if scorer == "own" else "scorer", words, key, arm, base[rule]))
        both = f", both{chosen[1:-1]}" if chosen else ""
        rivals = [
            (OURS + anew, rule + anew) for anew in ("", ANEW_TOO) for rule in ("interval", "ot", "match", "moments")
        ]
        found += [
            Comparison("ours", f"`{ours}` against `{rule}`{both}", key, arms[ours], arms[rule])
            for ours, rule in rivals
            if attach == "none" and ours in arms and rule in arms
        ]
        if plain and "full" in arms and random:
            # All images hold out others than random ones do.
            words = "`random` against all images, not paired"
            found.append(Comparison("full", words, key, random, arms["full"], paired=False))
    return [one for one in found if len(one.seeds) >= 3]


def counted(found: list[Comparison]) -> list[Comparison]:
    """One comparison a pair of rules and place: the one whose runs chose anew, where there is one."""

    def pair(one: Comparison) -> tuple[object, ...]:
        objective, attach, _, budget, steps = one.where
        rules = (arm.method.removesuffix(ANEW_TOO) for arm in (one.arm, one.other))
        return (one.question, objective, attach, budget, steps, *rules)

    anew = {pair(one) for one in found if one.arm.method.endswith(ANEW_TOO)}
    asked = ("interval", "rules", "ours")
    return [
        one for one in found if one.arm.method.endswith(ANEW_TOO) or one.question not in asked or pair(one) not in anew
    ]
