"""A model that was shown some classes only: no samples are asked for of the others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import pack_request

from d2c import fid, fid_pipeline, generation, pipeline, training, watching
from d2c.generator import balanced_labels, drawn_labels, random_labels
from d2c.recipe import recipe
from d2c.sampling import SamplerConfig
from formats import open_artifact
from formats.files import read_json
from formats.schema import ClassRow

SAMPLER = SamplerConfig(steps=2)


def rows(*counts: int) -> list[ClassRow]:
    return [ClassRow(number, str(number), str(number), "", count) for number, count in enumerate(counts)]


def test_labels_are_those_of_classes_with_images_or_of_all_where_nobody_counted() -> None:
    assert drawn_labels("balanced", 0, 5, rows(0, 4, 0, 1)).tolist() == [1, 3, 1, 3, 1]
    found = drawn_labels("random", 0, 1000, rows(0, 4, 0, 1))
    assert set(found.tolist()) == {1, 3}
    assert abs(np.mean(found == 1) - 0.5) < 0.08
    for counts in ((0, 0, 0), (5, 1, 2)):
        assert drawn_labels("balanced", 0, 50, rows(*counts)).tolist() == balanced_labels(50, 3).tolist()
        assert drawn_labels("random", 7, 50, rows(*counts)).tolist() == random_labels(7, 50, 3).tolist()


@pytest.fixture(scope="module")
def drawn_on_the_way() -> list[list[int]]:
    """Labels of the samples that the run draws of itself."""
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, scored: Path, drawn_on_the_way: list[list[int]]) -> Path:
    folder = tmp_path_factory.mktemp("partial")
    workspace = Path(shutil.copytree(scored, folder / "workspace"))
    wanted = pipeline.SelectRequest(workspace=workspace, total=(2,))
    chosen = pipeline.select(wanted)[0][0][0].config.name
    pipeline.pack(pack_request(workspace, folder / "shards", selected=chosen, vision="none"))
    assert [row.count for row in open_artifact(folder / "shards").classes].count(0) == 1
    config = training.TrainingConfig(
        artifact=folder / "shards", out=folder / "run", model="sit-tiny/2", device="cpu",
        recipe=recipe("small", steps=2, batch_size=2), watch_every=1,
    )  # fmt: skip
    draw = watching.draw

    def noted(*args: Any, **options: Any) -> Any:
        drawn_on_the_way.append(args[3].tolist())
        return draw(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watching, "draw", noted)
        return training.run(training.plan(config)).path


def known(run: Path) -> list[int]:
    return [row.id for row in open_artifact(run.parent / "shards").classes if row.count]


def test_a_run_draws_no_samples_of_classes_it_never_saw(run: Path, drawn_on_the_way: list[list[int]]) -> None:
    assert drawn_on_the_way
    assert drawn_on_the_way[0] == known(run) * (watching.SHOWN // 2)


@pytest.mark.parametrize("labels", ["balanced", "random"])
def test_sample_draws_none_either_and_its_record_says_so(run: Path, tmp_path: Path, labels: Any) -> None:
    config = generation.GenerationConfig(
        run=run, out=tmp_path, count=12, sampler=SAMPLER, labels=labels, npz=True, device="cpu"
    )
    result = generation.run(generation.plan(config))
    with np.load(result.path / generation.ARRAYS) as stored:
        assert set(stored["labels"].tolist()) == set(known(run))
    assert read_json(result.path / generation.RECORD)["asked"]["classes"] == "2 of 3"


def test_fid_measures_none_and_notes_it(run: Path) -> None:
    asked = fid.FidConfig(
        judged=run, workspace=run.parent / "workspace", samples=20, sampler=SAMPLER, subsets=0, device="cpu"
    )
    plan = fid.plan(asked)
    labels = np.concatenate([chunk.labels for chunk in plan.judged.chunks()])
    assert set(labels.tolist()) == set(known(run))
    report = fid_pipeline.measure(plan, 1, training.Silent()).report
    assert [note for note in report["notes"] if "images of 2 of 3 classes: only these were drawn" in note]
    with np.load(run / "fid" / fid_pipeline.SAMPLES / generation.ARRAYS) as stored:
        assert set(stored["labels"].tolist()) == set(known(run))
