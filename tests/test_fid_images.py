"""fid of images that no run of ours drew: folders and .npz, references of every kind, and what it says of bad input."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from d2c import fid, fid_stats, ledger, metrics, pictures
from d2c.classifier import Classifier
from d2c.errors import D2CError, UsageError
from d2c.features import Inception
from d2c.fid import FidConfig
from d2c.sources import open_source
from d2c_cli.app import app
from formats.files import read_json


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, scored: Path, packed: Path) -> Path:
    """Scored, its classifier trained by the first who asks."""
    return Path(shutil.copytree(scored, tmp_path_factory.mktemp("images") / "workspace"))


@pytest.fixture(scope="module")
def real(image_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All 95 images of the source: pixels and labels."""
    source = open_source(image_folder)
    found = list(pictures.FromSource(source, range(len(source)), 8, np.arange(3)).chunks())
    return np.concatenate([c.pixels for c in found]), np.concatenate([c.labels for c in found])


def folder_of(root: Path, pixels: np.ndarray, labels: np.ndarray) -> Path:
    names = ["cat", "dog", "sea lion"]
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        (root / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / names[label] / f"{number:03d}.png")
    return root


def npz_of(path: Path, pixels: np.ndarray, labels: np.ndarray | None = None) -> Path:
    np.savez(path, arr_0=pixels, **({} if labels is None else {"labels": labels}))
    return path


def measure(judged: Path, workspace: Path, **options: Any) -> dict[str, Any]:
    return fid.run(fid.plan(FidConfig(judged=judged, workspace=workspace, device="cpu", **options))).report


