"""Job arrays, second tries, limits, and the number of evaluations that a wanted reliability takes."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from d2c import pilot, score_pipeline, scoring
from d2c.difficulty import Difficulty
from d2c.errors import D2CError, UsageError
from d2c.images import BadImage
from d2c.progress import Silent
from d2c.score_pipeline import ScoreRequest
from d2c.scoring import ScoringConfig
from d2c.sources import Source, open_source, relabel
from d2c.workspace import BAD_FILES, SCORES
from d2c_cli import plans
from formats.files import read_table


def config(folder: Path, workspace: Path, scorer: Path, **options: Any) -> ScoringConfig:
    defaults: dict[str, Any] = {"codec": "rgb", "size": 8, "evals": 4, "batch_size": 8, "part": 16, "device": "cpu"}
    return ScoringConfig(source=folder, workspace=workspace, scorer=str(scorer), **{**defaults, **options})


def score(asked: ScoringConfig) -> scoring.Result:
    return scoring.run(scoring.plan(asked))


def share(asked: ScoringConfig, number: int, of: int) -> scoring.Share:
    return scoring.run_share(scoring.plan(replace(asked, share=(number, of))))


def outputs(result: scoring.Result) -> dict[str, bytes]:
    return {name: (result.path / name).read_bytes() for name in result.record.outputs}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, scorer: Path) -> scoring.Result:
    return score(config(image_folder, tmp_path_factory.mktemp("ws"), scorer))


def test_the_tasks_of_an_array_leave_what_one_process_does(
    tmp_path: Path, image_folder: Path, scorer: Path, undisturbed: scoring.Result
) -> None:
    asked = config(image_folder, tmp_path, scorer)
    done = [share(asked, number, 3).done for number in (3, 1, 2)]
    assert done == [2, 4, 6]
    assert not (tmp_path / "scores" / SCORES).exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "scores" / "parts").rglob("*.parquet")}
    assert outputs(score(asked)) == outputs(undisturbed)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert share(asked, 1, 3).done == 6


def test_tasks_that_start_at_the_same_moment_do_not_stop_each_other(
    tmp_path: Path, image_folder: Path, scorer: Path, undisturbed: scoring.Result
) -> None:
    asked = config(image_folder, tmp_path, scorer)
    plans = [scoring.plan(replace(asked, share=(number, 4))) for number in (1, 2, 3, 4)]
    tasks = [threading.Thread(target=scoring.run_share, args=(plan,)) for plan in plans]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    assert outputs(score(asked)) == outputs(undisturbed)


def test_a_share_that_cannot_be_is_a_usage_error(tmp_path: Path, image_folder: Path, scorer: Path) -> None:
    for wrong in ((0, 3), (4, 3)):
        with pytest.raises(UsageError, match="1/N to N/N"):
            config(image_folder, tmp_path, scorer, share=wrong)
    request = ScoreRequest(source=image_folder, workspace=tmp_path, scorer="train", share=(1, 2), device="cpu")
    with pytest.raises(UsageError, match="one scorer"):
        score_pipeline.score(request)


def test_images_that_could_not_be_read_are_tried_again_and_nothing_else(
    tmp_path: Path, image_folder: Path, scorer: Path, undisturbed: scoring.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(image_folder, tmp_path, scorer)
    read = Source.read

    def broken(self: Source, index: int) -> bytes:
        if index in (20, 70):
            raise BadImage("the disk was away")
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Source, "read", broken)
        first = score(asked)
    assert read_table(first.path / BAD_FILES).num_rows == 2
    assert scoring.plan(asked).reasons == []
    plan = scoring.plan(replace(asked, retry_bad=True))
    assert plan.reasons == ["2 parts with unreadable images are tried again"]
    before = {path.name: path.stat().st_mtime_ns for path in (first.path / "parts").rglob("*.parquet")}
    again = scoring.run(plan)
    assert outputs(again) == outputs(undisturbed)
    after = {path.name: path.stat().st_mtime_ns for path in (first.path / "parts").rglob("*.parquet")}
    assert sum(after[name] == stamp for name, stamp in before.items()) == len(before) - 2
    assert scoring.plan(replace(asked, retry_bad=True)).reasons == []


@pytest.mark.parametrize(("limit", "fails"), [(1, True), (2, False), (0.01, True), (0.05, False)])
def test_more_bad_images_than_allowed_stop_the_scoring_before_it_counts(
    tmp_path: Path, image_folder: Path, scorer: Path, limit: float, fails: bool
) -> None:
    damaged = Path(shutil.copytree(image_folder, tmp_path / "pets"))
    for name in ("cat/000.png", "dog/001.png"):
        (damaged / name).write_bytes(b"")
    asked = config(damaged, tmp_path / "ws", scorer, max_bad=limit)
    if not fails:
        assert score(asked).record.summary["bad_files"] == 2
        return
    with pytest.raises(D2CError, match=r"2 of 95(.|\n)*cat/000\.png"):
        score(asked)
    assert read_table(tmp_path / "ws" / "scores" / BAD_FILES).num_rows == 2
    assert score(replace(asked, max_bad=None)).record.summary["images"] == 93


def test_the_pilot_takes_the_fewest_evaluations_that_agree_and_says_what_it_tried(
    tmp_path: Path, image_folder: Path, scorer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pilot, "CANDIDATES", (2, 4, 16))
    asked = config(image_folder, tmp_path, scorer).settings
    source = open_source(image_folder)
    low, high = (pilot.run(asked, source, target, Silent()) for target in (-1.0, 2.0))
    assert (low.evals, low.reached, len(low.tried)) == (pilot.CANDIDATES[0], True, 1)
    assert (high.evals, high.reached) == (pilot.CANDIDATES[-1], False)
    found = [one["rank_correlation"] for one in high.tried]
    assert found[-1] > found[0]
    assert pilot.run(asked, source, 2.0, Silent()) == high


def test_the_pilot_passes_over_what_cannot_be_read(tmp_path: Path, image_folder: Path, scorer: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    source = open_source(folder)
    (folder / source.keys[0]).write_bytes(b"no picture")
    asked = config(folder, tmp_path / "ws", scorer, batch_size=1, estimator="paper").settings
    assert pilot.run(asked, open_source(folder), -1.0, Silent()).images == len(source) - 1
    for key in source.keys:
        (folder / key).write_bytes(b"no picture")
    with pytest.raises(D2CError, match="none of the images to try can be read"):
        pilot.run(asked, open_source(folder), -1.0, Silent())


def test_a_target_chooses_the_evaluations_once(tmp_path: Path, image_folder: Path, scorer: Path) -> None:
    request = ScoreRequest(
        source=str(image_folder), workspace=tmp_path, scorer=str(scorer), target_rank_corr=0.3, size=8, device="cpu"
    )
    planned = plans.score(request)
    assert [step["stage"] for step in planned["steps"] if step["would_run"]] == ["choose the evaluations", "score"]
    assert planned["evaluations"] is None
    result, steps = score_pipeline.score(request)
    assert [step.stage for step in steps if step.ran] == ["choose the evaluations", "score"]
    assert isinstance(result, scoring.Result)
    assert result.record.config["evals"] == steps[0].facts["evals"]
    _, again = score_pipeline.score(request)
    assert not any(step.ran for step in again)
    planned = plans.score(request)
    assert not any(step["would_run"] for step in planned["steps"])
    assert planned["evaluations"] == result.record.summary["images"] * steps[0].facts["evals"]
    with pytest.raises(UsageError, match="between 0 and 1"):
        score_pipeline.score(replace(request, target_rank_corr=1.5))


def test_parts_of_other_settings_never_meet_in_one_table(tmp_path: Path, image_folder: Path, scorer: Path) -> None:
    # A straggler of an earlier job still writes while the job with other settings runs.
    first = config(image_folder, tmp_path, scorer, seed=0)
    straggler = scoring.plan(replace(first, share=(1, 2)))
    second = config(image_folder, tmp_path, scorer, seed=1)
    share(second, 2, 2)
    scoring.run_share(straggler)
    mixed = outputs(score(second))
    assert mixed == outputs(score(config(image_folder, tmp_path / "alone", scorer, seed=1)))
    # And what the straggler has done is not lost.
    assert share(first, 2, 2).done == 6


def test_tasks_that_try_bad_images_again_leave_each_others_parts(
    tmp_path: Path, image_folder: Path, scorer: Path
) -> None:
    folder = Path(shutil.copytree(image_folder, tmp_path / "pets"))
    for file in sorted(folder.rglob("*.png"))[::8]:
        file.write_bytes(b"no picture")
    asked = config(folder, tmp_path / "ws", scorer)
    score(asked)
    again = replace(asked, retry_bad=True)
    total = len(scoring.plan(asked).parts)
    share(again, 1, 2)
    assert share(again, 2, 2).done == total


def test_a_source_that_changes_before_the_work_begins_is_an_error(
    tmp_path: Path, image_folder: Path, scorer: Path
) -> None:
    folder = Path(shutil.copytree(image_folder, tmp_path / "pets"))
    planned = scoring.plan(config(folder, tmp_path / "ws", scorer))
    shutil.copy(folder / "cat" / "000.png", folder / "cat" / "new.png")
    with pytest.raises(D2CError, match="changed while it was being scored"):
        scoring.run(planned)


def test_the_tasks_of_an_array_do_not_all_choose_the_evaluations(
    tmp_path: Path, image_folder: Path, scorer: Path
) -> None:
    request = ScoreRequest(
        source=str(image_folder), workspace=tmp_path, scorer=str(scorer), codec="rgb", size=8, device="cpu",
        target_rank_corr=0.5, share=(1, 2),
    )  # fmt: skip
    with pytest.raises(UsageError, match="share one number of evaluations"):
        score_pipeline.score(request)


def test_the_limit_on_bad_images_holds_for_finished_scores_too(
    tmp_path: Path, image_folder: Path, scorer: Path
) -> None:
    folder = Path(shutil.copytree(image_folder, tmp_path / "pets"))
    (folder / "cat" / "000.png").write_bytes(b"no picture")
    asked = config(folder, tmp_path / "ws", scorer)
    score(asked)
    with pytest.raises(D2CError, match="more images than allowed"):
        score(replace(asked, max_bad=0))
    assert not scoring.plan(asked).reasons


@pytest.mark.parametrize("scorer_is_trained", [False, True])
def test_a_mended_file_costs_its_part_alone(
    tmp_path: Path, image_folder: Path, scorer: Path, scorer_is_trained: bool
) -> None:
    folder = Path(shutil.copytree(image_folder, tmp_path / "pets"))
    whole = (folder / "dog" / "003.png").read_bytes()
    (folder / "dog" / "003.png").write_bytes(whole[:40])
    request = ScoreRequest(
        source=str(folder), workspace=tmp_path / "ws", scorer=None if scorer_is_trained else str(scorer), codec="rgb",
        size=8, evals=2, scorer_steps=2, device="cpu", batch_size=8,
    )  # fmt: skip
    patched = pytest.MonkeyPatch()
    patched.setattr("d2c.score_pipeline.scoring_config", partial(_small_parts, score_pipeline.scoring_config))
    try:
        first, _ = score_pipeline.score(request)
        assert first.record.summary["bad_files"] == 1
        before = {path.name for path in (first.path / "parts").rglob("*.parquet")}
        (folder / "dog" / "003.png").write_bytes(whole)
        again, _ = score_pipeline.score(replace(request, retry_bad=True))
    finally:
        patched.undo()
    assert (again.record.summary["bad_files"], again.record.summary["images"]) == (0, 95)
    after = {path.name for path in (first.path / "parts").rglob("*.parquet")}
    assert len(after - before) == len(before - after) == 1
    assert len(after) == 6


def _counted(patch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the scorer was given from now on."""
    given: list[int] = []
    tables = Difficulty.tables

    def count(self: Difficulty, indices: list[int]) -> Any:
        given.append(len(indices))
        return tables(self, indices)

    patch.setattr(Difficulty, "tables", count)
    return given


