"""A run's folder: what may be continued, and what a kill leaves in its log."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2c import checkpoint
from d2c.checkpoint import State
from d2c.errors import D2CError, UsageError
from d2c.runs import CHECKPOINTS, COST, DONE, RUN, STATS, WEIGHTS, Run
from formats.files import read_json, write_json

IDENTITY = {"model": "sit-tiny/2", "seed": 0, "recipe": {"steps": 100, "lr": 1e-3}}


def test_the_same_run_and_a_longer_one_may_be_continued(tmp_path: Path) -> None:
    write_json(tmp_path / RUN, {"identity": IDENTITY})
    Run(tmp_path).log({"step": 50, "loss": 1.0})
    assert Run(tmp_path).matches(IDENTITY)
    assert Run(tmp_path).matches({**IDENTITY, "recipe": {"steps": 500, "lr": 1e-3}})


def test_another_run_is_refused_and_every_difference_named(tmp_path: Path) -> None:
    other = {**IDENTITY, "seed": 1, "recipe": {"steps": 100, "lr": 0.1}}
    for name in (STATS, DONE, WEIGHTS, CHECKPOINTS):
        run = Run(tmp_path / name)
        write_json(run.path / RUN, {"identity": IDENTITY})
        if name == STATS:
            run.log({"step": 50, "loss": 1.0})
        elif name == CHECKPOINTS:
            checkpoint.save(run.path / name, State(50, {}, {}))
        else:
            write_json(run.path / name, {"step": 50, "loss": 1.0})
        with pytest.raises(D2CError, match=r"recipe.lr: 0.001 -> 0.1; seed: 0 -> 1"):
            run.matches(other)


def test_a_folder_in_which_nothing_was_trained_may_become_another_run(tmp_path: Path) -> None:
    write_json(tmp_path / RUN, {"identity": IDENTITY})
    (tmp_path / STATS).write_text("")
    assert not Run(tmp_path).matches({**IDENTITY, "seed": 1})


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(D2CError, match="something else"):
        Run(tmp_path).matches(IDENTITY)


def test_fewer_steps_than_were_taken_are_refused_finished_or_not(tmp_path: Path) -> None:
    write_json(tmp_path / RUN, {"identity": IDENTITY})
    for step in (50, 150):
        checkpoint.save(tmp_path / CHECKPOINTS, State(step, {}, {}))
    with pytest.raises(
        D2CError, match=r"150 steps taken, 100 asked for(.|\n)*--steps 150(.|\n)*--out(.|\n)*--overwrite"
    ):
        Run(tmp_path).matches(IDENTITY)
    write_json(tmp_path / DONE, {"step": 400, "loss": 1.0})
    with pytest.raises(D2CError, match="400 steps taken, 100 asked for") as caught:
        Run(tmp_path).matches(IDENTITY)
    assert not isinstance(caught.value, UsageError)
    assert Run(tmp_path).matches({**IDENTITY, "recipe": {"steps": 400, "lr": 1e-3}})


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


@pytest.mark.parametrize("torn", ['{"step": 200, "lo', '{"step": 200, "loss": {}', "\x00\x00", '{"step": 200}'])
def test_what_follows_a_torn_line_is_a_line_of_its_own(tmp_path: Path, torn: str) -> None:
    run = Run(tmp_path)
    run.log({"step": 150, "loss": 1.0})
    run.spend(2.0, step=150, device="cpu")
    for name in (STATS, COST):
        with (tmp_path / name).open("a") as stream:
            stream.write(torn.replace("200}", '200, "seconds": 0}'))
    run.log({"step": 250, "loss": 0.5})
    run.spend(3.0, step=250, device="cpu")
    assert [line["step"] for line in run.stats() if line["step"] != 200] == [150, 250]
    assert run.seconds() == 5.0


def test_an_artifact_in_the_same_tree_is_found_after_the_tree_has_moved(tmp_path: Path) -> None:
    folder = tmp_path / "project" / "runs" / "a"
    write_json(folder / RUN, {"identity": IDENTITY, "artifact": str(tmp_path / "before")})
    assert Run(folder).artifact() == tmp_path / "before"
    Run(folder).moved_artifact(tmp_path / "project" / "shards")
    assert read_json(folder / RUN) == {"identity": IDENTITY, "artifact": "../../shards"}
    (tmp_path / "project").rename(tmp_path / "moved")
    assert Run(tmp_path / "moved" / "runs" / "a").artifact() == tmp_path / "moved" / "shards"


def test_an_artifact_on_another_disk_is_known_by_its_whole_path(tmp_path: Path) -> None:
    write_json(tmp_path / RUN, {"identity": IDENTITY, "artifact": "shards"})
    Run(tmp_path).moved_artifact(Path("/another-disk/shards"))
    assert read_json(tmp_path / RUN)["artifact"] == "/another-disk/shards"
    assert Run(tmp_path).artifact() == Path("/another-disk/shards")


@pytest.mark.parametrize(
    ("precision", "lr", "objective", "hint"),
    [
        ("bf16", 2e-3, "velocity", "--precision fp32, or --recipe d2c, which learns more slowly, or a larger --batch"),
        (
            "fp32",
            2e-3,
            "eps",
            "try --recipe dit, which learns more slowly, or a larger --batch-size; with another --out",
        ),
        ("fp32", 1e-4, "velocity", "try a larger --batch-size; with another --out, or with --overwrite"),
    ],
)
def test_a_run_that_diverged_is_told_what_it_has_not_tried(
    tmp_path: Path, precision: str, lr: float, objective: str, hint: str
) -> None:
    identity = {"precision": precision, "recipe": {"lr": lr, "objective": objective}}
    assert hint in str(Run(tmp_path).diverged(identity, 7))
