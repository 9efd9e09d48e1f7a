"""Options of training: what is skipped, cut into pieces, stopped, watched and told."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import Between, config, kept, train
from torch import Tensor

from d2c import checkpoint, log_writers, memorisation, runtime, training
from d2c.errors import D2CError, InterruptedRunError, UsageError
from d2c.generator import Generator
from d2c.memorisation import Clock, since_lowest
from d2c.progress import Silent
from d2c.runs import CURVES, DONE, READINGS, SAMPLES, STATS, WEIGHTS, Run
from d2c.runtime import Ranks
from d2c.sampling import SamplerConfig
from d2c.trainer import Tally, Trainer
from d2c.transport import Velocity
from d2c.watching import Watch
from formats import open_artifact
from formats.files import read_json

Losses = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    return train(config(packed, tmp_path_factory.mktemp("runs") / "run")).path


def same(one: Path, other: Path, *names: str) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in (WEIGHTS, STATS, *names))


# What goes wrong in a step


def breaking(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The loss of these steps is not a number."""
    losses = Trainer.losses

    def broken(self: Trainer, work: Any, step: int) -> Losses:
        denoising, alignment = losses(self, work, step)
        return denoising * (float("nan") if step in steps else 1), alignment

    monkeypatch.setattr(Trainer, "losses", broken)


def test_a_step_without_a_finite_loss_is_skipped_and_counted(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, {3, 6, 7})
    run = Run(train(config(packed, tmp_path / "run")).path)
    lines = {line["step"]: line for line in run.stats()}
    assert [lines[step]["skipped"] for step in (2, 4, 6, 8, 10)] == [0, 1, 0, 2, 0]
    assert lines[8]["loss"] is None
    assert all(line["loss"] > 0 or line["alignment"] for line in lines.values() if line["loss"] is not None)
    weights, _ = checkpoint.load_tensors(run.path / WEIGHTS)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_skipped_step_leaves_the_weights_as_they_were(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = train(config(packed, tmp_path / "one", steps=4, numbers={"ema_decay": 0.0})).path
    breaking(monkeypatch, {4, 5})
    two = train(config(packed, tmp_path / "two", steps=6, numbers={"ema_decay": 0.0})).path
    first, second = (checkpoint.load_tensors(path / WEIGHTS)[0] for path in (one, two))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_batch_in_pieces_is_the_same_step(packed: Path, tmp_path: Path, undisturbed: Path) -> None:
    pieces = train(config(packed, tmp_path / "run", micro_batch=4)).path  # of 6: four and two
    for one, other in zip(Run(undisturbed).stats(), Run(pieces).stats(), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=2e-5)
    with pytest.raises(UsageError, match="micro_batch must be positive"):
        config(packed, tmp_path, micro_batch=0)


# Signals


class Signal(Silent):
    """Progress that sends this process a signal at the first report."""

    def __init__(self, number: int) -> None:
        self.number = number

    def bar(self, label: str, total: int, unit: str, done: int = 0) -> Any:
        sent: list[bool] = []

        def once() -> None:
            if not sent:
                sent.append(True)
                os.kill(os.getpid(), self.number)

        return Between(once).bar(label, total, unit, done)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_state_and_the_run_goes_on_from_there(
    packed: Path, tmp_path: Path, undisturbed: Path, number: int
) -> None:
    asked = config(packed, tmp_path / "run")
    before = signal.getsignal(number)
    with pytest.raises(InterruptedRunError, match="stopped at step 3; its state is saved"):
        train(asked, Signal(number))  # comes after the line of step 2, in the middle of the next one
    assert kept(tmp_path / "run") == [3]
    assert signal.getsignal(number) is before
    train(asked)
    assert same(tmp_path / "run", undisturbed)


def test_several_processes_stop_together_between_two_lines_and_go_on_from_there(packed: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"gpus": 2, "steps": 16, "log_every": 8, "checkpoint_every": 1000}
    whole = train(config(packed, tmp_path / "whole", **options)).path
    asked = config(packed, tmp_path / "run", **options)
    with pytest.raises(InterruptedRunError, match="stopped at step 10; its state is saved"):
        train(asked, Signal(signal.SIGTERM))  # of the first process alone, after the line of step 8
    assert kept(tmp_path / "run") == [10]
    train(asked)
    assert same(tmp_path / "run", whole)


def test_a_log_between_two_lines_goes_on_with_other_ranks() -> None:
    saved = {"total": [1.0, 2.0, 3.0, 4.0, 5.0, 3.0, 2.0, 1.0, 4.0, 5.0], "count": 2, "lost": 1}
    cpu = torch.device("cpu")
    assert Tally.of(saved, cpu, Ranks(rank=1, world=2)).to_dict()["total"] == saved["total"][5:]
    assert Tally.of(saved, cpu, Ranks()).to_dict() == {"total": [2.0, 2.0, 2.0, 4.0, 5.0], "count": 2, "lost": 1}
    one = {"total": [1.0, 2.0, 3.0, 4.0, 5.0], "count": 2, "lost": 1}
    assert Tally.of(one, cpu, Ranks(rank=1, world=2)).to_dict() == one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "steps"), [("--gpus 1", 400), ("--gpus 2", 400), ("--gpus 2 --shard yes", 200)], ids=["1", "2", "shard"]
)
def test_the_command_stops_with_the_code_of_those_who_may_come_again(
    packed: Path, tmp_path: Path, ranks: str, steps: int
) -> None:
    def command(out: Path) -> list[str]:
        typed = [
            "train",
            str(packed),
            "--model",
            "sit-tiny/2",
            "--recipe",
            "small",
            "--steps",
            str(steps),
            "--device",
            "cpu",
        ]
        more = ["--batch-size", "6", *ranks.split(), "--out", str(out), "--checkpoint-every", "10000"]
        return [sys.executable, "-m", "d2c_cli", *typed, *more]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True, env=environment)
    run = subprocess.Popen(command(tmp_path / "run"), stderr=subprocess.PIPE, env=environment)
    while not (tmp_path / "run" / STATS).exists():
        time.sleep(0.02)
        assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    _, told = run.communicate(timeout=60)
    assert run.returncode == 75, told.decode()
    assert kept(tmp_path / "run"), told.decode()
    assert not (tmp_path / "run" / DONE).exists()
    subprocess.run(command(tmp_path / "run"), check=True, capture_output=True, env=environment)
    assert same(tmp_path / "run", tmp_path / "whole")


