"""Values that cannot work are refused before anything runs: exit code 2 or 1, one message, no traceback."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from d2c_cli.app import app


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D2C_DEVICE", "cpu")
    for index in range(8):
        path = tmp_path / "photos" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * index, np.uint8)).save(path)


def d2c(*args: str | Path) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="d2c", catch_exceptions=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("score photos --batch-size 0", "0 is too small: 1 or more."),
        ("score photos --evals 1", "1 is too small: 2 or more."),
        ("score photos --scorer-steps 0", "0 is too small: 1 or more."),
        ("score photos --gpus 0", "0 is too small: 1 or more."),
        ("score photos --size 0", "0 is too small: 1 or more."),
        ("score photos --size -8", "-8 is too small: 1 or more."),
        ("select --per-class 0", "0 is too small: 1 or more."),
        ("pack --per-class 2 --interval 0", "0 is too small: 1 or more."),
        ("pack --shards 0", "0 is too small: 1 or more."),
        ("attach --grid 0", "0 is too small: 1 or more."),
        ("train photos --model sit-s/2 --steps 0", "0 is too small: 1 or more."),
        ("train photos --model sit-s/2 --batch-size 0", "0 is too small: 1 or more."),
        ("sample photos --batch-size 0", "0 is too small: 1 or more."),
        ("sample photos --count 0", "0 is too small: 1 or more."),
        ("sample photos --sampling-steps 0", "0 is too small: 1 or more."),
        ("sample photos --guidance nan", "'nan' is not a number, such as 1.5."),
        ("fid photos --guidance inf", "'inf' is not a number, such as 1.5."),
        ("fid photos --guidance much", "'much' is not a number, such as 1.5."),
        ("fid photos --samples 1", "1 is too small: 2 or more."),
        ("fid photos --subsets -1", "-1 is too small: 0 or more."),
        ("demo --seeds 0", "0 is too small: 1 or more."),
        ("demo --samples 1", "1 is too small: 2 or more."),
        ("demo --steps 0", "0 is too small: 1 or more."),
    ],
)
def test_numbers_that_cannot_work_are_usage_errors(line: str, message: str, tmp_path: Path) -> None:
    result = d2c(*line.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"'{line.split()[-2]}'" in result.stderr
    assert message in result.stderr
    assert os.listdir(tmp_path) == ["photos"]


def test_where_a_folder_must_be_a_file_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for line in ("score photos --workspace file", "demo --out file", "pack --out file", "fid photos --artifact file"):
        result = d2c(*line.split())
        assert (result.exit_code, result.stdout) == (2, ""), line
        assert f"'{line.split()[-2]}'" in result.stderr
        assert "is a file" in result.stderr
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("place", ["file/below", "/proc/d2c-workspace"])
@pytest.mark.parametrize("line", ["score photos --scorer-steps 1 --workspace", "demo --steps 1 --out"])
def test_a_place_that_cannot_be_is_a_known_failure(line: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = d2c(*line.split(), place)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: the operating system refused" in result.stderr
    assert place in result.stderr
    assert "  try: " in result.stderr


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("--scorer-model sit-tny/2", 1, "did you mean sit-tiny/2?"),
        ("--scorer-model dit-s/2", 2, "a scorer is trained as a SiT"),
        ("--size 18", 1, "a latent side of 18 is no multiple of the patch side 4"),
        ("--size 12 --scorer-model sit-tiny/8", 1, "use a model that ends in /2 or /4"),
        ("--size 100 --codec rgb --scorer train", 1, "no multiple of the patch side 8"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_scorer_that_cannot_be_trained_is_refused_before_anything_is_written(
    line: str, code: int, message: str, dry: list[str], tmp_path: Path
) -> None:
    result = d2c("score", "photos", *line.split(), *dry)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert os.listdir(tmp_path) == ["photos"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("scor photos", "score"),
        ("inspct shards", "inspect"),
        ("score photos --batchsize 3", "--batch-size"),
        ("fid run --sampling-step 3", "--sampling-steps"),
        ("demo --sedes 2", "--seeds"),
    ],
)
def test_a_mistyped_command_or_option_gets_a_suggestion(typed: str, meant: str) -> None:
    result = d2c(*typed.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert meant in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("line", ["score photos", "train photos --model sit-s/2", "pack --ratio 0.1", "sample photos"])
@pytest.mark.parametrize("named", ["option", "environment"])
def test_one_gpu_is_not_for_several_processes(
    line: str, named: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("D2C_DEVICE", "cuda:0" if named == "environment" else "cpu")
    result = d2c(*line.split(), "--gpus", "2", *(["--device", "cuda:0"] if named == "option" else []))
    assert result.exit_code == 2
    assert "several processes cannot share one GPU" in result.stderr
    assert "--device cuda:0 --gpus 2" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
