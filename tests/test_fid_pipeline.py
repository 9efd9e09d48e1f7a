"""`d2c fid` of a run: its images are drawn as `d2c sample` draws them, by any number of processes, and then judged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2c import fid, fid_pipeline, training
from d2c.fid import FidConfig
from d2c.generator import Generator
from d2c.progress import Silent
from d2c.recipe import recipe
from d2c.sampling import SamplerConfig
from formats.files import read_json


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    config = training.TrainingConfig(
        artifact=packed, out=tmp_path_factory.mktemp("runs") / "run", model="sit-tiny/2", device="cpu",
        recipe=recipe("small", steps=20, batch_size=6),
    )  # fmt: skip
    return training.run(training.plan(config)).path


def measure(run: Path, packed: Path, gpus: int = 1, **options: Any) -> dict[str, Any]:
    config = FidConfig(
        judged=run, workspace=packed.parent / "workspace", samples=30, sampler=SamplerConfig(steps=3), device="cpu",
        batch_size=8, **options,
    )  # fmt: skip
    return fid_pipeline.measure(fid.plan(config), gpus, Silent()).report


def test_two_processes_measure_what_one_does(run: Path, packed: Path, tmp_path: Path) -> None:
    one = measure(run, packed, out=tmp_path / "one")
    two = measure(run, packed, gpus=2, out=tmp_path / "two")
    assert [row["distance"] for row in two["rows"]] == [row["distance"] for row in one["rows"]]
    assert one["protocol"]["judged"] == {"kind": "run", "name": "run", "images": 30}
    first, second = (tmp_path / name / "samples" / "samples.npz" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    assert one["costs"]["sample"] == read_json(tmp_path / "one" / "samples" / "samples.json")["seconds"]


def test_a_killed_measurement_draws_no_image_twice(
    run: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(fid, "_measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            measure(run, packed, out=tmp_path / "out")
    monkeypatch.setattr(Generator, "stream", interrupt)
    measure(run, packed, out=tmp_path / "out")


def test_classes_drawn_at_random_are_told_and_judged(run: Path, packed: Path, tmp_path: Path) -> None:
    even, chance = (measure(run, packed, out=tmp_path / name, labels=name) for name in ("balanced", "random"))
    assert (even["protocol"]["labels"], chance["protocol"]["labels"]) == ("balanced", "random")
    with np.load(tmp_path / "random" / "samples" / "samples.npz") as stored:
        assert len(set(np.bincount(stored["labels"], minlength=3))) > 1
    assert even["rows"][0]["distance"] != chance["rows"][0]["distance"]


def test_a_finished_measurement_needs_no_samples(run: Path, packed: Path, tmp_path: Path) -> None:
    before = measure(run, packed, out=tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "samples")
    assert measure(run, packed, out=tmp_path / "out") == before
    assert not (tmp_path / "out" / "samples").exists()
