"""A GPU's memory that is too small for a step: what the error says fits, does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import config, train
from torch import Tensor

from d2c.errors import D2CError
from d2c.trainer import Trainer

Losses = tuple[Tensor, Tensor]


def test_out_of_memory_names_what_fits(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = Trainer.losses

    def limited(self: Trainer, work: Any, step: int) -> Losses:
        if len(work) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return losses(self, work, step)

    monkeypatch.setattr(Trainer, "losses", limited)
    asked = config(packed, tmp_path / "run", numbers={"batch_size": 8})
    with pytest.raises(D2CError, match=r"too small(.|\n)*8 images at once(.|\n)*--micro-batch 2 "):
        train(asked)
    train(config(packed, tmp_path / "run", numbers={"batch_size": 8}, micro_batch=2))


class Memory:
    """A GPU with room for some images and, in images too, for the optimizer's moments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, moments: int = 0) -> None:
        self.room, self.moments, self.held = room, moments, 0
        losses, memory = Trainer.losses, self

        class Activations:
            def __init__(self, images: int) -> None:
                self.images = images
                memory.held += images

            def __del__(self) -> None:
                memory.held -= self.images

        def limited(self: Trainer, work: Any, step: int) -> Losses:
            activations = Activations(len(work))
            memory.check(self.parts.optimizer)
            del activations
            return losses(self, work, step)

        monkeypatch.setattr(Trainer, "losses", limited)

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        if self.held + self.moments * bool(optimizer.state) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def test_what_fits_is_tried_without_the_memory_of_what_did_not(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Memory(monkeypatch, room=4)
    with pytest.raises(D2CError, match=r"8 images at once(.|\n)*--micro-batch 4 "):
        train(config(packed, tmp_path / "run", numbers={"batch_size": 8}))


def test_what_fits_leaves_room_for_moments_that_are_not_there_yet(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Memory(monkeypatch, room=6, moments=3)
    with pytest.raises(D2CError, match=r"8 images at once(.|\n)*--micro-batch 2 "):
        train(config(packed, tmp_path / "run", numbers={"batch_size": 8}))


def test_memory_that_ends_in_the_optimizer_is_advised_on_too(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = torch.optim.AdamW.step, []

    def full(self: torch.optim.AdamW, closure: None = None) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(D2CError, match=r"8 images at once(.|\n)*--micro-batch 4 "):
        train(config(packed, tmp_path / "run", numbers={"batch_size": 8}))
