"""What `train` says and refuses before it writes anything."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from killing import ROOT
from test_training import config, train

from d2c import train_plan, training
from d2c.errors import D2CError, UsageError
from d2c.recipe import RECIPES, Recipe, recipe
from d2c.runs import MODEL, RUN, Run
from formats.files import read_json


def test_a_batch_that_the_processes_cannot_share_is_refused_before_anything_is_written(
    packed: Path, tmp_path: Path
) -> None:
    for micro_batch in (None, 2):
        with pytest.raises(UsageError, match=r"batch 6 on 4 ranks(.|\n)*--batch-size 4"):
            training.plan(config(packed, tmp_path / "run", gpus=4, micro_batch=micro_batch))
    assert not (tmp_path / "run").exists()
    training.plan(config(packed, tmp_path / "run", gpus=3, micro_batch=4))


def test_torchrun_counts_its_own_processes(packed: Path, tmp_path: Path) -> None:
    asked = ["train", str(packed), "--model", "sit-tiny/2", "--recipe", "small", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "d2c_cli", *asked, "--device", "cpu", "--dry-run", "--gpus", "2"]
    for batch, code in (("6", 0), ("8", 2)):
        done = subprocess.run(
            [*command, "--batch-size", batch],
            env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stderr
    assert "batch 8 on 3 ranks" in done.stderr


def test_a_finished_run_asks_nothing_of_the_number_of_processes(packed: Path, tmp_path: Path) -> None:
    train(config(packed, tmp_path / "run", steps=2))
    assert training.plan(config(packed, tmp_path / "run", steps=2, gpus=4)).done


def test_a_folder_in_which_nothing_was_trained_becomes_what_is_asked_for_next(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise D2CError("no memory")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training.runtime, "launch", fail)
        with pytest.raises(D2CError, match="no memory"):
            train(config(packed, out, steps=2, seed=1))
    assert read_json(out / RUN)["identity"]["seed"] == 1
    other = config(packed, out, steps=2, numbers={"batch_size": 4, "text": False})
    fresh = config(packed, tmp_path / "fresh", steps=2, numbers={"batch_size": 4, "text": False})
    assert train(other).steps == train(fresh).steps == 2
    for name in (RUN, MODEL, "ema.safetensors", "text.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    with pytest.raises(D2CError, match="another run"):
        training.plan(config(packed, out, steps=2, seed=1))
    assert Run(out).begun()


@pytest.mark.parametrize(
    ("steps", "decay", "share", "better"),
    [(1000, 0.9999, 90, 0.996), (20_000, 0.9999, 14, 0.9998), (100_000, 0.99999, 37, 0.99996), (20, 0.99, 82, 0.8)],
)
def test_an_average_that_hardly_leaves_its_start_is_noted_with_a_decay_that_would_do(
    packed: Path, tmp_path: Path, steps: int, decay: float, share: int, better: float
) -> None:
    notes = training.plan(config(packed, tmp_path / "run", steps=steps, numbers={"ema_decay": decay})).notes
    assert [note for note in notes if f"after {steps:,} steps {share}% of the averaged" in note]
    assert [note for note in notes if f"--set ema_decay={better}," in note]
    assert better**steps < 0.03
    for enough in (better, 0.0):
        notes = training.plan(config(packed, tmp_path / "run", steps=steps, numbers={"ema_decay": enough})).notes
        assert not [note for note in notes if "averaged" in note]


def about_the_average(numbers: Recipe) -> str:
    artifact: Any = SimpleNamespace(manifest={"encoders": {"text": 1, "vision": 1}}, classes=[])
    return "".join(note for note in train_plan._notes(numbers, artifact) if "ema_decay" in note)


def test_no_number_of_steps_is_left_without_a_decay_that_would_do() -> None:
    for steps in (*range(1, 3000), 26_800, 40_000, 10**9):
        note = about_the_average(replace(recipe("d2c"), steps=steps, ema_decay=1 - 1e-12))
        decay = float(note.partition("--set ema_decay=")[2].partition(", ")[0])
        assert decay**steps <= train_plan.INITIAL


def test_the_recipes_own_steps_are_enough() -> None:
    assert not [name for name, numbers in RECIPES.items() if about_the_average(numbers)]