def test_a_folder_and_an_npz_of_the_same_images_have_the_same_numbers(
    workspace: Path, real: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    pixels, labels = real
    folder = folder_of(tmp_path / "folder", pixels[::3], labels[::3])
    source = open_source(folder)
    ordered = np.concatenate(
        [c.pixels for c in pictures.FromSource(source, range(len(source)), 8, np.arange(3)).chunks()]
    )
    one = measure(folder, workspace)
    two = measure(npz_of(tmp_path / "samples.npz", ordered, source.labels), workspace)
    # Only a folder's files can be told to be the reference's own.
    assert [row.pop("in_reference") for row in (one["rows"][0], two["rows"][0])] == [32, 0]
    assert one["rows"] == two["rows"]
    assert one["classes"] == two["classes"]
    assert {row["class"] for row in one["classes"]} == {"cat", "dog", "sea lion"}
    assert one["copying"] is None
    assert any("--train" in note for note in one["notes"])
    assert (tmp_path / "samples-fid" / "fid.json").exists()
    assert (tmp_path / "folder-fid" / "grid.png").exists()


def test_a_replay_is_flagged_and_unseen_real_images_are_not(
    workspace: Path, real: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    pixels, labels = real
    rng = np.random.default_rng(0)
    order = rng.permutation(len(pixels))
    train, held_out, fresh = order[:30], order[30:65], order[65:]
    sources = {
        "train": str(folder_of(tmp_path / "train", pixels[train], labels[train])),
        "held_out": str(folder_of(tmp_path / "held", pixels[held_out], labels[held_out])),
    }
    noise = rng.integers(-1, 2, (60, 8, 8, 3))
    copies = np.clip(pixels[train][np.arange(60) % 30][:, :, ::-1] + noise, 0, 255).astype(np.uint8)
    replay = measure(npz_of(tmp_path / "replay.npz", copies), workspace, **sources)
    honest = measure(npz_of(tmp_path / "honest.npz", pixels[fresh]), workspace, **sources)
    assert replay["copying_flagged"]
    assert replay["copy_rate"] > 0.9
    assert replay["copying"]["pixels"]["mirrored"] > 0.9
    assert replay["copy_rate_interval"][0] > 0.9
    assert not honest["copying_flagged"]
    assert honest["copy_rate_held_out"] < 0.1
    assert [row["name"] for row in honest["rows"]] == ["generated", "replay", "real"]
    assert honest["rows"][2]["n"] == 30
    with Image.open(tmp_path / "replay-fid" / fid.CLOSEST) as sheet:
        # 60 pairs, eight in a row.
        assert sheet.size == (16 * 66 + 2, 8 * 66 + 2)


def test_an_artifact_may_be_what_was_copied_and_what_is_measured_against(
    workspace: Path, packed: Path, real: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    judged = npz_of(tmp_path / "samples.npz", real[0][:40], real[1][:40])
    report = measure(judged, workspace, train=str(packed), reference=str(packed))
    assert report["reference"]["kind"] == "artifact"
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["replay"]["distance"] == pytest.approx(0, abs=1e-6)
    assert rows["replay"]["in_reference"] == 12
    # Everything was trained on: nothing is unselected.
    assert rows["generated"]["coverage_unselected"] is None
    against = measure(judged, workspace, train=str(packed), out=tmp_path / "other")
    generated = against["rows"][0]
    assert 0 <= generated["coverage_unselected"] <= 1
    assert against["rows"][1]["coverage_unselected"] < against["rows"][1]["coverage"]


def test_statistics_that_were_written_are_measured_against(
    workspace: Path, image_folder: Path, real: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    stats = tmp_path / "stats.npz"
    config = fid_stats.StatsConfig(source=str(image_folder), out=stats, workspace=workspace, device="cpu")
    told = fid_stats.run(fid_stats.plan(config))
    assert (told["images"], told["arrays"], told["side"]) == (95, ["mu", "sigma"], 8)
    before = stats.read_bytes()
    fid_stats.run(fid_stats.plan(config))
    assert stats.read_bytes() == before
    judged = npz_of(tmp_path / "samples.npz", real[0][:50], real[1][:50])
    direct = measure(judged, workspace, out=tmp_path / "direct")
    report = measure(judged, workspace, reference=str(stats))
    assert report["rows"][0]["distance"] == direct["rows"][0]["distance"]
    assert report["rows"][0]["reference_n"] == 95
    assert report["rows"][0]["precision"] is None
    assert any("statistics and no images" in note for note in report["notes"])
    space = Classifier.load(workspace / "judge", torch.device("cpu"))
    expected = metrics.frechet_distance(metrics.statistics(space(real[0][:50])), metrics.statistics(space(real[0])))
    assert direct["rows"][0]["distance"] == pytest.approx(expected.value, abs=1e-3)


@pytest.mark.slow
def test_an_adm_reference_gives_fid_by_its_statistics_and_precision_by_its_images(
    workspace: Path, real: tuple[np.ndarray, np.ndarray], tmp_path: Path, inception_file: Path
) -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(2048, 8)) / 50
    arrays = {"mu": rng.normal(size=2048) / 9, "sigma": root @ root.T, "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    adm = tmp_path / "adm.npz"
    np.savez(adm, arr_0=real[0][:10], **arrays)
    judged = npz_of(tmp_path / "samples.npz", real[0][10:18])
    report = measure(judged, tmp_path / "none", reference=str(adm), inception=inception_file)
    row = report["rows"][0]
    seen = Inception(inception_file, torch.device("cpu")).activations(real[0][10:18])
    stats = metrics.Stats(arrays["mu"], arrays["sigma"], 0)
    assert row["distance"] == pytest.approx(metrics.frechet_distance(metrics.statistics(seen.features), stats).value)
    spatial = metrics.Stats(arrays["mu_s"], arrays["sigma_s"], 0)
    expected = metrics.frechet_distance(metrics.statistics(seen.spatial), spatial).value
    assert row["spatial_distance"] == pytest.approx(expected, abs=1e-3)
    assert row["precision"] is not None
    assert row["inception_score"] >= 1
    assert report["space"]["distance"].startswith("FD (inception-")
    assert any("2,049" in note for note in report["notes"])
    np.savez(adm, **arrays)
    with pytest.raises(D2CError, match=r"another feature space(.|\n)*fid-stats"):
        measure(judged, workspace, reference=str(adm), overwrite=True)


def test_images_are_exported_for_adms_evaluator(
    workspace: Path, real: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "folder", real[0], real[1])
    wanted = {"export_npz": tmp_path / "out.npz"}
    config = FidConfig(judged=folder, workspace=workspace, device="cpu", **wanted)
    fid.run(fid.plan(config))
    with np.load(tmp_path / "out.npz", allow_pickle=False) as stored:
        assert stored["arr_0"].shape == (95, 8, 8, 3)
        assert sorted(map(bytes, stored["arr_0"])) == sorted(map(bytes, real[0]))
    assert fid.plan(config).done
    (tmp_path / "out.npz").unlink()
    assert not fid.plan(config).done


def test_a_second_space_has_a_distance_of_its_own_and_a_floor(
    workspace: Path, packed: Path, real: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "tiny.safetensors"
    save_file(timm.create_model("test_vit", img_size=64, num_classes=7).state_dict(), weights)
    judged = npz_of(tmp_path / "samples.npz", 255 - real[0][:40])
    report = measure(judged, workspace, train=str(packed), second=f"timm:test_vit:{weights}", subsets=1)
    assert report["second"]["distance"] == "FD (timm:test_vit)"
    rows = {row["name"]: row["second_distance"] for row in report["rows"]}
    assert rows["real"] < rows["generated"]
    assert rows["random real 1"] < rows["generated"]
    assert report["rulers"]["same"] == []


def test_bootstrap_intervals_hold_the_value_and_are_repeatable(
    workspace: Path, real: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    judged = npz_of(tmp_path / "samples.npz", real[0][:60])
    report = measure(judged, workspace)
    for name in ("distance", "precision", "recall", "density", "coverage"):
        low, high = report["intervals"][name]
        assert low <= report["rows"][0][name] <= high
    again = measure(judged, workspace, overwrite=True)
    assert again["intervals"] == report["intervals"]


@pytest.mark.parametrize(
    ("name", "arrays", "message"),
    [
        ("floats", {"arr_0": np.full((3, 8, 8, 3), np.nan)}, r"3 of 3 with NaN(.|\n)*diverged"),
        ("planes", {"arr_0": np.zeros((3, 3, 8, 8), np.uint8)}, "channels last"),
        ("nothing", {"x": np.zeros(3)}, "neither images nor statistics"),
        ("statistics", {"mu": np.zeros(3), "sigma": np.eye(3)}, "statistics and no images"),
        ("one", {"arr_0": np.zeros((1, 8, 8, 3), np.uint8)}, "too few images"),
        ("pickle", {"mu": np.array([{}], dtype=object), "sigma": np.eye(1)}, "no readable .npz"),
    ],
)
def test_an_npz_that_cannot_be_judged_says_why(
    name: str, arrays: dict[str, np.ndarray], message: str, workspace: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / f"{name}.npz", **arrays)
    with pytest.raises(D2CError, match=message):
        measure(tmp_path / f"{name}.npz", workspace)
    assert not (tmp_path / f"{name}-fid" / "fid.json").exists()


def test_images_of_another_size_are_refused(workspace: Path, image_folder: Path, packed: Path, tmp_path: Path) -> None:
    judged = npz_of(tmp_path / "large.npz", np.zeros((9, 16, 16, 3), np.uint8))
    small = npz_of(tmp_path / "small.npz", np.zeros((9, 8, 8, 3), np.uint8))
    for options in (
        {"reference": str(image_folder)},
        {"reference": str(small)},
        {"reference": str(packed)},
        {"train": str(packed)},
        {"held_out": str(image_folder)},
    ):
        with pytest.raises(D2CError, match=r"different sizes(.|\n)*8 px(.|\n)*16 px"):
            fid.plan(FidConfig(judged=judged, workspace=workspace, device="cpu", **options))


def test_without_a_space_or_a_reference_it_says_what_to_do(tmp_path: Path, image_folder: Path) -> None:
    judged = npz_of(tmp_path / "samples.npz", np.zeros((9, 8, 8, 3), np.uint8))
    config = FidConfig(judged=judged, workspace=tmp_path / "none", device="cpu")
    with pytest.raises(D2CError, match=r"nothing to measure against(.|\n)*--reference"):
        fid.plan(config)
    with pytest.raises(D2CError, match=r"6726825d(.|\n)*releases(.|\n)*--inception FILE(.|\n)*classifier"):
        fid.plan(replace(config, reference=str(image_folder)))
    with pytest.raises(UsageError, match="--artifact is for runs"):
        fid.plan(replace(config, artifact=image_folder))


def test_weights_in_torchs_cache_are_used_if_they_are_the_published_ones(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir()
    cached.write_bytes(b"something else")
    judged = npz_of(tmp_path / "samples.npz", np.zeros((9, 8, 8, 3), np.uint8))
    config = FidConfig(judged=judged, workspace=workspace, device="cpu")
    with pytest.raises(D2CError, match="not the published ones"):
        fid.plan(config)
    monkeypatch.setattr("d2c.fid_plan.INCEPTION_SHA256", "")
    assert fid.plan(config).inception == cached


def test_an_interrupted_measurement_leaves_no_export(
    workspace: Path, real: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = npz_of(tmp_path / "samples.npz", real[0])
    config = FidConfig(judged=judged, workspace=workspace, device="cpu", export_npz=tmp_path / "out.npz")
    monkeypatch.setattr("d2c.seen.flat_pixels", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fid.run(fid.plan(config))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.npz"]


def test_the_report_of_a_run_says_what_it_cost_and_when_that_pays(packed: Path, tmp_path: Path) -> None:
    spent = {"train_scorer": 100.0, "score": 60.0, "select": 30.0, "attach": 10.0, "train": 10.0, "sample": 5.0}
    paid = ledger.payback(spent, images=1000, condensed=200)
    assert paid is not None
    # 200 s once; training on five times as many images, as often each, takes 40 s more.
    assert (paid["condensing_seconds"], paid["saved_seconds_a_training"], paid["trainings"]) == (200, 40, 5)
    assert "assumed" in paid["assumption"]
    assert ledger.payback({**spent, "score": None}, 1000, 200) is None
    nothing = ledger.payback(spent, images=200, condensed=200)
    assert nothing is not None
    assert nothing["trainings"] is None


@pytest.mark.parametrize(
    ("aligner", "metric", "second", "same"),
    [
        ("timm:vit_base_patch14_dinov2.lvd142m", "inception-v3-compat", None, []),
        (
            "timm:vit_base_patch14_dinov2.lvd142m",
            "classifier",
            "timm:vit_small_patch14_dinov2",
            [["aligner", "second"]],
        ),
        ("scorer", "classifier", None, [["selector", "aligner"]]),
    ],
)
def test_parts_that_share_a_space_are_stamped(aligner: str, metric: str, second: str | None, same: list[Any]) -> None:
    manifest = {"selection": {"features": {"encoder": "scorer"}}, "encoders": {"vision": {"name": aligner}}}
    chosen: Any = SimpleNamespace(manifest=manifest)
    assert ledger.rulers(chosen, metric, second)["same"] == same


def test_the_document_is_read_back_as_it_was(
    workspace: Path, real: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    report = measure(npz_of(tmp_path / "samples.npz", real[0]), workspace)
    assert read_json(tmp_path / "samples-fid" / "fid.json") == report
    assert report["rows"][0]["distance"] == pytest.approx(0, abs=1e-4)
    assert report["protocol"]["judged"]["kind"] == "npz"


def test_options_that_draw_images_are_told_to_change_nothing_here(
    workspace: Path, real: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    samples = npz_of(tmp_path / "samples.npz", real[0][::3])
    asked = ["fid", samples, "--workspace", workspace, "--device", "cpu", "--dry-run", "--guidance", "4", "--gpus", "2"]
    done = CliRunner().invoke(app, [str(word) for word in asked], prog_name="d2c")
    assert done.exit_code == 0
    assert "drawn elsewhere: --guidance, --gpus changes nothing" in done.stderr
