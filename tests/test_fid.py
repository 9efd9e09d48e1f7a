"""Sample and fid: images by seed, the rows that tell how to read a distance, and the copy check."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pack_request
from PIL import Image

from d2c import fid, fid_plan, fid_stats, generation, generator, judge, ledger, metrics, pipeline, training
from d2c.classifier import train_classifier
from d2c.errors import D2CError
from d2c.fid import FidConfig
from d2c.generation import GenerationConfig
from d2c.generator import Generator, balanced_labels
from d2c.latents import RgbCodec
from d2c.recipe import recipe
from d2c.runtime import resolve_device
from d2c.sampling import SamplerConfig
from d2c.workspace import Workspace
from formats import FormatError, open_artifact
from formats.files import read_json, write_json

SAMPLER = SamplerConfig(steps=3)
RANDOM = ["random real 1", "random real 2", "random real 3"]


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


def test_samples_whose_files_were_deleted_are_drawn_again(run: Path, tmp_path: Path) -> None:
    whole = sample(run, tmp_path / "a")
    for name in (generation.GRID, generation.ARRAYS):
        (whole.path / name).unlink()
        assert not generation.plan(
            GenerationConfig(run=run, out=whole.path, sampler=SAMPLER, device="cpu", count=12, npz=True)
        ).done
        sample(run, tmp_path / "a")
        assert (whole.path / name).exists()


def test_the_npz_is_written_batch_by_batch_and_holds_all_images_and_labels(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    stream = Generator.stream

    def watched(self: Generator, *arguments: Any, **options: Any) -> Iterator[np.ndarray[Any, Any]]:
        for chunk in stream(self, *arguments, **options):
            batches.append(chunk.copy())
            yield chunk
            # What was handed on must have been used by now: nothing may hold on to every batch.
            chunk[:] = 0

    monkeypatch.setattr(Generator, "stream", watched)
    result = sample(run, tmp_path / "a", batch_size=5)
    with np.load(result.path / generation.ARRAYS) as stored:
        assert sorted(stored) == ["arr_0", "labels"]
        np.testing.assert_array_equal(stored["arr_0"], np.concatenate(batches))
        np.testing.assert_array_equal(stored["labels"], balanced_labels(12, 3))


def test_another_decoder_makes_other_images(run: Path, packed: Path, tmp_path: Path, measured: fid.Result) -> None:
    asked = GenerationConfig(run=run, out=tmp_path / "a", sampler=SAMPLER, device="cpu", count=12, npz=True)
    measuring = FidConfig(judged=run, workspace=packed.parent / "workspace", samples=60, sampler=SAMPLER, device="cpu")
    sample(run, tmp_path / "a")
    assert generation.plan(asked).done
    assert fid.plan(measuring).done

    def other(name: str, size: int, device: torch.device) -> RgbCodec:
        codec = RgbCodec(size)
        codec.spec = replace(codec.spec, weights_xxh3="f" * 32)
        return codec

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "open_codec", other)
        assert not generation.plan(asked).done
        assert not fid.plan(measuring).done


def test_an_unfinished_run_says_so(run: Path, tmp_path: Path) -> None:
    unfinished = Path(shutil.copytree(run, tmp_path / "run"))
    (unfinished / "done.json").unlink()
    with pytest.raises(D2CError, match=r"not a finished training run(.|\n)*d2c train again"):
        Generator.open(unfinished, resolve_device("cpu"))


def measure(run: Path, workspace: Path, **options: Any) -> fid.Result:
    if "reference" in options:
        options["reference"] = str(options["reference"])
    config = FidConfig(judged=run, workspace=workspace, sampler=SAMPLER, device="cpu", **{"samples": 60, **options})
    return fid.run(fid.plan(config))


def rows_of(result: fid.Result) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result.report["rows"]}


@pytest.fixture(scope="module")
def measured(run: Path, packed: Path) -> fid.Result:
    return measure(run, packed.parent / "workspace")


def test_the_report_has_the_rows_a_sceptic_asks_for(measured: fid.Result) -> None:
    rows = {row["name"]: row for row in measured.report["rows"]}
    assert list(rows) == ["generated", "replay", *RANDOM, "real"]
    assert rows["replay"]["n"] == rows["random real 1"]["n"] == 12
    # A fifth of the 83 images that were not trained on.
    assert rows["real"]["n"] == 16
    # Real images are nearer to real images than a model of 20 steps is.
    assert rows["real"]["distance"] < rows["generated"]["distance"]


def test_a_row_says_which_real_images_it_was_compared_with(measured: fid.Result) -> None:
    compared = {row["name"]: (row["reference_n"], row["in_reference"]) for row in measured.report["rows"]}
    assert compared["generated"] == (95, 0)
    # What is chosen from the source is in the reference, and a random choice as often as the condensed set.
    assert compared["replay"] == compared["random real 1"] == (95, 12)
    # The floor is not: it would be compared with itself.
    assert compared["real"] == (95 - 16, 0)


def test_the_reference_is_studied_once(
    measured: fid.Result, run: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def counted(features: np.ndarray[Any, Any]) -> metrics.Stats:
        sizes.append(len(features))
        return statistics(features)

    statistics = metrics.statistics
    monkeypatch.setattr(metrics, "statistics", counted)
    again = measure(run, packed.parent / "workspace", overwrite=True)
    # The reference and the reference without the floor; and each row's own images.
    assert sorted(sizes) == sorted([95, 95 - 16, 60, 12, 12, 12, 12, 16])
    assert again.report["rows"] == measured.report["rows"]


def test_a_distance_in_a_classifiers_space_is_never_called_fid(measured: fid.Result) -> None:
    assert measured.report["space"]["distance"] == "FD (classifier)"
    assert any("not FID" in note for note in measured.report["notes"])


def test_protocol_and_costs_are_printed_with_it(measured: fid.Result) -> None:
    protocol, costs = measured.report["protocol"], measured.report["costs"]
    assert protocol["sampler"]["guidance"] == 1.5
    assert (protocol["passes_per_image"], protocol["images"], protocol["training_seed"]) == (10.0, 12, 0)
    assert all(costs[stage] >= 0 for stage in ("score", "attach", "train", "sample"))
    assert costs["train"] > 0
    # The scorer is weights that somebody gave: nobody knows what they cost, and 0 s would be a lie.
    assert costs["train_scorer"] is None


def test_a_run_that_patience_stopped_is_told_with_the_steps_it_took(run: Path, packed: Path, tmp_path: Path) -> None:
    short = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "fid")))
    write_json(short / "done.json", {**read_json(short / "done.json"), "step": 12, "stopped": "no better"})
    protocol = measure(short, packed.parent / "workspace").report["protocol"]
    assert (protocol["steps"], protocol["passes_per_image"]) == (12, 6.0)


@pytest.mark.parametrize(("most", "told"), [(12, False), (8, True)])
def test_copies_of_a_large_training_set_are_looked_for_in_a_part_of_it(
    run: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, *, told: bool
) -> None:
    monkeypatch.setattr(fid_plan, "TRAIN", most)
    judged = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("fid")))
    notes = measure(judged, packed.parent / "workspace").report["notes"]
    assert any(f"in {most} random training images only" in note for note in notes) is told


def test_copying_is_calibrated_on_images_that_were_not_selected(measured: fid.Result) -> None:
    copying = measured.report["copying"]
    assert copying["calibrated_on"] == 95 - 12
    assert not copying["flagged"]
    assert (measured.path.parent / fid.CLOSEST).exists()


def test_a_run_that_replays_its_training_images_is_flagged(
    run: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memorised = Path(shutil.copytree(run, tmp_path / "run"))
    train = open_artifact(packed).stack("latent", np.arange(12))[:, 0].transpose(0, 2, 3, 1)

    def replay(self: Generator, labels: np.ndarray[Any, Any], *_: Any, **__: Any) -> Iterator[np.ndarray[Any, Any]]:
        noise = np.random.default_rng(0).integers(-1, 2, (len(labels), 8, 8, 3))
        yield np.clip(train[np.arange(len(labels)) % 12].astype(int) + noise, 0, 255).astype(np.uint8)

    monkeypatch.setattr(Generator, "stream", replay)
    workspace = packed.parent / "workspace"
    config = FidConfig(judged=memorised, workspace=workspace, samples=120, sampler=SAMPLER, device="cpu")
    report = fid.run(fid.plan(config)).report
    assert report["copying"]["flagged"]
    assert report["copying"]["pixels"]["rate"] > 0.9


def test_measuring_again_does_nothing(measured: fid.Result, run: Path, packed: Path) -> None:
    config = FidConfig(judged=run, workspace=packed.parent / "workspace", samples=60, sampler=SAMPLER, device="cpu")
    assert fid.plan(config).done
    assert not fid.plan(replace(config, samples=61)).done


def test_inception_weights_are_known_by_their_content(run: Path, packed: Path, tmp_path: Path) -> None:
    asked = []
    for name, content in (("a.pth", b"one"), ("b.pth", b"one"), ("c.pth", b"other")):
        (tmp_path / name).write_bytes(content)
        config = FidConfig(judged=run, workspace=packed.parent / "workspace", inception=tmp_path / name, device="cpu")
        asked.append(fid.plan(config).asked)
    assert asked[0] == asked[1]
    assert asked[0] != asked[2]


def test_missing_inception_weights_say_where_to_get_them(run: Path, packed: Path, tmp_path: Path) -> None:
    config = FidConfig(
        judged=run, workspace=packed.parent / "workspace", samples=60, inception=tmp_path / "no.pth", device="cpu"
    )
    with pytest.raises(D2CError, match="Inception weights"):
        fid.run(fid.plan(config))


def test_an_artifact_that_is_not_the_one_trained_on_is_refused(run: Path, packed: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "run"))
    facts = read_json(other / "run.json")
    facts["identity"]["content_id"] = "d2c1-xxh3-128:" + "0" * 32
    write_json(other / "run.json", facts)
    with pytest.raises(D2CError, match="changed since the run"):
        fid.plan(FidConfig(judged=other, workspace=packed.parent / "workspace", device="cpu"))


def test_an_artifact_that_moved_can_be_named(run: Path, packed: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(packed, tmp_path / "elsewhere"))
    stranded = Path(shutil.copytree(run, tmp_path / "run"))
    facts = read_json(stranded / "run.json")
    write_json(stranded / "run.json", {**facts, "artifact": str(tmp_path / "gone")})
    config = FidConfig(judged=stranded, workspace=packed.parent / "workspace", device="cpu")
    with pytest.raises(FormatError):
        fid.plan(config)
    assert fid.plan(replace(config, artifact=moved)).artifact.content_id == facts["identity"]["content_id"]


def folder_of(root: Path, images: Path, classes: dict[str, str]) -> Path:
    """A reference: its class folders, and the class of ``images`` that each is a copy of."""
    for name, like in classes.items():
        shutil.copytree(images / like, root / name)
    return root


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed.parent / "workspace", tmp_path / "workspace"))


def test_a_reference_is_a_random_draw_of_its_folder(
    run: Path, copied: Path, image_folder: Path, tmp_path: Path
) -> None:
    reference = folder_of(tmp_path / "reference", image_folder, {"cat": "cat", "dog": "dog"})
    result = measure(run, copied, reference=reference, reference_images=30)
    assert result.report["protocol"]["reference_images"] == 30
    drawn = [labels for path in (copied / "reference").glob("*/labels.npy") if len(labels := np.load(path)) == 30]
    # The first 30 of the sorted keys are cats.
    assert [set(labels.tolist()) for labels in drawn] == [{0, 1}]


def test_classes_of_a_reference_are_joined_by_what_the_data_calls_them(
    run: Path, copied: Path, image_folder: Path, tmp_path: Path
) -> None:
    known = folder_of(tmp_path / "known", image_folder, {"dog": "dog", "sea lion": "sea lion"})
    # A class that comes first in the alphabet moves all positions.
    more = folder_of(tmp_path / "more", image_folder, {"aardvark": "cat", "dog": "dog", "sea lion": "sea lion"})
    foreign = folder_of(tmp_path / "foreign", image_folder, {"x": "cat", "y": "dog"})
    names = ("generated", "replay")
    few = measure(run, copied, reference=known)
    found = measure(run, copied, reference=more)
    assert [rows_of(few)[n]["class_distance"] for n in names] == [rows_of(found)[n]["class_distance"] for n in names]
    assert rows_of(few)["replay"]["distance"] != rows_of(found)["replay"]["distance"]
    assert any("1 classes of the reference" in note for note in found.report["notes"])
    none = measure(run, copied, reference=foreign)
    assert {row["class_distance"] for row in none.report["rows"]} == {None}
    assert any("No class of the reference" in note for note in none.report["notes"])


def test_the_judge_learns_from_the_scored_images_whatever_the_reference(
    run: Path, copied: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "train_classifier", partial(train_classifier, steps=5))
    # One class: no classifier could be trained on it.
    reference = folder_of(tmp_path / "reference", image_folder, {"cat": "cat"})
    shutil.rmtree(copied / "judge", ignore_errors=True)
    shutil.copytree(image_folder / "cat", reference / "cat" / "copies")
    result = measure(run, copied, reference=reference)
    assert read_json(copied / "judge" / "stage.json")["summary"]["images"] == 95
    # Each image is there twice: a floor image's copy must not be measured against either.
    assert rows_of(result)["real"]["in_reference"] == 0
    assert rows_of(result)["real"]["reference_n"] < 80 - rows_of(result)["real"]["n"]


def test_a_run_is_checked_for_copies_whatever_it_is_measured_against(
    run: Path, copied: Path, image_folder: Path, tmp_path: Path
) -> None:
    stats = tmp_path / "stats.npz"
    config = fid_stats.StatsConfig(source=str(image_folder), out=stats, workspace=copied, device="cpu")
    fid_stats.run(fid_stats.plan(config))
    result = measure(run, copied, reference=stats, out=tmp_path / "fid")
    # Unseen are the scored images that were not chosen.
    assert result.report["copying"]["calibrated_on"] == 95 - 12
    assert rows_of(result)["real"]["n"] == 16
    assert (tmp_path / "fid" / fid.CLOSEST).exists()


def test_classes_are_compared_by_one_definition_in_a_report(
    run: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_variances = metrics.class_frechet

    def by_size(*arrays: Any, diagonal: bool) -> metrics.ClassFrechet:
        found = by_variances(*arrays, diagonal=diagonal)
        return replace(found, covariance="full" if len(arrays[2]) >= 16 and not diagonal else "diagonal")

    monkeypatch.setattr(metrics, "class_frechet", by_size)
    found = measure(run, packed.parent / "workspace", out=tmp_path / "many")
    kinds = {name: row["class_covariance"] for name, row in rows_of(found).items()}
    assert kinds == {"generated": "full", "real": "full", "replay": None, **dict.fromkeys(RANDOM)}
    assert rows_of(found)["replay"]["class_distance"] is None
    few = measure(run, packed.parent / "workspace", out=tmp_path / "few", samples=12)
    assert {row["class_covariance"] for row in few.report["rows"]} == {"diagonal"}


@pytest.mark.parametrize(("text", "vision"), [(None, "none"), ("none", None), ("none", "none")])
def test_the_cost_of_what_is_attached_is_counted(
    copied: Path, tmp_path: Path, text: str | None, vision: str | None
) -> None:
    """None attaches the default, which took no time that is worth rounding; so each record is given a cost."""
    for path in (copied / "attachments").glob("*/*/stage.json"):
        record = read_json(path)
        write_json(path, {**record, "cost": {"seconds": 2.0 if record["kind"].startswith("text") else 3.0}})
    request = pack_request(copied, tmp_path / "shards", per_class=4, text=text, vision=vision)
    pipeline.pack(request)
    seconds = ledger.attachment_seconds(Workspace(copied), open_artifact(tmp_path / "shards"))
    assert seconds == {(None, "none"): 2.0, ("none", None): 3.0, ("none", "none"): None}[text, vision]


def test_a_rule_that_looks_at_features_costs_them_too(copied: Path, tmp_path: Path) -> None:
    pipeline.pack(pack_request(copied, tmp_path / "shards", per_class=4, method="kernel", text="none"))
    for kind, cost in (("features", 20.0), ("selection", 1.0), ("attachments", 3.0)):
        for path in (copied / kind).rglob("stage.json"):
            write_json(path, {**read_json(path), "cost": {"seconds": cost}})
    spent = ledger.costs(Workspace(copied), open_artifact(tmp_path / "shards"), None, 0.0)
    assert (spent["select"], spent["attach"]) == (21.0, 3.0)
