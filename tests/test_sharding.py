"""Training state cut up among ranks: the steps, files and looks of a run whose ranks hold all of it.

One launch of two processes takes all the steps that are compared here (`pair`): starting it costs more than they do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
from test_training import config, kept, train
from torch import Tensor
from typer.testing import CliRunner

import d2c.trainer
from d2c import checkpoint, runtime, sharding, training
from d2c.checkpoint import State
from d2c.errors import D2CError, UsageError
from d2c.generator import Generator
from d2c.runs import CURVES, DONE, SAMPLES, WEIGHTS, Run
from d2c.runtime import Ranks
from d2c.sit import SiT, model_spec
from d2c.throughput import compile_blocks
from d2c.trainer import STATS, Tally, Trainer
from d2c_cli.app import app
from formats import open_artifact

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
STEPS = 5
LOST = {3, 4}
"""Steps in which the last rank's loss is not a number, where that is asked for."""
ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "pieces": {"micro_batch": 2},  # of three images: two and one
    "compiled": {"compile": True},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
}
needs_fsdp2 = pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="torch is older than 2.6")


def built(packed: Path, ranks: Ranks, name: str, *, shard: bool) -> Trainer:
    plan = training.plan(config(packed, packed / "unused", numbers={"clip_norm": 0.2, "lr": 1e-4}))
    settings = replace(training.step_settings(plan), shard=shard, **ASKED[name])
    trainer = Trainer.build(settings, open_artifact(packed), CPU, ranks)
    if name == "fp16":  # a scale at which the first steps overflow
        trainer.parts = replace(trainer.parts, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**24))
    return trainer


def steps(trainer: Trainer, folder: Path, *, lost: bool = False) -> None:
    """Take the steps, and keep the state together with what the trainer said of them, on average over the ranks."""
    losses, told = trainer.losses, []

    def broken(work: Any, step: int) -> tuple[Tensor, Tensor]:
        denoising, alignment = losses(work, step)
        return denoising * (float("nan") if step in LOST else 1), alignment

    if lost and trainer.ranks.rank == trainer.ranks.world - 1:
        trainer.losses = broken
    for step in range(STEPS):
        if lost and step == min(LOST):
            save(trainer, folder, step)
        stats = trainer.step(step)
        if trainer.ranks.world > 1:
            torch.distributed.all_reduce(stats)
        told.append(dict(zip(STATS, (stats / trainer.ranks.world).tolist(), strict=True)))
    save(trainer, folder, STEPS, {"told": told, "held": held(trainer)})


def save(trainer: Trainer, folder: Path, step: int, facts: Mapping[str, Any] | None = None) -> None:
    with checkpoint.Saver(folder, writes=trainer.ranks.main) as saver:
        saver.save(trainer.parts.state(step, facts or {}))


def held(trainer: Trainer) -> list[float]:
    """The shares of weights, averages and moments that lie with this rank."""
    model, ema, optimizer = trainer.parts.model, trainer.parts.ema, trainer.parts.optimizer
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    return [
        sum(sharding.local(value).numel() for value in values) / sum(value.numel() for value in values)
        for values in (list(model.parameters()), list(ema.shadow.values()), moments)
    ]


def waiting(trainer: Trainer) -> int:
    """Blocks of which weights wait in memory for the backward pass."""
    shape = trainer.model.blocks[0].adaLN_modulation[1].weight.shape
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        denoising, _ = trainer.losses(trainer._work(0), 0)
    found = sum(tensor.shape in (shape, shape[::-1]) and tensor.untyped_storage().nbytes() > 0 for tensor in saved)
    denoising.backward()
    return found


def both(ranks: Ranks, job: tuple[Path, Path]) -> None:
    """What each of two processes does."""
    packed, folder = job
    # `eager` compiles nothing, and finds what could not be compiled.
    d2c.trainer.compile_blocks = lambda model, _: compile_blocks(model, CUDA, backend="eager")
    with runtime.one_thread(CPU):
        for name in ASKED:
            trainer = built(packed, ranks, name, shard=True)
            steps(trainer, folder / name)
            assert (trainer.model.blocks[0]._compiled_call_impl is not None) == (name == "compiled")
        backward = built(packed, ranks, "plain", shard=False)
        backward.losses = exhausted_backward(backward.losses)
        with pytest.raises(D2CError, match=r"3 images at once(.|\n)*--micro-batch 1 "):
            backward.step(0)
        whole = built(packed, ranks, "bf16", shard=False)
        steps(whole, folder / "bf16 over whole models")
        assert waiting(whole) == len(whole.model.blocks)
        assert waiting(built(packed, ranks, "bf16", shard=True)) == 0
        steps(built(packed, ranks, "plain", shard=True), folder / "lost", lost=True)

        trainer = built(packed, ranks, "plain", shard=True)
        checkpoint.resume(folder / "plain of one", trainer.parts)
        save(trainer, folder / "taken over", STEPS)

        # Clocks differ.
        assert Tally.of(None, CPU, ranks).line(1, ranks, due=ranks.main)[1]

        trainer.losses = exhausted
        with pytest.raises(D2CError, match=r"3 images at once(.|\n)*try --micro-batch 1, or more GPUs"):
            trainer.step(0)