def slowly(ranks: Ranks, plan: training.Plan) -> None:
    """A rank that looks for longer than the others would wait within a step."""
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=2), torch.distributed.group.WORLD)
    Watch.look = lambda self, step, averaged: time.sleep(3 * (step == 2))  # type: ignore[method-assign]
    training._train(ranks, (plan, Silent()))


def test_ranks_wait_for_the_one_that_looks(packed: Path, tmp_path: Path) -> None:
    plan = training.plan(config(packed, tmp_path / "run", steps=4, watch_every=2, gpus=2))
    training._open_run(plan)
    runtime.launch(slowly, plan, workers=2, device=torch.device("cpu"))
    assert Run(tmp_path / "run").finished_steps() == 4


# Watching


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, packed: Path, image_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    return train(config(packed, folder / "run", held_out=str(image_folder), watch_every=3)).path


def test_watching_changes_nothing(watched: Path, undisturbed: Path) -> None:
    assert same(watched, undisturbed)


def test_the_clock_reads_images_that_the_artifact_does_not_hold(
    watched: Path, packed: Path, image_folder: Path
) -> None:
    readings = Run(watched).readings()
    assert [reading["step"] for reading in readings] == [4, 8, 12]  # every 3, when a line is written next
    for reading in readings:
        for name in ("train", "held_out"):
            assert len(reading[f"{name}_bins"]) == 4
            assert reading[name] == pytest.approx(np.mean(reading[f"{name}_bins"]), abs=1e-5)
            assert reading[f"{name}_stderr"] > 0
    assert readings[-1]["train"] < readings[0]["train"]


def test_samples_and_curves_can_be_looked_at(watched: Path) -> None:
    assert sorted(path.name for path in (watched / SAMPLES).iterdir()) == [f"{step:08d}.png" for step in (4, 8, 12)]
    with Image.open(watched / CURVES) as curves, Image.open(watched / SAMPLES / "00000012.png") as samples:
        assert curves.size == (880, 4 * 300)  # denoising, alignment, both kinds of images, quarters
        assert len(np.unique(np.asarray(curves).reshape(-1, 3), axis=0)) > 20  # lines, ticks and smooth letters
        assert np.asarray(samples).std() > 10


def test_a_killed_run_reads_its_clock_anew(watched: Path, packed: Path, image_folder: Path, tmp_path: Path) -> None:
    asked = config(packed, tmp_path / "run", held_out=str(image_folder), watch_every=3)
    with pytest.raises(InterruptedRunError):
        train(asked, Signal(signal.SIGTERM))
    train(asked)
    assert same(tmp_path / "run", watched, READINGS)


def test_of_clusters_the_clock_asks_without_classes(packed: Path, image_folder: Path, tmp_path: Path) -> None:
    artifact = open_artifact(packed)
    artifact.manifest["source"]["labels"] = "clusters:3"
    stranger = shutil.copytree(image_folder, tmp_path / "stranger")
    (stranger / "cat").rename(stranger / "a class of its own")
    clock = Clock.open(artifact, str(stranger), Velocity(), text=True, seed=0, device=torch.device("cpu"))
    told = []

    def model(latents: torch.Tensor, *_: Any, null: torch.Tensor) -> torch.Tensor:
        told.append(null)
        return latents

    clock.read(model)
    assert len(clock.held_out) > 40  # images of the class that the artifact does not know, too
    assert torch.cat(told).all()


