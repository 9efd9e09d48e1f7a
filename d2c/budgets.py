"""How many images each class gives: a budget shared out over classes that may be long-tailed, or tiny."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2c.errors import UsageError

Counts = npt.NDArray[np.int64]
BALANCES = "equal, proportional, sqrt or min:N"
LARGEST = 10**12
"""Images of a budget, at most: beyond it sharing out would leave whole numbers of 64 bits."""


@dataclass(frozen=True)
class Quotas:
    """``given``: images that each class gives; ``missing``: what it lacks of its share, int64 [C] both."""

    given: Counts
    missing: Counts


def parse_balance(balance: str) -> tuple[str, int]:
    """``min:5`` -> ("min", 5); the others have 0.

    Raises:
        UsageError: there is no such balance.
    """
    name, colon, number = balance.partition(":")
    if name == "min" and number.isdecimal() and 0 < int(number) <= LARGEST:
        return name, int(number)
    if name in ("equal", "proportional", "sqrt") and not colon:
        return name, 0
    raise UsageError("classes cannot be balanced like that", found=balance, expected=BALANCES)


def quotas(counts: Counts, total: int, balance: str = "equal", *, spread: bool = False) -> Quotas:
    """Share ``total`` images out over classes of ``counts`` [C] images.

    ``equal``: the same for each class; ``proportional``: by size; ``sqrt``: by the square root of the size; ``min:N``:
    N for each, the rest by size. Ties go to the smaller class id. A class never gives more than it has; what is missing
    is given by the others where ``spread``, else by nobody.

    Raises:
        UsageError: ``min:N`` asks for more than ``total``.
    """
    name, least = parse_balance(balance)
    floor = np.minimum(least, counts)
    if floor.sum() > total:
        raise UsageError(
            f"the classes' least shares are more than the budget: {balance} of {np.count_nonzero(counts)} classes",
            found=f"a budget of {total} images",
            expected=f"at least {floor.sum()}",
            hint="raise the budget, or lower N of --balance min:N",
        )
    weights = {"equal": np.minimum(counts, 1), "sqrt": np.sqrt(counts)}.get(name, counts - floor).astype(np.float64)
    rest = total - int(floor.sum())
    wanted = floor + _apportion(rest, weights, np.full(len(counts), rest))
    given = floor + _apportion(rest, weights, counts - floor) if spread else np.minimum(wanted, counts)
    return Quotas(given, np.maximum(wanted - given, 0))


def _apportion(total: int, weights: npt.NDArray[np.float64], room: Counts) -> Counts:
    """Whole numbers of at most ``room`` in the ratios of ``weights``, adding up to ``total`` if there is room.

    By Webster's method: with a larger total no class gets less, so that budgets can lie inside each other.
    """
    room = np.where(weights > 0, room, 0)
    total = min(total, int(room.sum()))

    def at(rate: float) -> Counts:
        return np.minimum(room, np.floor(rate * weights + 0.5).astype(np.int64))

    low, high = 0.0, 1.0
    while at(high).sum() < total:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).sum() <= total else (low, middle)
    shares = at(low)
    while left := total - int(shares.sum()):
        # What is left are ties: one more each, from the smallest class id on.
        due = np.divide(shares + 0.5, weights, out=np.full(len(weights), np.inf), where=shares < room)
        shares[np.lexsort((np.arange(len(due)), due))[:left]] += 1
    return shares