def exhausted(work: Any, step: int) -> tuple[Tensor, Tensor]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def exhausted_backward(losses: Any) -> Any:
    """Memory that ends when some gradients are already on their way to the other rank."""

    def end(gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def limited(work: Any, step: int) -> tuple[Tensor, Tensor]:
        work.noise.requires_grad_()
        if len(work) > 1:
            work.noise.register_hook(end)
        return losses(work, step)

    return limited


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    """Folders of states: by `both`, and of one process by itself."""
    folder = tmp_path_factory.mktemp("pair")
    with runtime.one_thread(CPU):
        for name in ("plain", "fp16"):
            steps(built(packed, Ranks(), name, shard=False), folder / f"{name} of one")
    runtime.launch(both, (packed, folder), workers=2, device=CPU)
    return folder


def state(folder: Path) -> State:
    found = checkpoint.latest(folder)
    assert found is not None
    return found


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def close(one: State, other: State, atol: float = 1e-5) -> None:
    # A tenth of one step's lr: AdamW makes a gradient near zero, and its rounding, as large as any other.
    assert list(one.tensors) == list(other.tensors)
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(
            other.tensors[name], tensor, atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


@needs_fsdp2
@pytest.mark.parametrize("name", ["plain", "pieces", "compiled"])
def test_two_ranks_that_share_the_state_take_the_steps_of_one(pair: Path, name: str) -> None:
    one, two = state(pair / "plain of one"), state(pair / name)
    assert all(told["grad_norm"] > 0.4 for told in one.facts["told"])  # clipped at 0.2, each time
    for alone, shared in zip(one.facts["told"], two.facts["told"], strict=True):
        assert shared == pytest.approx(alone, abs=2e-6)
    close(one, two)


@needs_fsdp2
def test_each_rank_holds_its_part_of_weights_averages_and_moments(pair: Path) -> None:
    assert state(pair / "plain of one").facts["held"] == [1, 1, 1]
    assert state(pair / "plain").facts["held"] == pytest.approx([0.5, 0.5, 0.5], abs=0.02)


@needs_fsdp2
def test_half_precision_computes_what_it_computes_over_whole_models(pair: Path) -> None:
    close(state(pair / "bf16 over whole models"), state(pair / "bf16"))


@needs_fsdp2
def test_fp16_steps_overflow_on_all_ranks_together(pair: Path) -> None:
    one, two = state(pair / "fp16 of one"), state(pair / "fp16")
    skipped = [told["skipped"] for told in one.facts["told"]]
    assert skipped[0] == 1
    assert skipped[-1] == 0
    assert [told["skipped"] for told in two.facts["told"]] == skipped
    assert two.facts["scaler"] == one.facts["scaler"]
    assert two.facts["told"][-1] == pytest.approx(one.facts["told"][-1], rel=0.02)


@needs_fsdp2
def test_a_loss_that_one_rank_loses_leaves_every_ranks_weights(pair: Path) -> None:
    lost = state(pair / "lost")
    assert [told["skipped"] for told in lost.facts["told"]] == [0, 0, 0, 1, 1]
    before, _ = checkpoint.load_tensors(pair / "lost" / f"{min(LOST):08d}.safetensors")
    for part in ("model", "opt"):
        assert same(checkpoint.under(before, part), checkpoint.under(lost.tensors, part))


@needs_fsdp2
def test_a_state_moves_between_one_rank_and_two_bit_for_bit(pair: Path, packed: Path, tmp_path: Path) -> None:
    assert same(state(pair / "plain of one").tensors, state(pair / "taken over").tensors)
    alone = built(packed, Ranks(), "plain", shard=False)
    step, _ = checkpoint.resume(pair / "plain", alone.parts)
    save(alone, tmp_path, step)
    assert same(state(pair / "plain").tensors, state(tmp_path).tensors)


# Whole runs


@needs_fsdp2
def test_a_run_goes_from_one_rank_to_two_that_share_it_and_back(
    packed: Path, image_folder: Path, tmp_path: Path
) -> None:
    watched: dict[str, Any] = {"held_out": str(image_folder), "watch_every": 4, "keep_checkpoints": 9}
    whole = train(config(packed, tmp_path / "whole", **watched)).path
    path = train(config(packed, tmp_path / "run", steps=4, **watched)).path
    # By the clock too, which each rank reads for itself.
    shared = {"gpus": 2, "shard": "yes", "checkpoint_every": 1000, "checkpoint_minutes": 1e-9}
    plan = training.plan(config(packed, path, steps=8, **{**watched, **shared}))
    assert training.step_settings(plan).shard
    training.run(plan)
    assert kept(path) == [4, 6, 8]
    eighth, _ = checkpoint.load_tensors(path / WEIGHTS)
    train(config(packed, path, **watched))

    one, other = (checkpoint.load_tensors(folder / WEIGHTS)[0] for folder in (whole, path))
    assert {n: (v.shape, v.dtype) for n, v in one.items()} == {n: (v.shape, v.dtype) for n, v in eighth.items()}
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=2e-4, rtol=0)
    for alone, two in zip(Run(whole).readings(), Run(path).readings(), strict=True):
        assert two["step"] == alone["step"]
        for name in ("train", "held_out"):
            assert two[name] == pytest.approx(alone[name], abs=1e-4)
    assert sorted(png.name for png in (path / SAMPLES).iterdir()) == [f"{step:08d}.png" for step in (4, 8, 12)]
    assert all((path / name).exists() for name in (CURVES, DONE, "README.md"))
    assert Generator.open(path, CPU).identity == Generator.open(whole, CPU).identity


# What is decided


def test_one_process_has_nobody_to_share_with(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--shard yes(.|\n)*--gpus N"):
        training.plan(config(packed, tmp_path / "run", shard="yes"))
    with pytest.raises(UsageError, match="auto, yes, no"):
        config(packed, tmp_path / "run", shard="maybe")
    typed = ["train", str(packed), "--model", "sit-tiny/2", "--recipe", "small", "--device", "cpu", "--shard", "yes"]
    assert CliRunner().invoke(app, [*typed, "--out", str(tmp_path / "run")]).exit_code == 2
    assert not (tmp_path / "run").exists()


@needs_fsdp2
def test_the_dry_run_says_whether_and_why(packed: Path, tmp_path: Path) -> None:
    typed = [
        "train",
        str(packed),
        "--model",
        "sit-tiny/2",
        "--recipe",
        "small",
        "--device",
        "cpu",
        "--dry-run",
        "--json",
    ]

    def told(*options: str) -> tuple[bool, str]:
        found = json.loads(CliRunner().invoke(app, [*typed, "--out", str(tmp_path / "run"), *options]).stdout)
        return found["sharded"], found["sharded_why"]

    assert told() == (False, "one process")
    assert told("--gpus", "2") == (False, "processes on a CPU share its memory")
    assert told("--gpus", "2", "--shard", "no") == (False, "--shard no")
    assert told("--gpus", "2", "--shard", "yes") == (True, "--shard yes")


def test_the_state_is_cut_up_where_gpus_cannot_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = model_spec("sit-xl/2", 32, 4, 1000)
    needed = 20 * sum(value.numel() for value in SiT(replace(spec, depth=1)).parameters())
    one_block = sum(value.numel() for value in SiT(replace(spec, depth=1)).blocks.parameters())
    needed += 20 * 27 * one_block
    assert sharding.state_bytes(spec) == needed
    memory = SimpleNamespace(total_memory=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    decisions = []
    for share in (0.69, 0.71):
        memory.total_memory = round(needed / share)
        decisions.append(sharding.decide("auto", spec, CUDA, 8))
    assert [decided.on for decided in decisions] == [False, True]
    assert decisions[1].why == (
        "weights, gradients, moments and averages are 13.5 GB, more than 70% of a GPU's 19.0 GB"
    )
    assert not sharding.decide("auto", spec, CUDA, 1).on


def test_a_torch_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.distributed.fsdp, "fully_shard", raising=False)
    with pytest.raises(D2CError, match=r"expected: 2.6 or later(.|\n)*--shard no"):
        sharding.decide("yes", model_spec("sit-tiny/2", 8, 3, 3), CPU, 2)
