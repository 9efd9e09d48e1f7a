"""Guidance by default, and of a run that never learnt to draw without a class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import config, train
from typer.testing import CliRunner

from d2c import fid, generation, sampling, training, watching
from d2c.errors import UsageError
from d2c.generator import Generator
from d2c.sampling import SamplerConfig
from d2c_cli.app import app
from formats.files import read_json

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scales() -> list[float]:
    """Of the guidance of the samples that the run draws of itself."""
    return []


@pytest.fixture(scope="module")
def unguided(tmp_path_factory: pytest.TempPathFactory, packed: Path, scales: list[float]) -> Path:
    draw = watching.draw

    def noted(*args: Any, **options: Any) -> Any:
        scales.append(args[5].scale)
        return draw(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watching, "draw", noted)
        out = tmp_path_factory.mktemp("unguided") / "run"
        return train(config(packed, out, steps=2, numbers={"class_dropout": 0.0})).path


def d2c(*args: str | Path) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="d2c")


def test_the_plan_says_what_becomes_of_samples(packed: Path, tmp_path: Path) -> None:
    plan = training.plan(config(packed, tmp_path / "run", numbers={"class_dropout": 0.0}))
    assert [note for note in plan.notes if "class_dropout=0" in note and "not guided" in note]
    assert not [note for note in training.plan(config(packed, tmp_path / "run")).notes if "dropout" in note]


def test_a_run_without_dropout_is_never_guided(
    unguided: Path, packed: Path, tmp_path: Path, scales: list[float]
) -> None:
    assert set(scales) == {1.0}
    assert d2c("sample", unguided, "--device", "cpu", "--count", "4", "--out", tmp_path / "s").exit_code == 0
    assert read_json(tmp_path / "s" / generation.RECORD)["asked"]["sampler"]["guidance"] == 1.0
    asked = fid.FidConfig(judged=unguided, workspace=packed.parent / "workspace", samples=4, device="cpu")
    assert fid.plan(asked).asked["sampler"]["guidance"] == 1.0
    generator = Generator.open(unguided, CPU)
    plain, off = (
        generator.pixels(np.zeros(2, np.int64), [0, 1], SamplerConfig(steps=2, guidance=guidance))
        for guidance in (None, 1.0)
    )
    assert np.array_equal(plain, off)
    with pytest.raises(UsageError, match="cannot be guided"):
        generator.pixels(np.zeros(2, np.int64), [0, 1], SamplerConfig(steps=2, guidance=1.5))


@pytest.mark.parametrize("command", ["sample", "fid"])
@pytest.mark.parametrize("scale", ["1.5", "0"])
def test_guidance_that_somebody_typed_is_refused(
    unguided: Path, packed: Path, tmp_path: Path, command: str, scale: str
) -> None:
    where = ["--workspace", packed.parent / "workspace"] if command == "fid" else []
    found = d2c(command, unguided, *where, "--device", "cpu", "--out", tmp_path / "out", "--guidance", scale)
    assert found.exit_code == 2
    assert "cannot be guided" in found.stderr
    assert f"--guidance {scale} for a run with class_dropout=0" in found.stderr
    assert not (tmp_path / "out").exists()
    assert d2c(command, unguided, *where, "--device", "cpu", "--guidance", "1", "--dry-run").exit_code == 0


def test_others_are_guided_by_1_5_unless_asked(unguided: Path, packed: Path, tmp_path: Path) -> None:
    assert SamplerConfig().guided(0.1) == SamplerConfig().guided(None) == SamplerConfig(guidance=sampling.GUIDANCE)
    assert SamplerConfig(guidance=4.0).guided(None).guidance == SamplerConfig(guidance=4.0).guided(0.1).guidance == 4.0
    assert SamplerConfig().evaluations() == SamplerConfig(guidance=1.5).evaluations() == 100
    run = train(config(packed, tmp_path / "run", steps=2)).path
    shown = json.loads(d2c("sample", run, "--device", "cpu", "--count", "4", "--json", "--dry-run").stdout)
    assert shown["steps"][0]["facts"]["evaluations"] == 4 * 100
    made = generation.plan(generation.GenerationConfig(run=run, out=tmp_path / "s", device="cpu"))
    assert made.asked["sampler"]["guidance"] == 1.5
