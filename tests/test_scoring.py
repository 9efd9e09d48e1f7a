"""Score: the number itself, and that neither processes nor kills change a byte of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing import run_and_kill

from d2c import scoring
from d2c.batches import load
from d2c.errors import D2CError
from d2c.estimator import noise_of, timesteps_of
from d2c.picks import class_indices
from d2c.progress import Progress
from d2c.scorers import load_denoiser
from d2c.scoring import ScoringConfig
from d2c.sources import open_source
from d2c.workspace import BAD_FILES, SCORES
from formats.files import read_table, write_json


def config(folder: Path, workspace: Path, scorer: Path, **options: Any) -> ScoringConfig:
    defaults: dict[str, Any] = {"codec": "rgb", "size": 8, "evals": 4, "batch_size": 8, "part": 16, "device": "cpu"}
    return ScoringConfig(source=folder, workspace=workspace, scorer=str(scorer), **{**defaults, **options})


def score(asked: ScoringConfig, progress: Progress | None = None) -> scoring.Result:
    return scoring.run(scoring.plan(asked), progress)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, scorer: Path) -> scoring.Result:
    return score(config(image_folder, tmp_path_factory.mktemp("ws"), scorer))


def outputs(result: scoring.Result) -> dict[str, bytes]:
    return {name: (result.path / name).read_bytes() for name in result.record.outputs}


def test_the_score_is_the_mean_denoising_loss(undisturbed: scoring.Result, image_folder: Path, scorer: Path) -> None:
    source = open_source(image_folder)
    denoiser = load_denoiser(str(scorer))
    batch = next(iter(load(source, range(5), 8, batch=5)))
    x = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = torch.zeros(5)
    with torch.no_grad():
        for j in range(4):
            t = timesteps_of("stratified", 0, j, 4, source.keys[:5])
            eps = noise_of("stratified", 0, j, source.keys[:5], (3, 8, 8))
            z = (1 - t).view(-1, 1, 1, 1) * x + t.view(-1, 1, 1, 1) * eps
            velocity = denoiser.model(z, t, torch.from_numpy(source.labels[:5]).long())
            expected += ((eps - x) - velocity).square().flatten(1).mean(1) / 4
    table = read_table(undisturbed.path / SCORES).slice(0, 5)
    assert table["key"].to_pylist() == source.keys[:5]
    np.testing.assert_allclose(table["score"].to_numpy(), expected.numpy(), rtol=1e-5)


def test_every_image_has_one_row_and_its_content_hash(undisturbed: scoring.Result, image_folder: Path) -> None:
    from formats.hashing import xxh3_file

    table = read_table(undisturbed.path / SCORES)
    assert table["key"].to_pylist() == open_source(image_folder).keys
    row = table.slice(50, 1).to_pylist()[0]
    assert row["xxh3"] == xxh3_file(image_folder / row["key"])
    assert (row["width"], row["height"], row["bytes"]) == (8, 8, (image_folder / row["key"]).stat().st_size)


@pytest.mark.parametrize("estimator", ["stratified", "paper"])
def test_two_processes_write_the_bytes_of_one(tmp_path: Path, image_folder: Path, scorer: Path, estimator: str) -> None:
    one = score(config(image_folder, tmp_path / "1", scorer, estimator=estimator))
    two = score(config(image_folder, tmp_path / "2", scorer, estimator=estimator, gpus=2))
    assert outputs(one) == outputs(two)


def run(asked: ScoringConfig, progress: Progress) -> None:
    score(asked, progress)


def test_another_batch_size_changes_scores_by_rounding_only(
    tmp_path: Path, image_folder: Path, scorer: Path, undisturbed: scoring.Result
) -> None:
    other = score(config(image_folder, tmp_path, scorer, batch_size=5))
    found, expected = (read_table(result.path / SCORES)["score"].to_numpy() for result in (other, undisturbed))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_killed_and_run_again_it_writes_the_same_bytes(
    tmp_path: Path, image_folder: Path, scorer: Path, undisturbed: scoring.Result
) -> None:
    asked = config(image_folder, tmp_path, scorer)
    run_and_kill(run, asked, "score", after=40)
    plan = scoring.plan(asked)
    parts = sorted(path.name for path in (tmp_path / "scores" / "parts").rglob("*.parquet"))
    assert plan.reasons == ["an interrupted run is resumed"]
    assert len(parts) == 2
    assert outputs(scoring.run(plan)) == outputs(undisturbed)


def test_a_finished_scoring_is_left_alone_and_a_changed_option_says_what_changed(
    tmp_path: Path, image_folder: Path, scorer: Path
) -> None:
    asked = config(image_folder, tmp_path, scorer)
    first = score(asked)
    before = (first.path / SCORES).stat().st_mtime_ns
    score(replace(asked, gpus=4, threads=1))
    assert (first.path / SCORES).stat().st_mtime_ns == before
    assert scoring.plan(replace(asked, evals=6)).reasons == ["evals: 4 -> 6"]


def test_what_a_gpu_scored_is_not_scored_again_where_there_is_none(
    tmp_path: Path, image_folder: Path, scorer: Path
) -> None:
    asked = config(image_folder, tmp_path, scorer)
    score(replace(asked, precision="bf16"))
    assert not scoring.plan(asked).reasons
    assert scoring.plan(replace(asked, precision="fp32")).reasons == ["precision: bf16 -> fp32"]
    assert scoring.plan(replace(asked, seed=1)).reasons == ["precision: bf16 -> fp32", "seed: 0 -> 1"]


def test_unreadable_images_are_recorded_with_their_reason_and_move_no_other_score(
    tmp_path: Path, image_folder: Path, scorer: Path, undisturbed: scoring.Result
) -> None:
    damaged = tmp_path / "pets"
    shutil.copytree(image_folder, damaged)
    (damaged / "cat" / "zzz-empty.png").write_bytes(b"")
    (damaged / "notes.png").write_bytes((image_folder / "cat" / "000.png").read_bytes())
    whole = (image_folder / "dog" / "003.png").read_bytes()
    (damaged / "sea lion" / "zzz-cut.png").write_bytes(whole[: len(whole) // 2])
    result = score(config(damaged, tmp_path / "ws", scorer))
    bad = {row["key"]: (row["stage"], row["reason"]) for row in read_table(result.path / BAD_FILES).to_pylist()}
    assert set(bad) == {"cat/zzz-empty.png", "notes.png", "sea lion/zzz-cut.png"}
    assert all(reason for _, reason in bad.values())
    table = read_table(result.path / SCORES)
    reference = read_table(undisturbed.path / SCORES)
    assert table["key"].equals(reference["key"])
    np.testing.assert_allclose(table["score"].to_numpy(), reference["score"].to_numpy(), rtol=1e-5)


def test_a_scorer_of_another_class_list_or_shape_is_refused(tmp_path: Path, image_folder: Path, scorer: Path) -> None:
    fewer = tmp_path / "pets"
    shutil.copytree(image_folder, fewer)
    shutil.rmtree(fewer / "cat")
    with pytest.raises(D2CError, match=r"another class list(.|\n)*--scorer train"):
        score(config(fewer, tmp_path / "a", scorer))
    with pytest.raises(D2CError, match=r"another shape(.|\n)*--size"):
        score(config(image_folder, tmp_path / "b", scorer, size=16))


def test_a_run_of_ours_knows_its_classes_by_name_and_not_by_number(
    tmp_path: Path, image_folder: Path, scorer: Path
) -> None:
    source = open_source(image_folder)
    named = Path(shutil.copytree(scorer, tmp_path / "run"))
    order = [{"source_id": name} for name in ("sea lion", "cat", "dog")]
    write_json(named / "run.json", {"classes": order})
    assert class_indices(source, load_denoiser(str(named))).tolist() == [1, 2, 0]
    write_json(named / "run.json", {"classes": [*order[:2], {"source_id": "wolf"}]})
    with pytest.raises(D2CError, match=r"unknown: dog(.|\n)*--scorer train"):
        score(config(image_folder, tmp_path / "ws", named))


def test_a_source_that_moved_is_found_again_without_scoring_it_again(
    tmp_path: Path, image_folder: Path, scorer: Path
) -> None:
    before = Path(shutil.copytree(image_folder, tmp_path / "before"))
    score(config(before, tmp_path / "ws", scorer))
    after = before.rename(tmp_path / "after")
    plan = scoring.plan(config(after, tmp_path / "ws", scorer))
    assert plan.reasons == []
    assert scoring.run(plan).record.summary["source"]["path"] == str(after)


def test_a_missing_scorer_names_the_ways_out(tmp_path: Path, image_folder: Path) -> None:
    with pytest.raises(D2CError, match=r"--scorer FILE(.|\n)*--scorer train"):
        score(config(image_folder, tmp_path, tmp_path / "nothing.pt"))


def test_no_readable_image_at_all_is_an_error(tmp_path: Path, scorer: Path) -> None:
    for name in ("cat", "dog", "sea lion"):
        (tmp_path / "bad" / name).mkdir(parents=True)
        (tmp_path / "bad" / name / "x.png").write_bytes(b"not an image")
    with pytest.raises(D2CError, match="no image could be read"):
        score(config(tmp_path / "bad", tmp_path / "ws", scorer))


def test_the_records_say_where_the_scores_came_from(undisturbed: scoring.Result, image_folder: Path) -> None:
    summary = undisturbed.record.summary
    assert summary["images"] == 95
    assert [(c["name"], c["count"]) for c in summary["classes"]] == [("cat", 40), ("dog", 30), ("sea lion", 25)]
    assert summary["source"]["name"] == "pets"
    assert summary["scorer"]["facts"]["model"] == "sit-tiny/2"
    assert 0 <= summary["rank_correlation"]["expected"] <= 1
    assert str(image_folder) not in (undisturbed.path / "classes.json").read_text()
