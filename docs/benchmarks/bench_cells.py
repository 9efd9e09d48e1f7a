"""The cells of bench.py: which runs each level has, and how the data of a domain is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from d2c.selectors import METHODS

MODELS = {"sit": "sit-tiny/4", "dit": "dit-tiny/4"}
STEPS = 3000
AGAIN = {"second": 1, "third": 2, "fourth": 3, "fifth": 4}
"""Scorers and choosers from other seeds: how much of a rule's result is the luck of its one subset."""
ANEW = ("own", *AGAIN)
"""The scorer and chooser of each seed where a rule chooses anew in each run, as random ones do."""
RULES = ("random", "interval", "kernel", "match", "ot", "moments", "random-window", "min", "max", "gradient")
FEW = ("random", "interval", "kernel", "ot", "moments")
FEATURES_ALONE = {name for name, rule in METHODS.items() if rule.features} - {"match"}


@dataclass(frozen=True)
class Domain:
    """How a source of images is scored and measured."""

    labels: str = "source"
    mirror: bool = True
    """Whether a mirror image means the same: for the teacher and for training."""
    reference: bool = False
    """Measure against `--reference`, not against what was scored."""
    grid: tuple[str, ...] = RULES
    """Level B's rules."""
    whole: bool = False
    """Has level C, and level B's attachments, other scorers and DiT's objective."""


DOMAINS = {
    "cifar10": Domain(whole=True),
    "longtail": Domain(reference=True, grid=FEW),
    "unlabelled": Domain(labels="clusters:10", grid=FEW),
    "glyphs": Domain(mirror=False),
    "own": Domain(whole=True),
}


@dataclass(frozen=True)
class Cell:
    """One trained run."""

    method: str
    budget: int
    """Images a class; 0: all."""
    seed: int
    attach: str = "none"
    scorer: str = "own"
    objective: str = "sit"
    steps: int = STEPS

    @property
    def shards(self) -> str:
        """Cells with the same images and attachments share an artifact."""
        seeded = self.method in ("full", "gradient") or not METHODS[self.method].seeded
        parts = [self.method, self.attach, self.scorer, self.budget, *([] if seeded else [self.seed])]
        return "-".join(map(str, parts))

    @property
    def name(self) -> str:
        return "-".join(map(str, asdict(self).values()))


def cells(level: str, domain: str) -> list[Cell]:
    """The runs of a level, what matters most first."""
    rules = DOMAINS[domain]
    if level == "c":
        return [
            cell
            for budget, steps in ((10, STEPS), (100, 31_250))
            for seed, scorer in enumerate(ANEW)
            for cell in (
                Cell("random", budget, seed, steps=steps),
                *(Cell(rule, budget, seed, scorer=scorer, steps=steps) for rule in FEW if rule != "random"),
                Cell("full", 0, seed, steps=steps),
            )
            if rules.whole
        ]
    found = [*_grid(rules.grid, (10, 100), 3), *_grid(("full",), (0,), 3)]
    if rules.whole:
        for attach in ("both", "vision", "text"):
            found += _grid(("random", "interval") if attach == "both" else ("random",), (10, 100), 3, attach=attach)
        for scorer in ("weak", "tenth"):
            found += _grid(("interval", "match"), (10,), 3, scorer=scorer)
        for scorer in ("second", "third"):
            found += _grid(("interval", "kernel"), (10,), 3, scorer=scorer)
        found += _grid(("random", "interval", "kernel"), (10, 100), 3, objective="dit")
    return found


def _grid(methods: Iterable[str], budgets: Iterable[int], seeds: int, **others: Any) -> list[Cell]:
    # Full data has no budget; what it is compared with may train for longer.
    return [
        Cell(method, 0 if method == "full" else budget, seed, **others)
        for budget in budgets
        for seed in range(seeds)
        for method in methods
    ]
