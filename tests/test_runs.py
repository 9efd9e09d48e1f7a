"""A run's folder: what may be continued, and what a kill leaves in its log."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2c.errors import D2CError
from d2c.runs import RUN, STATS, Run
from formats.files import write_json

IDENTITY = {"model": "sit-tiny/2", "seed": 0, "recipe": {"steps": 100, "lr": 1e-3}}


def test_the_same_run_and_a_longer_one_may_be_continued(tmp_path: Path) -> None:
    write_json(tmp_path / RUN, {"identity": IDENTITY})
    assert Run(tmp_path).matches(IDENTITY)
    assert Run(tmp_path).matches({**IDENTITY, "recipe": {"steps": 500, "lr": 1e-3}})


def test_another_run_is_refused_and_every_difference_named(tmp_path: Path) -> None:
    write_json(tmp_path / RUN, {"identity": IDENTITY})
    with pytest.raises(D2CError, match=r"recipe.lr: 0.001 -> 0.1; seed: 0 -> 1"):
        Run(tmp_path).matches({**IDENTITY, "seed": 1, "recipe": {"steps": 100, "lr": 0.1}})


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(D2CError, match="something else"):
        Run(tmp_path).matches(IDENTITY)


def test_lines_after_the_last_checkpoint_are_forgotten_with_a_torn_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (50, 100, 150):
        run.log({"step": step, "loss": 1.0})
    with (tmp_path / STATS).open("a") as stream:
        stream.write('{"step": 200, "lo')
    run.forget_after(100)
    assert [line["step"] for line in run.stats()] == [50, 100]
    run.finish()
    assert run.finished_steps() == 100
