"""Partial transport, moments and confidence: the objective of GADC (arXiv 2606.05883), minimised.

A subset must ship its mass to the class, where every image takes at most ``capacity / N`` of it. To what that costs
come the distance of the subset's means and variances from the class's, and its mean cross-entropy in a classifier.

Moments and confidence of all candidates cost little; a transport is an iteration of its own. So candidates stand in
order of the cheap part, and transports are computed in that order, until the next candidate would lose even with the
least transport among them, or `PATIENCE` batches brought nothing better. That is no bound: a candidate passed over
may be better than the one taken, the sooner the less the moments weigh. But what is taken is compared by the whole
objective in float64, so that no swap and no restart raises it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2c.errors import D2CError, UsageError
from d2c.selectors.base import Candidates, Features, Rows, Values, features_of, mask
from d2c.selectors.search import TOLERANCE

TARGETS = 2_000
"""Images of a class that are shipped to: of a larger class so many, drawn by the seed.

Memory is N x this in f8 (0.8 GB for 50,000 images) beside a copy of the features."""
KICKS = 10
"""Restarts at budgets up to 10; fewer, and soon none, for larger ones, where each takes longer and gains less."""
KICKED = 3
"""Picks that a restart replaces."""
PATIENCE = 3
"""Batches of 16 candidates. In a class of 1,300 at budget 50, 125 of 126 picks came from the first three."""
MEAN_WEIGHT = 1.25
STEEPEST, STEEPEST_SINGLE = 600.0, 60.0
"""Largest cost in epsilons: exp of it, and of minus it, times some, are numbers of float64, and of float32."""
NEAR = 1e-6
"""Values found in float32 that are nearer to each other than this share are equal."""
_BLOCK, _BATCH, _ELEMENTS = 256, 16, 2**18


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Those of GADC's code for ResNet-50 features.

    epsilon: entropic regularisation, a squared distance. iterations: of Sinkhorn. capacity: what the class takes at
    most, of a mass of 1. moments, confusion: weights beside the transport's 1.
    """

    epsilon: float = 20.0
    iterations: int = 20
    capacity: float = 1.05
    moments: float = 6.0
    confusion: float = 10.0

    def __post_init__(self) -> None:
        if self.epsilon <= 0 or self.iterations < 1 or self.capacity < 1 or min(self.moments, self.confusion) < 0:
            raise UsageError(
                "the weights of the transport are out of range",
                found=self,
                expected="epsilon > 0, iterations >= 1, capacity >= 1, the others >= 0",
            )


@dataclass(frozen=True, eq=False)
class _Beside:
    """What the moments and the confidence of k - 1 rows and one more need of the former: `PartialTransport._rest`."""

    k: int
    weighted: Values
    inverse: Values
    norm: float
    squares: float
    floor: Values
    confusion: float


