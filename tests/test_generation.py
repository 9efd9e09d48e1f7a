"""Sample: parts that survive kills and are shared among processes, labels, and weights that others trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing import ROOT, Fatal, run_and_kill
from typer.testing import CliRunner

from d2c import generation, training
from d2c.generation import GenerationConfig
from d2c.generator import Generator, random_labels
from d2c.progress import Progress
from d2c.recipe import recipe
from d2c.sampling import Method, SamplerConfig
from d2c_cli.app import app
from formats.files import read_json

SAMPLER = SamplerConfig(method="sde", steps=4, guidance=2.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    config = training.TrainingConfig(
        artifact=packed, out=out, model="sit-tiny/2", recipe=recipe("small", steps=20, batch_size=6), device="cpu"
    )
    return training.run(training.plan(config)).path


def asked(run: Path, out: Path, **options: Any) -> GenerationConfig:
    defaults = {"sampler": SAMPLER, "device": "cpu", "count": 20, "batch_size": 3, "npz": True}
    return GenerationConfig(run=run, out=out, **{**defaults, **options})


def draw(config: GenerationConfig, progress: Progress | None = None) -> generation.Result:
    return generation.run(generation.plan(config), progress)


def files(out: Path) -> dict[str, bytes]:
    """All that is there, but for the seconds that it took."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    record = read_json(out / generation.RECORD)
    return {**found, generation.RECORD: json.dumps({**record, "seconds": None}).encode()}


def arrays(out: Path, name: str = "arr_0") -> np.ndarray[Any, Any]:
    with np.load(out / generation.ARRAYS) as stored:
        return np.asarray(stored[name])


@pytest.fixture(scope="module")
def undisturbed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files(draw(asked(run, tmp_path_factory.mktemp("whole") / "samples")).path)