def test_too_few_held_out_images_are_refused(packed: Path, image_folder: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    for name in ("cat", "dog"):
        shutil.copytree(image_folder / name, few / name, ignore=lambda _, names: sorted(names)[5:])
    with pytest.raises(D2CError, match="too few held-out images"):
        train(config(packed, tmp_path / "run", held_out=str(few)))


def readings(values: list[float]) -> Iterator[dict[str, Any]]:
    for value in values:
        flat = [value] * memorisation.BINS
        yield {"train": 0.5, "train_bins": flat, "train_stderr": 0.0, "held_out": value, "held_out_bins": flat}


class Warnings(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, message: str) -> None:
        self.said.append(message)


def test_a_model_that_memorises_is_told_of_and_stopped(
    packed: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = readings([0.9, 0.7, 0.8, 0.75, 0.8, 0.9])
    monkeypatch.setattr(Clock, "read", lambda *_: next(values))
    options: dict[str, Any] = {"held_out": str(image_folder), "watch_every": 2, "patience": 4}
    said = Warnings()
    result = train(config(packed, tmp_path / "run", steps=20, **options), said)
    assert result.steps == 12
    assert "not been lower for 4 readings" in result.stopped
    assert [line for line in said.said if "begun to memorise" in line and "lowest at step 4 " in line]
    assert training.plan(config(packed, tmp_path / "run", steps=20, **options)).done
    Generator.open(tmp_path / "run", torch.device("cpu"))
    with pytest.raises(UsageError, match="--held-out"):
        config(packed, tmp_path / "run", patience=2)


def test_since_lowest_counts_readings() -> None:
    assert [since_lowest([{"held_out": v} for v in values]) for values in ([], [3], [3, 2, 4], [1, 2, 2])] == [
        0,
        0,
        1,
        2,
    ]


# What is told


def test_the_model_card_says_what_the_weights_are(watched: Path) -> None:
    card = (watched / "README.md").read_text()
    assert "# sit-tiny/2, trained on 12 images" in card
    assert "after 12 steps of 6: 6.0 passes" in card
    assert read_json(watched / "run.json")["identity"]["content_id"] in card
    assert '| flip | "grid" |' in card


def test_other_logs_get_the_same_figures_and_pictures(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, Any]] = []

    class Fake:
        def scalars(self, step: int, values: dict[str, float]) -> None:
            told.append(("scalars", step, sorted(values)))

        def picture(self, step: int, name: str, png: Path) -> None:
            assert png.exists()
            told.append(("picture", step, name))

        def close(self) -> None:
            told.append(("close", 0, None))

    monkeypatch.setattr(log_writers, "_TensorBoard", lambda run: Fake())
    train(config(packed, tmp_path / "run", steps=4, log_to=("tensorboard",), watch_every=4))
    names = ["alignment", "denoising", "grad_norm", "loss", "skipped"]
    assert told == [
        ("scalars", 2, names), ("scalars", 4, names), ("picture", 4, "samples"), ("picture", 4, "curves"),
        ("close", 0, None),
    ]  # fmt: skip


def test_a_log_that_is_not_installed_says_how_to_get_it(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    # Told before there is a model, in whose sums other ranks would wait.
    monkeypatch.setattr(Trainer, "build", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(UsageError, match=r"wandb is not installed(.|\n)*d2c-toolkit\[wandb\]"):
        train(config(packed, tmp_path / "run", log_to=("wandb",)))
    with pytest.raises(UsageError, match="tensorboard, wandb"):
        config(packed, tmp_path / "run", log_to=("paper",))


# Options of the model and of the alignment


@pytest.mark.parametrize(
    "numbers",
    [{"qk_norm": True}, {"projector": "conv"}, {"spatial_norm": 1.0}, {"align_depth": 1}, {"align_until": 4}],
    ids=lambda numbers: next(iter(numbers)),
)
def test_an_option_changes_what_is_learnt_and_can_be_sampled_from(
    packed: Path, tmp_path: Path, undisturbed: Path, numbers: dict[str, Any]
) -> None:
    run = train(config(packed, tmp_path / "run", numbers=numbers)).path
    assert Run(run).stats()[-1]["loss"] != Run(undisturbed).stats()[-1]["loss"]
    generator = Generator.open(run, torch.device("cpu"))
    pixels = generator.pixels(np.zeros(2, np.int64), [0, 1], SamplerConfig(steps=2))
    assert pixels.shape == (2, 8, 8, 3)


def test_alignment_ends_at_its_step(packed: Path, tmp_path: Path) -> None:
    stats = Run(train(config(packed, tmp_path / "run", numbers={"align_until": 6})).path).stats()
    assert [line["alignment"] != 0 for line in stats] == [True, True, True, False, False, False]


def test_a_block_that_the_model_does_not_have_is_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(D2CError, match=r"align_depth 5 is outside 1..4"):
        training.plan(config(packed, tmp_path / "run", numbers={"align_depth": 5}))
