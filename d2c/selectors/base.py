"""What every selector is given and gives back, and what an objective is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from d2c.errors import D2CError, UsageError

Rows: TypeAlias = npt.NDArray[np.int64]
"""Rows of the candidates, in order of choice."""
Values: TypeAlias = npt.NDArray[np.float64]
Features: TypeAlias = npt.NDArray[np.float32]


ROUNDING = 1e-12
"""Share of the largest value by which sums of float64 may differ with the order of their terms."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """The images of one class, sorted by key, so that whatever order they came in, the same ones are chosen.

    keys: N strings. scores: f8 [N], larger is harder. features: f4 [N, D], where the method needs them. confusion:
    f8 [N], cross-entropy of a classifier, where there is one. seed: what is random follows from it.
    """

    keys: list[str]
    scores: Values
    features: Features | None = None
    confusion: Values | None = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.keys)


Selector: TypeAlias = Callable[[Candidates, int, Rows], Rows]
"""(candidates, budget, taken) -> exactly min(budget, N) different rows in order of choice.

``taken`` [T], T <= budget, were chosen before, for a smaller budget: they are in the answer, and come first.
"""


class Objective(Protocol):
    """How far some of N candidates are from all of them; smaller is better.

    Every method agrees with `value` to 1e-6 of it. Rows already chosen, or out of the pool, have any value in what
    `added` and `swapped` return: `d2c.selectors.search` looks at the others only.
    """

    def value(self, rows: Rows) -> float:
        """Of the candidates ``rows`` (at least one)."""
        ...

    def added(self, rows: Rows) -> Values:
        """[N] The value of ``rows`` (perhaps none) and one more, for each candidate."""
        ...

    def swapped(self, rows: Rows, place: int) -> Values:
        """[N] The value of ``rows`` with each candidate in place of ``rows[place]``."""
        ...


def features_of(candidates: Candidates) -> Features:
    """The features [N, D].

    Raises:
        UsageError: there are none.
        D2CError: some are no numbers.
    """
    features = candidates.features
    if features is None:
        raise UsageError("this method needs features", found="none", expected="one row of numbers per image")
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise D2CError(
            "features hold NaN or infinity",
            where=candidates.keys[int(np.argmin(finite))],
            found=f"{np.count_nonzero(~finite)} of {len(features)} images",
            expected="finite numbers",
            hint="compute the features again, or leave these images out",
        )
    return features


def best(values: Values, allowed: npt.NDArray[np.bool_]) -> int:
    """The allowed row of the smallest value; of several the first, which has the smallest key.

    Values that differ by rounding only count as equal: copies of an image must not be told apart by it.
    """
    found = np.where(allowed, values, np.inf)
    rounding = ROUNDING * np.abs(values[allowed]).max()
    return int(np.argmax(found <= found.min() + rounding))


def mask(count: int, rows: Rows) -> npt.NDArray[Any]:
    """Bool [count], True at ``rows``."""
    chosen = np.zeros(count, dtype=bool)
    chosen[rows] = True
    return chosen
