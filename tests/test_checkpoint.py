"""Checkpoints: whole or absent, equal bytes for equal states, no pickle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from d2c import checkpoint
from d2c.checkpoint import State
from d2c.errors import D2CError


def state(step: int) -> State:
    tensors = {f"model.{name}": torch.full((3,), float(step)) for name in "abcdefgh"}
    return State(step, tensors, {"content_id": "x", "note": "ä"})


def test_the_newest_state_comes_back_and_older_ones_go(tmp_path: Path) -> None:
    for step in (100, 200, 1000):
        checkpoint.save(tmp_path, state(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000200.safetensors", "00001000.safetensors"]
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    assert newest.step == 1000
    assert newest.facts["note"] == "ä"
    assert torch.equal(newest.tensors["model.c"], torch.full((3,), 1000.0))


def test_no_checkpoint_is_none_and_a_temporary_file_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    (tmp_path / ".tmp-1-00000100.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) is None


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    one = checkpoint.save(tmp_path / "a", state(5)).read_bytes()
    two = checkpoint.save(
        tmp_path / "b", State(5, dict(reversed(state(5).tensors.items())), state(5).facts)
    ).read_bytes()
    assert one == two


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(D2CError, match="no readable weights"):
        checkpoint.load_tensors(path)


def test_prefixes_come_off_as_they_went_on() -> None:
    tensors = {"a.weight": torch.zeros(1), "b": torch.ones(1)}
    both = {**checkpoint.prefixed(tensors, "model"), **checkpoint.prefixed(tensors, "models")}
    assert checkpoint.under(both, "model").keys() == tensors.keys()