@pytest.mark.parametrize("scorer_is_trained", [False, True])
def test_a_copy_under_other_times_keeps_its_scores_and_its_scorer(
    tmp_path: Path, image_folder: Path, scorer: Path, scorer_is_trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(image_folder, tmp_path / "pets"))
    (folder / "dog" / "003.png").write_bytes(b"no picture")
    request = ScoreRequest(
        source=str(folder), workspace=tmp_path / "ws", scorer=None if scorer_is_trained else str(scorer), codec="rgb",
        size=8, evals=2, scorer_steps=2, device="cpu", batch_size=8,
    )  # fmt: skip
    monkeypatch.setattr("d2c.score_pipeline.scoring_config", partial(_small_parts, score_pipeline.scoring_config))
    first, _ = score_pipeline.score(request)
    copy = Path(shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile))
    moved = replace(request, source=str(copy))
    if scorer_is_trained:
        planned, *_ = plans.score(moved)["steps"]
        assert planned["reasons"] == ["source changed: trained anew unless its images are the same"]
    given = _counted(monkeypatch)
    again, steps = score_pipeline.score(moved)
    assert given == []
    assert [step.stage for step in steps if step.ran] == ["score"]
    assert outputs(again) == outputs(first)
    assert again.record.digest == first.record.digest
    assert again.record.cost["seconds"] >= first.record.cost["seconds"] > 0
    assert not [step for step in score_pipeline.score(moved)[1] if step.ran]

    # Of the same size, so that only the content tells.
    whole = (copy / "cat" / "004.png").read_bytes()
    (copy / "cat" / "004.png").write_bytes(whole[:-20] + bytes(20))
    _, steps = score_pipeline.score(moved)
    assert sum(given) == (95 if scorer_is_trained else 16)
    assert [step.stage for step in steps if step.ran] == [*["train the scorer"] * scorer_is_trained, "score"]


