"""Batches of an artifact: exactly once an epoch, the same on any ranks, home, container and codec."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pack_request
from hypothesis import given
from hypothesis import strategies as st

from d2c import loading, pipeline
from d2c.errors import D2CError
from d2c.loading import Loader, decode_tokens, global_batch
from formats import IntegrityError, codecs, open_artifact
from formats.repack import Changes, repack
from formats.schema import INT4, INT8

CPU = torch.device("cpu")


@given(samples=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 3))
def test_every_sample_comes_once_an_epoch_whatever_the_batch(samples: int, batch: int, seed: int) -> None:
    steps = -(-3 * samples // batch)
    run = np.concatenate([global_batch(step * batch, batch, samples, seed) for step in range(steps)])
    for epoch in range(3):
        assert sorted(run[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


def test_epochs_are_shuffled_differently_and_by_seed() -> None:
    first, second = global_batch(0, 50, 50, 0), global_batch(50, 50, 50, 0)
    assert first.tolist() != second.tolist() != list(range(50))
    assert first.tolist() != global_batch(0, 50, 50, 1).tolist()


def test_ranks_share_one_global_batch_between_them(packed: Path) -> None:
    artifact = open_artifact(packed)
    options: dict[str, Any] = {"batch_size": 6, "seed": 0, "device": CPU, "token_column": "scorer"}
    whole = Loader(artifact, **options).batch(5)
    halves = [Loader(artifact, **options, rank=rank, world=2).batch(5) for rank in range(2)]
    for name in ("raw", "labels", "tokens"):
        joined = torch.stack([getattr(half, name) for half in halves], dim=1).flatten(0, 1)
        assert torch.equal(joined, getattr(whole, name))


def test_memory_mapped_and_resident_batches_are_equal(packed: Path) -> None:
    artifact = open_artifact(packed)
    options: dict[str, Any] = {"batch_size": 5, "seed": 0, "device": CPU, "token_column": "scorer"}
    resident, mapped = Loader(artifact, **options), Loader(artifact, **options, budget=0.0)
    assert resident.resident
    assert not mapped.resident
    for step in range(4):
        one, two = resident.batch(step), mapped.batch(step)
        assert one.tokens is not None
        assert two.tokens is not None
        assert torch.equal(one.raw, two.raw)
        assert torch.equal(one.labels, two.labels)
        assert torch.equal(one.tokens, two.tokens)


def test_columns_reach_the_device_in_pieces(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = open_artifact(packed)
    options: dict[str, Any] = {"batch_size": 12, "seed": 0, "device": CPU, "token_column": "scorer"}
    whole = Loader(artifact, **options).batch(0)
    sizes: list[int] = []
    stack = artifact.stack

    def noted(column: str, rows: Any) -> np.ndarray[Any, Any]:
        sizes.append(stack(column, rows).nbytes)
        return stack(column, rows)

    monkeypatch.setattr(artifact, "stack", noted)
    most = 2 * max(column.nbytes for column in artifact.columns)
    monkeypatch.setattr(loading, "STAGED", most)
    pieces = Loader(artifact, **options).batch(0)
    assert max(sizes) <= most
    assert pieces.tokens is not None
    assert whole.tokens is not None
    assert torch.equal(pieces.raw, whole.raw)
    assert torch.equal(pieces.tokens, whole.tokens)


def test_columns_stay_on_disk_where_they_would_crowd_out_the_rest(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = open_artifact(packed)
    size = sum(column.nbytes * len(artifact) for column in artifact.columns if column.name == "latent")
    options: dict[str, Any] = {"batch_size": 4, "seed": 0, "device": CPU}
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 2 * size / 0.4 + 100}  # the half of it is taken for free
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    assert Loader(artifact, **options).resident
    assert not Loader(artifact, **options, world=2).resident
    pages["SC_PHYS_PAGES"] -= 200
    assert not Loader(artifact, **options).resident


def test_a_batch_that_ranks_cannot_share_names_those_that_can(packed: Path) -> None:
    with pytest.raises(D2CError, match=r"\[1, 2, 4\]"):
        Loader(open_artifact(packed), batch_size=4, seed=0, device=CPU, world=3)


@pytest.mark.parametrize("codec", [INT8, INT4])
def test_codes_are_decoded_on_the_device_as_the_format_says(codec: str) -> None:
    tokens = np.random.default_rng(0).standard_normal((3, 5, 8)).astype("f2")
    rms = codecs.channel_rms([tokens])
    codes, scale = codecs.encode(codec, tokens, rms)
    found = decode_tokens(codec, *(torch.from_numpy(array) for array in (codes, scale, rms)))
    np.testing.assert_array_equal(found.numpy(), codecs.decode(codec, codes, scale, rms))


def test_batches_hold_decoded_tokens_of_their_own_samples(packed: Path) -> None:
    artifact = open_artifact(packed)
    batch = Loader(artifact, batch_size=5, seed=0, device=CPU, token_column="scorer").batch(2)
    assert batch.tokens is not None
    latents = artifact.stack("latent", range(len(artifact)))
    for raw, tokens in zip(batch.raw.numpy(), batch.tokens.numpy(), strict=True):
        (row,) = np.flatnonzero((latents == raw).all(axis=(1, 2, 3, 4)))
        np.testing.assert_array_equal(tokens, artifact.values("scorer", [row])[0])


def test_a_repacked_artifact_gives_the_same_batches(packed: Path, workspace: Path, tmp_path: Path) -> None:
    other = repack(packed, tmp_path / "b", Changes(container="parquet", shards=1))
    pipeline.pack(pack_request(workspace, tmp_path / "c", per_class=4, shards=2))
    reordered = repack(tmp_path / "c", tmp_path / "d", Changes(container="tar"))
    options: dict[str, Any] = {"batch_size": 5, "seed": 3, "device": CPU, "token_column": "scorer"}
    for artifact in (other, reordered):
        for step in range(4):
            one, two = Loader(open_artifact(packed), **options).batch(step), Loader(artifact, **options).batch(step)
            assert torch.equal(one.raw, two.raw)
            assert torch.equal(one.labels, two.labels)


def test_a_column_too_large_for_the_device_waits_in_memory_and_then_on_disk(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = open_artifact(packed)
    free = {"meta": 0.0, "cpu": 1e12}
    monkeypatch.setattr(loading, "_free_memory", lambda device, world: free[device.type])
    assert Loader(artifact, batch_size=4, seed=0, device=torch.device("meta")).resident == CPU
    free["cpu"] = 0.0
    assert Loader(artifact, batch_size=4, seed=0, device=torch.device("meta")).resident is None


def test_a_sample_that_changed_on_disk_stops_the_reading(packed: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(packed, tmp_path / "a"))
    row = open_artifact(path).index.slice(5, 1).to_pylist()[0]
    data = bytearray((path / row["shard"]).read_bytes())
    data[row["latent.offset"]] ^= 1
    (path / row["shard"]).write_bytes(data)
    with pytest.raises(IntegrityError, match=f"sample {row['key']}"):
        Loader(open_artifact(path), batch_size=4, seed=0, device=CPU)
