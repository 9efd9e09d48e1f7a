"""The commands on a real, tiny data set: the users' own lines, dry runs, and what verify returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from d2c.errors import UsageError
from d2c_cli.app import app


def d2c(*args: str | Path) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args], prog_name="d2c", catch_exceptions=False)
    return result


def document(*args: str | Path) -> dict[str, Any]:
    result = d2c(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for index in range(12):
            path = folder / "photos" / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    (folder / "photos" / "cat" / "broken.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("D2C_DEVICE", "cpu")


def test_the_users_three_commands_and_their_dry_runs(home: Path) -> None:
    score = ("score", "photos/", "--scorer-steps", "2", "--evals", "2")
    train = ("train", "shards/", "--model", "sit-tiny/2", "--recipe", "small", "--steps", "2", "--batch-size", "4")

    before = everything(home)
    plan = document(*score, "--dry-run")
    assert everything(home) == before
    assert plan["dry_run"] is True
    assert (plan["source"]["images"], plan["codec"], plan["size"], plan["evaluations"]) == (25, "rgb", 8, 50)
    assert [(step["stage"], step["would_run"]) for step in plan["steps"]] == [
        ("train the scorer", True),
        ("score", True),
    ]
    assert plan["steps"][0]["facts"]["model"] == "sit-tiny/2"

    scored = document(*score)
    assert (scored["images"], scored["bad_files"], scored["classes"]) == (24, 1, 2)

    before = everything(home)
    assert not any(step["would_run"] for step in document(*score, "--dry-run")["steps"])
    longer = document(*score, "--evals", "3", "--dry-run")
    assert [step["would_run"] for step in longer["steps"]] == [False, True]
    assert longer["steps"][1]["reasons"] == ["evals: 2 -> 3"]
    assert longer["estimated_seconds"] > 0
    priced = document(*score, "--evals", "3000", "--part", "2/4", "--price", "7200", "--dry-run")
    assert priced["this_share"]["share"] == "2/4"
    assert priced["this_share"]["worker_hours"] == pytest.approx(priced["worker_hours"] / 4, abs=1e-3)
    assert priced["price"] == pytest.approx(7200 * priced["worker_hours"], rel=0.5)
    chosen = document(*score[:4], "--target-rank-corr", "0.9", "--dry-run")
    assert [(step["stage"], step["would_run"]) for step in chosen["steps"]] == [
        ("train the scorer", False),
        ("choose the evaluations", True),
        ("score", True),
    ]
    assert (chosen["evaluations"], chosen["estimated_seconds"]) == (None, None)
    plan = document("pack", "--ratio", "0.25", "--dry-run")
    assert [step["stage"] for step in plan["steps"]] == ["select", "attach", "pack"]
    assert plan["steps"][0]["facts"]["images"] == 6
    assert plan["steps"][2]["facts"]["latent_bytes"] == 6 * 3 * 8 * 8
    assert everything(home) == before

    packed = document("pack", "--ratio", "0.25")
    assert packed["images"] == 6
    assert packed["bytes"] == document("inspect", "shards/")["artifact"]["bytes"]
    assert [(step["stage"], step["ran"]) for step in packed["steps"]] == [
        ("select", True),
        ("attach", True),
        ("pack", True),
    ]

    before = everything(home)
    plan = document("pack", "--ratio", "0.25", "--dry-run")
    assert not any(step["would_run"] for step in plan["steps"])
    assert plan["payload_bytes"] > 6 * 3 * 8 * 8
    other = document("pack", "--ratio", "0.25", "--container", "parquet", "--dry-run")
    assert [step["stage"] for step in other["steps"] if step["would_run"]] == ["pack"]
    plan = document(*train, "--dry-run")
    assert (plan["images"], plan["passes_per_image"], plan["steps"][0]["would_run"]) == (6, 1.3, True)
    assert plan["run"] == "runs/sit-tiny-2-small"
    assert everything(home) == before

    trained = document(*train)
    assert (trained["text"], trained["alignment"], trained["steps"][0]["ran"]) == (True, True, True)
    assert document(*train)["steps"][0]["ran"] is False

    assert document("verify", "shards", "--deep")["faults"] == []
    assert document("inspect", "shards")["artifact"]["counts"]["samples"] == 6
    assert document("inspect", "shards", "--sample", "00000002")["sample"]["class"]
    assert document("repack", "shards", "four", "--tokens", "int4")["same_content"] is False
    difference = document("inspect", "--diff", "shards", "four")["difference"]
    assert (difference["old"]["path"], difference["samples"]["changed"]) == ("shards", 6)

    document("pack", "--ratio", "0.25", "--recipe-only", "--out", "recipe")
    (scorer,) = (home / "d2c-workspace" / "scorer").glob("*/run")
    again = ("rebuild", "recipe", "--source", "photos", "--scorer", str(scorer), "--out", "rebuilt")
    assert document(*again, "--dry-run")["images"] == 6
    assert document(*again)["artifact"]["identical"] is True

    before = everything(home)
    draw = ("sample", "runs/sit-tiny-2-small", "--count", "2", "--sampling-steps", "2")
    plan = document(*draw, "--dry-run")
    assert plan["steps"][0]["facts"] == {"images": 2, "evaluations": 2 * 2 * 2}
    assert everything(home) == before
    assert document(*draw)["files"] == ["grid.png"]

    shard = next((home / "shards" / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    damaged = d2c("verify", "shards", "--json")
    assert damaged.exit_code == 3
    assert json.loads(damaged.stdout)["ok"] is False
    assert json.loads(damaged.stdout)["faults"][0]["path"].startswith("shards/")


def test_pack_without_scores_names_the_command_that_makes_them(tmp_path: Path) -> None:
    for args in (["select", "--per-class", "2"], ["pack", "--per-class", "2"]):
        result = d2c(*args, "--workspace", tmp_path / "nothing")
        assert result.exit_code == 1
        assert "d2c score" in result.stderr
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "line", ["select --per-class 2", "attach --text hashed --vision none"], ids=["select", "attach"]
)
def test_overwrite_does_a_finished_stage_anew(line: str, workspace: Path) -> None:
    document("select", "--per-class", "2", "--workspace", workspace)
    asked = (*line.split(), "--workspace", workspace)
    document(*asked)
    assert document(*asked)["steps"][0]["ran"] is False
    plan = document(*asked, "--overwrite", "--dry-run")
    assert (plan["steps"][0]["would_run"], plan["steps"][0]["reasons"]) == (True, ["--overwrite"])
    assert document(*asked, "--dry-run")["steps"][0]["would_run"] is False
    anew = document(*asked, "--overwrite")["steps"][0]
    assert anew["ran"] is True
    assert "--overwrite" in anew["reasons"][0]


def test_fid_is_told_where_the_artifact_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def plan(config: Any) -> Any:
        asked.append(config)
        raise UsageError("enough")

    monkeypatch.setattr("d2c.fid.plan", plan)
    (tmp_path / "moved").mkdir()
    assert d2c("fid", tmp_path, "--artifact", tmp_path / "moved").exit_code == 2
    assert asked[0].artifact == tmp_path / "moved"
    gone = d2c("fid", tmp_path, "--artifact", tmp_path / "move")
    assert (gone.exit_code, len(asked)) == (1, 1)
    assert f"did you mean {tmp_path / 'moved'}?" in gone.stderr


def test_budgets_that_contradict_are_usage_errors() -> None:
    both = d2c("select", "--per-class", "2", "--ratio", "0.5")
    assert (both.exit_code, both.stdout) == (2, "")
    assert "--ratio R, --per-class N or --total N" in both.stderr
    assert d2c("pack", "--ratio", "1.5").exit_code == 2