class PartialTransport:
    """The objective (`d2c.selectors.base.Objective`) over ``features`` [N, D].

    confusion: [N] cross-entropy of a classifier; None leaves that term out. targets: the rows that are shipped to;
    moments are always those of all N.

    Raises:
        D2CError: something is not finite, or features are so far apart that exp(-distance^2 / epsilon) vanishes.
    """

    def __init__(self, features: Features, confusion: Values | None, targets: Rows, weights: Weights) -> None:
        self.weights, count = weights, len(features)
        self._features, self._mean = features, features.mean(axis=0, dtype=np.float64)
        self._confusion = np.zeros(count) if confusion is None else weights.confusion * confusion
        if not np.isfinite(self._confusion).all():
            raise D2CError("cross-entropies of the classifier are not finite", expected="a finite number per image")
        self._cost, self._norms = np.empty((count, len(targets))), np.empty(count)
        variance, goals = np.zeros(features.shape[1]), self._centred(targets)
        for block in _blocks(count):
            centred = self._centred(block)
            variance += np.square(centred).sum(axis=0)
            self._norms[block] = np.einsum("nd,nd->n", centred, centred)
            self._cost[block] = self._norms[block, None] - 2 * (centred @ goals.T)
        self._cost += self._norms[targets]
        np.maximum(self._cost, 0, out=self._cost)
        steepest = float((self._cost.max(axis=1) - self._cost.min(axis=1)).max()) / weights.epsilon
        if not steepest <= STEEPEST:
            raise D2CError(
                "the features are too far apart for this epsilon",
                found=f"squared distances of {steepest:.4g} epsilon",
                expected=f"at most {STEEPEST:g}",
                hint="raise epsilon, or scale the features",
            )
        self.quick: type[np.floating[Any]] = np.float32 if steepest <= STEEPEST_SINGLE else np.float64
        """The precision in which transports can be compared first."""
        self._deviation = np.sqrt(variance / max(1, count - 1))
        self._weighted = np.empty(features.shape, np.float32)
        for block in _blocks(count):
            self._weighted[block] = self._centred(block) * self._deviation

    def value(self, rows: Rows) -> float:
        return float(self.exact(rows[:-1], rows[-1:])[0])

    def added(self, rows: Rows) -> Values:
        every = np.arange(len(self._features))
        return np.concatenate([self.exact(rows, every[block]) for block in _blocks(len(every))])

    def swapped(self, rows: Rows, place: int) -> Values:
        return self.added(np.delete(rows, place))

    def exact(self, rows: Rows, others: Rows, precision: type[np.floating[Any]] = np.float64) -> Values:
        """[B] The value of ``rows`` (perhaps none) and one more, for each of ``others`` [B]; see `quick`."""
        weighted = self._centred(others) * self._deviation
        transport = self._transport(rows, others, precision)
        return transport + self._rest(self._beside(rows), others, weighted)

    def cheap(self, rows: Rows) -> Values:
        """[N] The value of ``rows`` and one more without the transport, for each candidate, in single precision."""
        every, beside = np.arange(len(self._features)), self._beside(rows)
        blocks = _blocks(len(every), 1 + _ELEMENTS // len(self._mean))
        return np.concatenate([self._rest(beside, every[block], self._weighted[block]) for block in blocks])

    def _centred(self, which: Rows | slice) -> Values:
        centred: Values = np.subtract(self._features[which], self._mean, dtype=np.float64)
        return centred

    def _transport(self, rows: Rows, others: Rows, precision: type[np.floating[Any]]) -> Values:
        """[B] What the plan costs after the iterations of Sinkhorn, which start from v = 1.

        A dummy source fills the capacity that the subset leaves. GADC sets its cost to 0.05 of the median cost of all
        candidates that its code happens to evaluate together. But a cost that is the same to every image changes
        nothing: u_dummy takes it up in the first half iteration, and the dummy's part is not counted. Here it is 0.
        """
        size, count = len(rows) + 1, self._cost.shape[1]
        known, own = self._cost[rows], self._cost[others]
        kernel = np.vstack([self._kernel(known), np.ones(count)]).astype(precision)
        new = self._kernel(own).astype(precision)
        mass = np.full(size, 1 / size, precision)
        mass[-1] = self.weights.capacity - 1
        capacity, share = precision(self.weights.capacity / count), precision(1 / size)
        v = np.ones((len(others), count), precision)
        work = np.empty_like(v)
        for _ in range(self.weights.iterations):
            u = mass / (v @ kernel.T)
            u_new = share / np.einsum("bn,bn->b", v, new)
            np.matmul(u, kernel, out=v)
            v += np.multiply(u_new[:, None], new, out=work)
            np.divide(capacity, v, out=v)
        shipped = np.einsum("bn,bn->b", v, u[:, :-1] @ (kernel[:-1] * known))
        found: Values = shipped + u_new * np.einsum("bn,bn->b", v, new * own)
        return found

    def _kernel(self, cost: Values) -> Values:
        """exp(-cost / epsilon), each row times what makes its largest 1: u takes that factor up."""
        kernel: Values = np.exp((cost.min(axis=1, keepdims=True) - cost) / self.weights.epsilon)
        return kernel

    def _beside(self, rows: Rows) -> _Beside:
        """Moments and confidence of ``rows``, to which one more is to come."""
        centred, k = self._centred(rows), len(rows) + 1
        mean = centred.mean(axis=0) if k > 1 else np.zeros_like(self._mean)
        # A dimension of no deviation is 0 in every centred row.
        inverse = np.divide(mean, self._deviation, out=np.zeros_like(mean), where=self._deviation > 0)
        squares = np.square(centred - mean).sum(axis=0) / max(1, k - 1)
        floor = k * (squares * self._deviation**2 + 1e-20)
        return _Beside(
            k,
            mean * self._deviation,
            inverse,
            float(mean @ mean),
            float(squares.sum()),
            floor,
            float(self._confusion[rows].sum()),
        )

    def _rest(self, beside: _Beside, others: Rows, weighted: npt.NDArray[Any]) -> Values:
        """[B] Moments and confidence of n = k - 1 rows and one of ``others``.

        Moments are ``1.25 |m - m'|^2 + sum_d (s^2 + s'^2 - 2 sqrt(s^2 s'^2))``: means and unbiased variances of the
        class and of the subset. One more x beside rows of mean c makes ``m' = (n c + x) / k`` and
        ``s'^2 = squares / n + (x - c)^2 / k``, squares those of the n around c: a sum of two that are not negative.
        ``weighted`` [B, D] are the x times s, in the precision that the answer is to have.
        """
        k, norms, one = beside.k, self._norms[others], weighted.dtype.type
        cross = np.einsum("bd,d->b", weighted, beside.inverse.astype(one))
        mean = ((k - 1) ** 2 * beside.norm + 2 * (k - 1) * cross + norms) / k**2
        if k == 1:
            # One image has no variance; 1e-20 keeps GADC's root from 0.
            spread, roots = np.zeros(len(others)), np.full(len(others), 1e-10 * len(self._mean))
        else:
            spread = beside.squares + (norms - 2 * cross + beside.norm) / k
            work = weighted - beside.weighted.astype(one)
            np.square(work, out=work)
            work += beside.floor.astype(one)
            roots = np.einsum("bd->b", np.sqrt(work, out=work)) / np.sqrt(k)
        moments = MEAN_WEIGHT * mean + spread + np.square(self._deviation).sum() - 2 * roots
        found: Values = self.weights.moments * moments + (beside.confusion + self._confusion[others]) / k
        return found


def ot(candidates: Candidates, budget: int, taken: Rows, *, weights: Weights | None = None) -> Rows:
    """Greedy, then swaps, then restarts from disturbed picks; the best found. See the module for what is guaranteed.

    Each step of the greedy choice minimises the objective itself; GADC's adds all of a new image's cross-entropy where
    the objective has the mean. In a class of more than `TARGETS` images every one may be picked, but mass is shipped
    to `TARGETS` of them.

    Raises:
        UsageError: there are no features.
        D2CError: the features do not suit epsilon.
    """
    from threadpoolctl import threadpool_limits

    features, count = features_of(candidates), len(candidates)
    if budget >= count:
        return np.concatenate([taken, np.flatnonzero(~mask(count, taken))])
    places = budget - len(taken)
    if places == 0:
        return taken
    rng = np.random.default_rng(candidates.seed)
    targets = np.arange(count) if count <= TARGETS else np.sort(rng.permutation(count)[:TARGETS])
    with threadpool_limits(1):  # sums over several threads differ from run to run
        objective = PartialTransport(features, candidates.confusion, targets, weights or Weights())
        search = Search(objective, count, taken)
        for _ in range(places):
            search.add()
        search.swap()
        for _ in range(min(KICKS, 100 * KICKS // places**2)):
            search.kick(rng)
    return search.rows


class Search:
    """Picks that only get better: ``rows``, of which the ``taken`` stay, and their exact ``value``."""

    def __init__(self, objective: PartialTransport, count: int, taken: Rows) -> None:
        self.objective, self.count, self.fixed = objective, count, len(taken)
        self.rows, self.value = taken, np.inf

    def add(self) -> None:
        """One more pick."""
        found = self._best(self.rows, self.rows, np.inf)
        assert found is not None
        self.rows, self.value = np.append(self.rows, found[0]), found[1]

    def swap(self) -> None:
        """Replace one pick after the other by the best candidate, until no place has a better one."""
        places = len(self.rows) - self.fixed
        at = unchanged = 0
        while unchanged < places:
            place = self.fixed + at
            found = self._best(np.delete(self.rows, place), self.rows, self.value - TOLERANCE * abs(self.value))
            unchanged += 1
            if found is not None:
                self.rows, unchanged = self.rows.copy(), 1
                self.rows[place], self.value = found
            at = (at + 1) % places

    def kick(self, rng: np.random.Generator) -> None:
        """Put random candidates in a few places and swap again; what is not better leaves no trace."""
        rows, value = self.rows, self.value
        free = np.flatnonzero(~mask(self.count, rows))
        places = len(rows) - self.fixed
        count = min(KICKED, places, len(free))
        kept = self.fixed + rng.permutation(places)[count:]
        new = rng.permutation(free)[:count]
        self.rows = np.concatenate([rows[: self.fixed], new, rows[np.sort(kept)]])
        self.value = self.objective.value(self.rows)
        self.swap()
        if self.value >= value - TOLERANCE * abs(value):
            self.rows, self.value = rows, value

    def _best(self, rows: Rows, barred: Rows, ceiling: float) -> tuple[int, float] | None:
        """The candidate that is best beside ``rows``, and the value; None where none is found below ``ceiling``."""
        cheap = self.objective.cheap(rows)
        free = np.flatnonzero(~mask(self.count, barred))
        order = free[np.argsort(cheap[free], kind="stable")]
        best, bound, idle = -1, ceiling, 0
        transport = np.inf
        for block in _blocks(len(order), _BATCH):
            batch = order[block]
            # The least transport of another place is no guide to this one's: the first batch is always evaluated.
            if idle == PATIENCE or (block.start and cheap[batch[0]] + transport >= bound):
                break
            values = self.objective.exact(rows, batch, self.objective.quick)
            transport = min(transport, float((values - cheap[batch]).min()))
            least = float(values.min())
            idle += 1
            if least < bound:
                best, bound, idle = int(batch[values <= least + NEAR * abs(least)].min()), least, 0
        if best < 0:
            return None
        value = self.objective.value(np.append(rows, best))
        return (best, value) if value < ceiling else None


def _blocks(count: int, size: int = _BLOCK) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
