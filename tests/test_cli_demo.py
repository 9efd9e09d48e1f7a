"""The demo's promise: each line that it prints does what it did, from any shell."""

from __future__ import annotations

import functools
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
from typer.testing import CliRunner

from d2c import demo, judge
from d2c_cli.app import app


def d2c(*args: str | Path) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="d2c", catch_exceptions=False)


@pytest.fixture
def _few_digits_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = sklearn.datasets.load_digits()
    rows = np.concatenate([np.flatnonzero(digits.target == digit)[:12] for digit in range(10)])
    few = SimpleNamespace(images=digits.images[rows], target=digits.target[rows])
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: few)
    quick = functools.partial(judge.train_classifier, steps=2)
    monkeypatch.setattr("d2c.judge.train_classifier", quick)


@pytest.mark.slow
@pytest.mark.usefixtures("_few_digits_and_steps")
def test_every_printed_line_finds_its_work_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = demo.DemoConfig(out=Path("my demo"), seed=5, seeds=1, steps=2, scorer_steps=2, samples=10)
    result = demo.run(asked)
    assert result.report.is_file()
    lines = [shlex.split(line) for line in result.commands]
    assert [line[1] for line in lines] == ["score", *["pack", "verify", "train", "fid"] * 2]
    for program, *args in lines:
        assert program == "d2c"
        again = d2c(*args)
        assert again.exit_code == 0, again.stderr
        assert ": running (" not in again.stderr
        assert "up to date" in again.stderr or args[0] == "verify"


def test_a_dry_run_names_the_runs_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = json.loads(d2c("demo", "--dry-run", "--seeds", "2", "--seed", "5", "--out", "my demo", "--json").stdout)
    assert (plan["dry_run"], plan["runs"], plan["steps_per_run"]) == (True, 4, 500)
    written = {row["path"]: row["exists"] for row in plan["writes"]}
    assert not any(written.values())
    assert set(written) == {
        f"my demo/{name}"
        for name in (
            "digits workspace shards shards-random-5 shards-random-6 runs/condensed-5 runs/random-5 runs/condensed-6 "
            "runs/random-6 report.html"
        ).split()
    }
    assert list(tmp_path.iterdir()) == []