def test_a_scorer_without_its_shards_is_trained_again_for_a_copy(tmp_path: Path, image_folder: Path) -> None:
    request = ScoreRequest(
        source=str(image_folder), workspace=tmp_path / "ws", codec="rgb", size=8, evals=2, scorer_steps=2, device="cpu"
    )
    score_pipeline.score(request)
    (shards,) = (tmp_path / "ws" / "scorer").glob("*/shards")
    shutil.rmtree(shards)
    copy = Path(shutil.copytree(image_folder, tmp_path / "copy", copy_function=shutil.copyfile))
    _, steps = score_pipeline.score(replace(request, source=str(copy)))
    assert [step.stage for step in steps if step.ran] == ["train the scorer", "score"]


def test_what_could_not_be_used_and_now_can_is_no_copy(
    tmp_path: Path, image_folder: Path, scorer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(image_folder, tmp_path / "pets"))
    (folder / "dog" / "003.png").write_bytes(b"no picture")
    score(config(folder, tmp_path / "ws", scorer))
    copy = Path(shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile))
    shutil.copy(image_folder / "dog" / "003.png", copy / "dog" / "003.png")
    given = _counted(monkeypatch)
    again = score(config(copy, tmp_path / "ws", scorer))
    assert given == [16]
    assert (again.record.summary["images"], again.record.summary["bad_files"]) == (95, 0)


def test_the_same_files_under_other_labels_are_scored_again(
    tmp_path: Path, image_folder: Path, scorer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(image_folder, tmp_path, scorer)
    score(asked)
    plan = scoring.plan(asked)
    other = relabel(plan.source, 1 - plan.source.labels.clip(0, 1), [known.name for known in plan.source.classes])
    monkeypatch.setattr(scoring, "open_scored", lambda _: other)
    given = _counted(monkeypatch)
    scoring.run(scoring.plan(asked, other))
    assert sum(given) == 95


def test_another_scorer_is_trained_where_another_is_asked_for(tmp_path: Path, image_folder: Path) -> None:
    request = ScoreRequest(
        source=str(image_folder), workspace=tmp_path, codec="rgb", size=8, evals=2, scorer_steps=2, device="cpu"
    )
    _, first = score_pipeline.score(request)
    _, again = score_pipeline.score(replace(request, scorer_steps=3, retry_bad=True))
    assert [step.stage for step in again] == [step.stage for step in first] == ["train the scorer", "score"]
    assert all(step.ran for step in again)


def _small_parts(make: Any, *given: Any) -> ScoringConfig:
    return replace(make(*given), part=16)
