"""The shuffled order of an epoch: a pure function of artifact content, seed and epoch, in integers alone.

Numpy does not promise that its generators' streams stay the same between releases; these few lines do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_GOLDEN, _MIX, _FINISH = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def canonical(index: pa.Table) -> NDArray[np.int64]:
    """Storage numbers of all samples [N] in the order of their sample ids: no container, no shard size changes it."""
    return np.argsort(np.asarray(index["sample_id"].to_numpy(), dtype="S32"), kind="stable")


def epoch_order(samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of ``range(samples)``: stable argsort of splitmix64(i XOR splitmix64(splitmix64(seed) XOR epoch)).

    ``seed`` is taken modulo 2**64.
    """
    base = splitmix64(splitmix64(np.array([seed % 2**64], np.uint64)) ^ np.uint64(epoch))
    return np.argsort(splitmix64(np.arange(samples, dtype=np.uint64) ^ base), kind="stable")


def splitmix64(values: NDArray[np.uint64]) -> NDArray[Any]:
    """The output of Steele, Lea and Flood's generator (2014) for each state in ``values``, a new array of uint64."""
    mixed = values + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _FINISH
    return mixed ^ (mixed >> np.uint64(31))
