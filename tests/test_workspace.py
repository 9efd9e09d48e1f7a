"""Stages' records: what is finished, what is stale and why, and what a kill leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from d2c.config import differences, execution, identity
from d2c.errors import D2CError
from d2c.workspace import RECORD, Stage, Workspace
from formats.files import read_json, write_bytes, write_json

CONFIG, INPUTS = {"evals": 8}, {"source": "aa"}


def finished(tmp_path: Path) -> Stage:
    stage = Stage(tmp_path / "scores", "scores", 1)
    stage.begin(CONFIG, INPUTS)
    write_bytes(stage.path / "table", b"rows")
    stage.finish(["table"], {"images": 4}, device="cpu")
    return stage


def test_a_finished_stage_asked_the_same_is_up_to_date(tmp_path: Path) -> None:
    assert finished(tmp_path).stale(CONFIG, INPUTS) == []


def test_what_changed_is_named(tmp_path: Path) -> None:
    stage = finished(tmp_path)
    assert stage.stale({"evals": 16}, INPUTS) == ["evals: 8 -> 16"]
    assert stage.stale(CONFIG, {"source": "bb"}) == ["source changed"]
    (stage.path / "table").unlink()
    assert stage.stale(CONFIG, INPUTS) == ["table is missing"]


def test_an_interrupted_run_keeps_its_parts_only_for_the_same_question(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "scores", "scores", 1)
    stage.begin(CONFIG, INPUTS)
    part = stage.path / "parts" / "000000"
    write_bytes(part, b"part")
    assert stage.stale(CONFIG, INPUTS) == ["an interrupted run is resumed"]
    stage.begin(CONFIG, INPUTS)
    assert part.exists()
    stage.begin({"evals": 16}, INPUTS)
    assert not part.exists()


def test_beginning_anew_leaves_no_record_behind(tmp_path: Path) -> None:
    stage = finished(tmp_path)
    stage.begin({"evals": 16}, INPUTS)
    assert stage.record() is None


def test_the_digest_follows_the_outputs_and_not_the_cost(tmp_path: Path) -> None:
    one, two, other = finished(tmp_path / "1"), finished(tmp_path / "2"), finished(tmp_path / "3")
    two.spend(5.0)
    record = read_json(two.path / RECORD)
    write_json(two.path / RECORD, {**record, "cost": {"seconds": 99.0, "device": "cpu"}})
    write_json(other.path / RECORD, {**record, "outputs": {"table": "0" * 32}})
    digests = [stage.require("d2c score").digest for stage in (one, two, other)]
    assert digests[0] == digests[1] != digests[2]


def test_seconds_add_up_over_interrupted_runs_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "scores", "scores", 1)
    stage.begin(CONFIG, INPUTS)
    stage.spend(1.5, part=0)
    stage.begin(CONFIG, INPUTS)
    stage.spend(2.0, part=1)
    with (stage.path / "cost.jsonl").open("a") as stream:
        stream.write('\n{"seconds": 9')  # as a full disk leaves it
    assert stage.spent() == 3.5
    stage.spend(1.0, part=2)
    assert stage.spent() == 4.5
    with (stage.path / "cost.jsonl").open("a") as stream:
        stream.write('\n{"seconds": 23.456, "part": 11}}')  # as two nodes leave it that write over each other
    stage.spend(1.0, part=3)
    assert stage.spent() == 5.5


def test_a_missing_stage_names_the_command_and_a_newer_one_the_upgrade(tmp_path: Path) -> None:
    with pytest.raises(D2CError, match="run: d2c score DIR"):
        Workspace(tmp_path).scores.require("d2c score DIR")
    stage = finished(tmp_path)
    with pytest.raises(D2CError, match="newer d2c"):
        Stage(stage.path, "scores", 0).record()


@dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0
    folder: Path = Path("a/b")
    gpus: int = execution(1)


def test_identity_leaves_out_where_and_how_fast() -> None:
    assert identity(Config(gpus=8)) == {"seed": 0, "folder": "a/b"}
    assert differences({"seed": 0, "x": None}, {"seed": 1, "x": None}) == ["seed: 0 -> 1"]
