"""The order of an epoch: published numbers, so that any team in any language can repeat it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from formats_fixture import make_samples, write_artifact
from hypothesis import given
from hypothesis import strategies as st

from formats import open_artifact
from formats.order import canonical, epoch_order, splitmix64


def test_splitmix64_gives_the_published_numbers() -> None:
    # The first outputs of Vigna's reference implementation for seed 1234567: the state grows by the golden gamma.
    states = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_orders_are_the_documented_ones() -> None:
    assert epoch_order(10, 0, 0).tolist() == [0, 9, 1, 6, 3, 5, 4, 2, 8, 7]
    assert epoch_order(10, 0, 1).tolist() == [8, 3, 0, 1, 5, 2, 7, 4, 9, 6]


@given(st.integers(1, 300), st.integers(-(2**70), 2**70), st.integers(0, 2**40))
def test_every_sample_comes_once(samples: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(samples, seed, epoch).tolist()) == list(range(samples))


@pytest.mark.parametrize(("container", "shards"), [("tar", 5), ("parquet", 2), ("recipe", 1)])
def test_no_container_and_no_storage_order_changes_the_canonical_order(
    tmp_path: Path, container: str, shards: int
) -> None:
    one = open_artifact(write_artifact(tmp_path / "one"))
    two = open_artifact(write_artifact(tmp_path / "two", container, shards, make_samples()[::-1]))
    ids = [artifact.index["sample_id"].take(canonical(artifact.index)).to_pylist() for artifact in (one, two)]
    assert ids[0] == ids[1] == sorted(ids[0])
