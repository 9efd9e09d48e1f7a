"""Minimise an objective over subsets: add the best candidate again and again, then swap while that helps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2c.selectors.base import Objective, Rows, best, mask

TOLERANCE = 1e-9
"""A swap must lower the objective by more than this share of it: less is rounding, and could go round in circles."""


def greedy(objective: Objective, pool: npt.NDArray[np.bool_], budget: int, taken: Rows) -> Rows:
    """``taken``, then one candidate of ``pool`` [N] after the other, each the best next to those before it."""
    rows = list(taken.tolist())
    free = pool & ~mask(len(pool), taken)
    for _ in range(min(budget - len(rows), int(free.sum()))):
        row = best(objective.added(np.array(rows, dtype=np.int64)), free)
        rows.append(row)
        free[row] = False
    return np.array(rows, dtype=np.int64)


def swap(objective: Objective, pool: npt.NDArray[np.bool_], rows: Rows, fixed: int, sweeps: int) -> Rows:
    """Replace picks after the first ``fixed`` by candidates of ``pool``, each time the best, while that helps.

    At most ``sweeps`` times over all places; the objective never grows.
    """
    rows, free = rows.copy(), pool & ~mask(len(pool), rows)
    value = objective.value(rows) if len(rows) else 0.0
    for _ in range(sweeps if free.any() else 0):
        before = value
        for place in range(fixed, len(rows)):
            values = objective.swapped(rows, place)
            row = best(values, free)
            if values[row] < value - TOLERANCE * abs(value):
                free[rows[place]], free[row] = pool[rows[place]], False
                rows[place], value = row, float(values[row])
        if value >= before:
            break
    return rows
