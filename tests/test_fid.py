"""Sample and fid: images by seed, the rows that tell how to read a distance, and the copy check."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d2c import fid, generation, training
from d2c.errors import D2CError
from d2c.fid import FidConfig
from d2c.generation import GenerationConfig
from d2c.generator import Generator, balanced_labels, grid, sample_seeds
from d2c.recipe import recipe
from d2c.runtime import resolve_device
from d2c.sampling import SamplerConfig

SAMPLER = SamplerConfig(steps=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    config = training.TrainingConfig(
        artifact=packed, out=out, model="sit-tiny/2", recipe=recipe("small", steps=20, batch_size=6), device="cpu"
    )
    return training.run(training.plan(config)).path


def sample(run: Path, out: Path, **options: Any) -> generation.Result:
    config = GenerationConfig(run=run, out=out, sampler=SAMPLER, device="cpu", **{"count": 12, "npz": True, **options})
    return generation.run(generation.plan(config))


def arrays(result: generation.Result) -> np.ndarray[Any, Any]:
    with np.load(result.path / generation.ARRAYS) as stored:
        return np.asarray(stored["arr_0"])


def test_samples_are_a_grid_and_an_npz_that_adms_evaluator_reads(run: Path, tmp_path: Path) -> None:
    result = sample(run, tmp_path / "samples")
    pixels = arrays(result)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (12, 8, 8, 3))
    with Image.open(tmp_path / "samples" / generation.GRID) as sheet:
        # 4 columns of 64 px cells with gaps of 2 px; the first image stands at the top left, eight times enlarged.
        assert sheet.size == (4 * 66 + 2, 3 * 66 + 2)
        assert sheet.getpixel((2, 2)) == tuple(pixels[0, 0, 0])


def test_an_image_depends_on_its_seed_and_not_on_its_batch_or_the_count(run: Path, tmp_path: Path) -> None:
    whole = arrays(sample(run, tmp_path / "a")).astype(int)
    small = arrays(sample(run, tmp_path / "b", batch_size=5)).astype(int)
    longer = arrays(sample(run, tmp_path / "c", count=20)).astype(int)
    other = arrays(sample(run, tmp_path / "d", seed=1)).astype(int)
    assert np.abs(whole - small).max() <= 1
    assert np.abs(whole - longer[:12]).max() <= 1
    assert np.abs(whole - other).max() > 20


def test_samples_that_are_there_are_left_alone(run: Path, tmp_path: Path) -> None:
    sample(run, tmp_path / "a")
    plan = generation.plan(
        GenerationConfig(run=run, out=tmp_path / "a", sampler=SAMPLER, device="cpu", count=12, npz=True)
    )
    assert plan.done
    assert not generation.plan(replace(plan.config, seed=1)).done


def test_an_unfinished_run_says_so(run: Path, tmp_path: Path) -> None:
    unfinished = Path(shutil.copytree(run, tmp_path / "run"))
    (unfinished / "done.json").unlink()
    with pytest.raises(D2CError, match=r"not a finished training run(.|\n)*d2c train again"):
        Generator.open(unfinished, resolve_device("cpu"))


def test_labels_are_balanced_and_seeds_nest() -> None:
    assert np.bincount(balanced_labels(10, 3)).tolist() == [4, 3, 3]
    assert sample_seeds(0, 5) == sample_seeds(0, 9)[:5]
    assert not set(sample_seeds(0, 50)) & set(sample_seeds(1, 50))


def test_the_grid_keeps_the_order_row_by_row() -> None:
    pixels = np.stack([np.full((2, 2, 3), value, np.uint8) for value in (10, 20, 30)])
    sheet = np.asarray(grid(pixels, 2))
    assert [int(sheet[y, x, 0]) for y, x in ((3, 3), (3, 7), (7, 3))] == [10, 20, 30]


@pytest.fixture(scope="module")
def measured(run: Path, packed: Path) -> fid.Result:
    config = FidConfig(run=run, workspace=packed.parent / "workspace", samples=60, sampler=SAMPLER, device="cpu")
    return fid.run(fid.plan(config))


def test_the_report_has_the_rows_a_sceptic_asks_for(measured: fid.Result) -> None:
    rows = {row["name"]: row for row in measured.report["rows"]}
    assert list(rows) == ["generated", "replay", "random real 1", "random real 2", "random real 3", "real"]
    assert rows["replay"]["n"] == rows["random real 1"]["n"] == 12
    assert rows["real"]["n"] == 60
    # Real images are nearer to real images than a model of 20 steps is.
    assert rows["real"]["distance"] < rows["generated"]["distance"]


def test_a_distance_in_a_classifiers_space_is_never_called_fid(measured: fid.Result) -> None:
    assert measured.report["space"]["distance"] == "FD (classifier)"
    assert any("not FID" in note for note in measured.report["notes"])


def test_protocol_and_costs_are_printed_with_it(measured: fid.Result) -> None:
    protocol, costs = measured.report["protocol"], measured.report["costs"]
    assert protocol["sampler"]["guidance"] == 1.5
    assert (protocol["passes_per_image"], protocol["images"], protocol["training_seed"]) == (10.0, 12, 0)
    assert all(costs[stage] >= 0 for stage in ("score", "attach", "train", "sample"))
    assert costs["train"] > 0


def test_copying_is_calibrated_on_images_that_were_not_selected(measured: fid.Result) -> None:
    copying = measured.report["copying"]
    assert copying["calibrated_on"] == 95 - 12
    assert not copying["flagged"]
    assert (measured.path.parent / fid.CLOSEST).exists()


def test_a_run_that_replays_its_training_images_is_flagged(
    run: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from formats import open_artifact

    memorised = Path(shutil.copytree(run, tmp_path / "run"))
    train = open_artifact(packed).stack("latent", np.arange(12))[:, 0].transpose(0, 2, 3, 1)

    def replay(self: Generator, labels: np.ndarray[Any, Any], *_: Any, **__: Any) -> np.ndarray[Any, Any]:
        noise = np.random.default_rng(0).integers(-1, 2, (len(labels), 8, 8, 3))
        return np.clip(train[np.arange(len(labels)) % 12].astype(int) + noise, 0, 255).astype(np.uint8)

    monkeypatch.setattr(Generator, "pixels", replay)
    config = FidConfig(run=memorised, workspace=packed.parent / "workspace", samples=120, sampler=SAMPLER, device="cpu")
    report = fid.run(fid.plan(config)).report
    assert report["copying"]["flagged"]
    assert report["copying"]["pixels"]["rate"] > 0.9


def test_measuring_again_does_nothing(measured: fid.Result, run: Path, packed: Path) -> None:
    config = FidConfig(run=run, workspace=packed.parent / "workspace", samples=60, sampler=SAMPLER, device="cpu")
    assert fid.plan(config).done
    assert not fid.plan(replace(config, samples=61)).done


def test_missing_inception_weights_say_where_to_get_them(run: Path, packed: Path, tmp_path: Path) -> None:
    config = FidConfig(
        run=run, workspace=packed.parent / "workspace", samples=60, inception=tmp_path / "no.pth", device="cpu"
    )
    with pytest.raises(D2CError, match="Inception weights"):
        fid.run(fid.plan(config))


def test_an_artifact_that_is_not_the_one_trained_on_is_refused(run: Path, packed: Path, tmp_path: Path) -> None:
    from formats.files import read_json, write_json

    other = Path(shutil.copytree(run, tmp_path / "run"))
    facts = read_json(other / "run.json")
    facts["identity"]["content_id"] = "d2c1-xxh3-128:" + "0" * 32
    write_json(other / "run.json", facts)
    with pytest.raises(D2CError, match="changed since the run"):
        fid.plan(FidConfig(run=other, workspace=packed.parent / "workspace", device="cpu"))