@pytest.mark.parametrize("after", [1, 9, 20])
def test_a_kill_costs_one_batch_and_leaves_the_bytes_of_an_undisturbed_run(
    run: Path, tmp_path: Path, undisturbed: dict[str, bytes], after: int
) -> None:
    config = asked(run, tmp_path / "samples")
    run_and_kill(draw, config, "sample", after)
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "samples").rglob("*.npy")}
    assert len(left) == -(-after // 3)
    drawn = Counting()
    draw(config, drawn)
    assert drawn.images == 20 - min(20, 3 * len(left))
    assert files(tmp_path / "samples") == undisturbed
    assert sorted(undisturbed) == ["grid.png", "samples.json", "samples.npz"]
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


class _Count:
    def __init__(self, progress: Counting) -> None:
        self.progress = progress

    def __enter__(self) -> _Count:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def advance(self, count: int = 1, note: str = "") -> None:
        self.progress.images += count


class Counting(Fatal):
    """Progress that counts what is drawn."""

    def __init__(self) -> None:
        super().__init__("sample", 0)
        self.images = 0

    def bar(self, label: str, total: int, unit: str, done: int = 0) -> Any:
        return _Count(self)


@pytest.mark.parametrize("moment", ["_merge", "exported", "save_png", "_clear"])
def test_a_kill_while_the_parts_are_merged_loses_nothing(
    run: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        # As a kill half-way through a large file.
        (tmp_path / "samples" / f".tmp-1-{generation.ARRAYS}").write_bytes(b"half")
        raise KeyboardInterrupt

    config = asked(run, tmp_path / "samples")
    with monkeypatch.context() as patch:
        patch.setattr(generation, moment, stop)
        with pytest.raises(KeyboardInterrupt):
            draw(config)
    drawn = Counting()
    draw(config, drawn)
    assert drawn.images == 0
    assert files(tmp_path / "samples") == undisturbed


OPTIONS = "--device cpu --count 20 --batch-size 3 --npz --sampler sde --sampling-steps 4 --guidance 2".split()


def test_two_processes_leave_the_bytes_of_one(run: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    assert d2c("sample", run, "--out", tmp_path / "samples", *OPTIONS, "--gpus", "2").exit_code == 0
    assert files(tmp_path / "samples") == undisturbed


def test_torchrun_leaves_the_bytes_of_one_process(run: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "d2c_cli"]
    done = subprocess.run(
        [*command, "sample", str(run), "--out", str(tmp_path / "samples"), *OPTIONS],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "samples") == undisturbed


@pytest.mark.parametrize("method", ["euler", "sde", "dopri5"])
def test_batches_of_1_7_and_64_differ_by_one_grey_level_at_most(run: Path, tmp_path: Path, method: Method) -> None:
    sampler = replace(SAMPLER, method=method)
    found = []
    for batch in (1, 7, 64):
        draw(asked(run, tmp_path / str(batch), sampler=sampler, batch_size=batch, count=16))
        found.append(arrays(tmp_path / str(batch)).astype(int))
    assert np.abs(found[0] - found[1]).max() <= 1
    assert np.abs(found[0] - found[2]).max() <= 1
    assert found[0].std() > 5


def test_the_npz_is_what_numpy_writes_and_knows_no_clock(run: Path, tmp_path: Path) -> None:
    draw(asked(run, tmp_path / "samples"))
    pixels, labels = arrays(tmp_path / "samples"), arrays(tmp_path / "samples", "labels")
    np.savez(tmp_path / "theirs.npz", arr_0=pixels, labels=labels)
    with zipfile.ZipFile(tmp_path / "theirs.npz") as theirs, zipfile.ZipFile(tmp_path / "samples/samples.npz") as ours:
        assert theirs.namelist() == ours.namelist()
        assert all(theirs.read(name) == ours.read(name) for name in theirs.namelist())
        assert {info.date_time for info in ours.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_random_labels_are_recorded_uniform_and_begin_alike(run: Path, tmp_path: Path) -> None:
    result = draw(asked(run, tmp_path / "samples", labels="random"))
    labels = arrays(result.path, "labels")
    assert labels.tolist() == random_labels(0, 30, 3)[:20].tolist()
    assert read_json(result.path / generation.RECORD)["asked"]["labels"] == "random"
    counts = np.bincount(random_labels(0, 6000, 3))
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(6000 * 2 / 9)
    assert not np.array_equal(random_labels(0, 100, 3), random_labels(1, 100, 3))
    assert not generation.plan(asked(run, tmp_path / "samples")).done


def test_the_record_tells_how_the_images_were_drawn(run: Path, tmp_path: Path) -> None:
    sampler = SamplerConfig(steps=2, guidance=3.0, guidance_interval=(0.1, 0.8), precision="bf16")
    result = draw(asked(run, tmp_path / "samples", sampler=sampler))
    told = read_json(result.path / generation.RECORD)["asked"]
    assert told["sampler"] == {
        "method": "euler",
        "steps": 2,
        "guidance": 3.0,
        "guidance_interval": [0.1, 0.8],
        "guidance_channels": "all",
        "precision": "bf16",
        "last_step": 0.04,
        "atol": 1e-6,
        "rtol": 1e-3,
    }
    assert (told["labels"], told["seed"], told["count"], told["model"]) == ("balanced", 0, 20, "sit-tiny/2")
    assert told["weights_xxh3"] == generation.plan(asked(run, tmp_path / "b")).generator.digests()["weights_xxh3"]


def test_overwrite_draws_everything_again_but_once(run: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    config = asked(run, tmp_path / "samples")
    draw(config)
    drawn = Counting()
    draw(replace(config, overwrite=True), drawn)
    assert drawn.images == 20
    run_and_kill(draw, replace(config, overwrite=True), "sample", 9)
    drawn = Counting()
    draw(replace(config, overwrite=True), drawn)
    assert drawn.images == 20 - 9
    assert files(tmp_path / "samples") == undisturbed


def test_nothing_of_an_earlier_drawing_lies_beside_the_record_of_another(run: Path, tmp_path: Path) -> None:
    samples, fresh = tmp_path / "samples", tmp_path / "fresh"
    draw(asked(run, samples))
    (samples / "mine.txt").write_text("notes")
    draw(asked(run, samples, seed=5, npz=False))
    draw(asked(run, fresh, seed=5, npz=False))
    assert files(samples) == {**files(fresh), "mine.txt": b"notes"}
    # Nor after a kill between the two.
    draw(asked(run, samples))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "save_png", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            draw(asked(run, samples, seed=6))
    draw(asked(run, samples, seed=5, npz=False))
    assert files(samples) == {**files(fresh), "mine.txt": b"notes"}


def test_an_npz_that_sample_did_not_write_stays(run: Path, tmp_path: Path) -> None:
    (tmp_path / generation.ARRAYS).write_bytes(b"somebody's")
    draw(asked(run, tmp_path, npz=False))
    draw(asked(run, tmp_path, npz=False, seed=5))
    assert (tmp_path / generation.ARRAYS).read_bytes() == b"somebody's"


def test_samples_into_a_run_s_own_folder_leave_the_run_alone(run: Path, tmp_path: Path) -> None:
    before = files_of(run)
    draw(asked(run, run))
    assert {name: data for name, data in files_of(run).items() if name in before} == before
    for name in (generation.GRID, generation.ARRAYS, generation.RECORD):
        (run / name).unlink()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_weight_file_of_a_run_is_the_run(run: Path) -> None:
    opened = Generator.open(run / "ema.safetensors", torch.device("cpu"))
    assert opened.path == run
    assert [row.name for row in opened.classes] == ["cat", "dog", "sea lion"]
    assert opened.text


def d2c(*args: str | Path) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="d2c", catch_exceptions=False)


def test_the_command_line_reaches_every_setting(run: Path, tmp_path: Path) -> None:
    settings = "--sampler heun --sampling-steps 4 --guidance 2 --guidance-interval 0.3,0.8 --guidance-channels 3"
    more = "--precision bf16 --class-labels random --count 5 --npz --device cpu --json --batch-size 2"
    options = [*settings.split(), *more.split(), "--out", tmp_path / "out"]
    shown = json.loads(d2c("sample", run, *options, "--dry-run").stdout)
    # Times 1 .75 .5 .25 and .75 .5 .25 0: four of the eight are guided.
    assert shown["steps"][0]["facts"] == {"images": 5, "evaluations": 5 * 12}
    assert not (tmp_path / "out").exists()
    assert json.loads(d2c("sample", run, *options).stdout)["files"] == ["grid.png", "samples.npz"]
    told = read_json(tmp_path / "out" / generation.RECORD)["asked"]
    sampler = {"method": "heun", "steps": 4, "guidance": 2.0, "guidance_interval": [0.3, 0.8], "guidance_channels": 3}
    assert {name: told["sampler"][name] for name in sampler} == sampler
    assert (told["sampler"]["precision"], told["labels"]) == ("bf16", "random")


@pytest.mark.parametrize(
    "wrong",
    [
        ("--guidance-interval", "0.8,0.1"),
        ("--guidance-interval", "0.5"),
        ("--guidance-interval", "0,2"),
        ("--guidance-channels", "4"),
        ("--sampler", "rk4"),
        ("--sampler", "ddpm"),
        ("--class-labels", "none"),
    ],
)
def test_a_wrong_setting_is_a_usage_error_and_writes_nothing(run: Path, tmp_path: Path, wrong: tuple[str, str]) -> None:
    result = d2c("sample", run, *wrong, "--device", "cpu", "--out", tmp_path / "out")
    assert result.exit_code == 2, result.stderr
    assert not (tmp_path / "out").exists()


def test_samples_of_a_run_go_into_its_folder(run: Path) -> None:
    assert d2c("sample", run, "--count", "1", "--sampling-steps", "1", "--device", "cpu").exit_code == 0
    assert (run / "samples" / generation.GRID).exists()
