"""Quotas: they add up, no class gives more than it has, and what is missing is said or spread."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2c.budgets import quotas
from d2c.errors import UsageError

COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=12).map(np.array)
BALANCES = st.sampled_from(["equal", "proportional", "sqrt", "min:2"])


@given(COUNTS, st.integers(0, 400), BALANCES)
def test_a_spread_budget_is_spent_as_far_as_there_are_images(counts: np.ndarray, total: int, balance: str) -> None:
    if balance == "min:2":
        total += int(np.minimum(counts, 2).sum())
    found = quotas(counts, total, balance, spread=True)
    assert found.given.sum() == min(total, counts.sum())
    assert (found.given <= counts).all()
    plain = quotas(counts, total, balance)
    assert (plain.given <= counts).all()
    assert (plain.given + plain.missing).sum() == (total if counts.any() else 0)
    if balance == "min:2":
        assert (plain.given >= np.minimum(counts, 2)).all()


@given(COUNTS, st.integers(0, 400), st.integers(0, 20), BALANCES, st.booleans())
def test_a_larger_budget_takes_from_no_class(
    counts: np.ndarray, total: int, more: int, balance: str, spread: bool
) -> None:
    total += int(np.minimum(counts, 2).sum())
    small, large = (quotas(counts, budget, balance, spread=spread).given for budget in (total, total + more))
    assert (large >= small).all()


def test_the_balances_differ_as_their_names_say() -> None:
    counts = np.array([100, 400, 900])
    assert quotas(counts, 60, "equal").given.tolist() == [20, 20, 20]
    assert quotas(counts, 70, "proportional").given.tolist() == [5, 20, 45]
    assert quotas(counts, 60, "sqrt").given.tolist() == [10, 20, 30]
    assert quotas(counts, 64, "min:10").given.tolist() == [12, 20, 32]


def test_what_a_small_class_lacks_is_missing_or_given_by_others() -> None:
    counts = np.array([1, 30, 30])
    alone, spread = quotas(counts, 30), quotas(counts, 30, spread=True)
    assert (alone.given.tolist(), alone.missing.tolist()) == ([1, 10, 10], [9, 0, 0])
    assert (spread.given.tolist(), spread.missing.tolist()) == ([1, 15, 14], [9, 0, 0])


@pytest.mark.parametrize("balance", ["min", "min:0", "min:x", "equal:3", "fair"])
def test_unknown_balances_are_refused(balance: str) -> None:
    with pytest.raises(UsageError, match="cannot be balanced"):
        quotas(np.array([3]), 1, balance)


def test_least_shares_beyond_the_budget_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 15"):
        quotas(np.array([9, 9, 9]), 14, "min:5")
