"""Ctrl-C and a scheduler's SIGTERM, sent to a real process while it trains; the same command then finishes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from d2c_cli.app import app

ROOT = Path(__file__).resolve().parents[1]
SCORE = "score photos --scorer-model sit-tiny/4 --scorer-steps 100 --evals 2 --device cpu --json"


@pytest.fixture
def _sigint_is_heard() -> Iterator[None]:
    # A shell starts what runs in the background deaf to SIGINT, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for index in range(24):
        path = tmp_path / "photos" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 10 * index, np.uint8)).save(path)
    return tmp_path


def start(home: Path, *more: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "d2c_cli", *SCORE.split(), *more], cwd=home, env=env, stdout=pipe, stderr=pipe, text=True
    )


def has_logged(home: Path, since: int) -> bool:
    logs = [path.stat() for path in home.glob("d2c-workspace/scorer/*/run/stats.jsonl")]
    return any(log.st_size and log.st_mtime_ns > since for log in logs)


def stop(home: Path, number: signal.Signals, *more: str) -> tuple[int, dict[str, str], str]:
    """Run until training has logged its first steps, then send the signal."""
    began, process = time.time_ns(), start(home, *more)
    while not has_logged(home, began) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    return process.returncode, json.loads(out)["error"], errors


@pytest.mark.slow
@pytest.mark.usefixtures("_sigint_is_heard")
def test_a_stopped_run_says_so_in_one_line_and_goes_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, error, errors = stop(home, signal.SIGINT)
    assert code == 130
    assert errors.splitlines()[-1] == "interrupted: run the same command again to resume"
    assert error["kind"] == "Interrupted"
    assert "Traceback" not in errors

    code, error, errors = stop(home, signal.SIGTERM)
    assert code == 75
    *_, what, where, hint = errors.splitlines()
    assert re.fullmatch(r"error: stopped at step \d+; its state is saved", what)
    assert where.startswith("  where: d2c-workspace/scorer/")
    assert hint == "  try: run the same command again"
    assert "Traceback" not in errors

    monkeypatch.chdir(home)
    rerun = CliRunner().invoke(app, SCORE.split(), prog_name="d2c", catch_exceptions=False)
    assert rerun.exit_code == 0, rerun.stderr
    assert [step["ran"] for step in json.loads(rerun.stdout)["steps"]] == [True, True]
    assert json.loads(rerun.stdout)["images"] == 24


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_that_warns_the_parent_of_several_processes_finds_their_state_saved(
    home: Path, number: signal.Signals
) -> None:
    code, error, errors = stop(home, number, "--gpus", "2")
    assert code == 75, errors
    assert number.name in error["what"] or "its state is saved" in error["what"]
    assert list(home.glob("d2c-workspace/scorer/*/run/checkpoints/*.safetensors"))
