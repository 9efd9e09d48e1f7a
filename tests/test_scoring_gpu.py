"""The GPU benchmark runs where there is no GPU, and does not pretend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "docs/benchmarks/scoring_gpu.py", *options]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_small_model_on_a_cpu_gives_a_page_that_says_what_it_is_worth() -> None:
    few = ("--batch", "2", "3", "--rounds", "2", "--seconds", "0.01", "--side", "8")
    done = run("--device", "cpu", "--model", "sit-tiny/4", *few)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| eager")]
    assert [row[1] for row in rows] == ["2", "3"]
    assert all("%" in row[-1] for row in rows)
    assert "no GPU: these figures mean nothing" in done.stdout
    assert "The bar" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the absence of a GPU")
def test_without_a_gpu_it_says_what_it_needs() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert "needs a CUDA GPU" in done.stderr
