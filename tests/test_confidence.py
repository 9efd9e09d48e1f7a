"""Confidence in `d2c select --method ot`: what it weighs, when it is computed, and what is told of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from d2c import confidence, discriminant, pipeline, scoring
from d2c.errors import D2CError, UsageError
from d2c.explaining import explain
from d2c.labelling import open_labelled
from d2c.pipeline import SelectRequest
from d2c.scoring import ScoringConfig
from d2c.selection import SelectionConfig, select
from d2c.selectors import METHODS, Candidates
from d2c.workspace import CROSS_ENTROPIES, SCORES, Workspace
from d2c_cli.app import app
from formats.files import read_table

NONE = np.zeros(0, dtype=np.int64)


def data(counts: list[int], dim: int = 8, seed: int = 0) -> tuple[pa.Table, np.ndarray]:
    """Scores and overlapping classes."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    features = (rng.normal(size=(len(counts), dim)) * 0.5)[labels] + rng.normal(size=(len(labels), dim))
    keys = [f"{label}/{i:04d}.png" for i, label in enumerate(labels.tolist())]
    table = pa.table({"key": keys, "label": pa.array(labels, pa.int32()), "score": rng.random(len(keys))})
    return table, features.astype(np.float16)


def config(**options: Any) -> SelectionConfig:
    return SelectionConfig(workspace=Path("workspace"), **{"method": "ot", "per_class": 6, **options})


def rows(table: pa.Table, picks: pa.Table) -> list[int]:
    places = {key: row for row, key in enumerate(table["key"].to_pylist())}
    return [places[key] for key in picks["key"].to_pylist()]


def own_features(workspace: Path, seed: int = 0) -> Path:
    """A table of features in which the classes of the workspace overlap."""
    scores = read_table(workspace / "scores" / SCORES)
    labels, rng = scores["label"].to_numpy(), np.random.default_rng(seed)
    values = (1.5 * np.eye(3, 6))[labels] + rng.normal(size=(len(labels), 6))
    path = workspace.parent / "mine.parquet"
    pq.write_table(pa.table({"key": scores["key"], "f": [row.tolist() for row in values]}), path)
    return path


def request(workspace: Path, **options: Any) -> SelectRequest:
    features = options.pop("features", None) or str(own_features(workspace))
    return SelectRequest(
        workspace=workspace, device="cpu", features=features, **{"method": "ot", "per_class": (4,), **options}
    )


# What is chosen


def test_the_more_confidence_counts_the_surer_the_classifier_is_of_the_picks() -> None:
    table, features = data([150, 150, 150])
    judged = discriminant.judge(features, table["label"].to_numpy()).cross_entropies
    means = [
        judged[rows(table, select(table, config(confidence=weight), 3, features))].mean()
        for weight in (0, 100, 1e3, 1e6)
    ]
    assert means[0] > means[1] > means[2] > means[3]
    # In the end nothing else counts.
    least = np.mean([np.sort(judged[150 * label : 150 * label + 150])[:6] for label in range(3)])
    assert means[3] == pytest.approx(least, rel=1e-3)


def test_a_weight_of_nothing_is_the_objective_without_confidence() -> None:
    table, features = data([60, 40])
    found = select(table, config(confidence=0.0), 2, features)
    for label, own in enumerate((range(60), range(60, 100))):
        part = features[own.start : own.stop].astype(np.float32)
        keys = table["key"].to_pylist()[own.start : own.stop]
        # Of a class alone: what was chosen before there was a classifier.
        alone = METHODS["ot"].select(Candidates(keys, np.zeros(len(keys)), part), 6, NONE)
        chosen = found.filter(pa.array(found["label"].to_numpy() == label))["key"].to_pylist()
        assert chosen == [keys[row] for row in alone]


def test_of_one_class_confidence_is_left_out() -> None:
    table, features = data([80])
    assert select(table, config(), 1, features).equals(select(table, config(confidence=0.0), 1, features))


def test_the_order_of_the_rows_does_not_change_the_classifier() -> None:
    table, features = data([50, 30, 1, 2])
    order = np.random.default_rng(0).permutation(83)
    shuffled = select(table.take(order), config(), 4, features[order])
    assert shuffled.equals(select(table, config(), 4, features))


def test_the_weight_names_a_selection_by_ot_only() -> None:
    assert config(confidence=1.0).name != config(confidence=2.0).name
    assert config(method="match", confidence=1.0).name == config(method="match", confidence=2.0).name
    assert not config(method="match").needs_confidence
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="weight"):
            config(confidence=wrong)


# When it is computed


def test_the_classifier_is_fitted_once_and_only_where_it_is_weighed(workspace: Path) -> None:
    asked = request(workspace)
    results, steps = pipeline.select(replace(asked, per_class=(3, 6)))
    assert [step.stage for step in steps] == ["embed", "classify", "select", "select"]
    judged = results[-1][1].record.summary["confidence"]
    assert judged["weight"] == 10
    assert 1 / 3 < judged["accuracy"] < 1
    assert judged["chance"] == pytest.approx(1 / 3)
    _, steps = pipeline.select(replace(asked, confidence=3.0))
    assert [step.ran for step in steps] == [False, False, True]
    results, steps = pipeline.select(replace(asked, confidence=0.0))
    assert [step.stage for step in steps] == ["embed", "select"]
    assert "confidence" not in results[-1][1].record.summary
    _, steps = pipeline.select(replace(asked, method="kernel"))
    assert [step.stage for step in steps] == ["embed", "select"]


def test_other_features_make_another_classifier(workspace: Path) -> None:
    asked = request(workspace)
    first = pipeline.select(asked)[0][-1][1]
    own_features(workspace, seed=1)
    results, steps = pipeline.select(asked)
    assert all(step.ran for step in steps)
    assert results[-1][1].record.inputs["confidence"] != first.record.inputs["confidence"]


def test_several_processes_choose_what_one_does(workspace: Path) -> None:
    asked = request(workspace)
    alone = pipeline.select(asked)[0][-1][1]
    shutil.rmtree(workspace / "confidence")
    both = pipeline.select(replace(asked, gpus=2, overwrite=True))[0][-1][1]
    assert alone.table.equals(both.table)
    assert alone.record.inputs == both.record.inputs


def test_a_kill_while_it_is_computed_leaves_nothing_behind(workspace: Path) -> None:
    asked = request(workspace)
    expected = pipeline.select(asked)[0][-1][1]
    stage = next((workspace / "confidence").iterdir())
    if stage.suffix == ".lock":
        stage = stage.with_suffix("")
    whole = (stage / CROSS_ENTROPIES).read_bytes()
    shutil.rmtree(workspace / "confidence")
    shutil.rmtree(workspace / "selection")
    # The process stops itself between writing the file and its record.
    script = (
        "import os, signal, sys\n"
        "from d2c import confidence\n"
        "save = confidence.save_array\n"
        "def stop(path, array):\n"
        "    save(path, array[:5])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "confidence.save_array = stop\n"
        "plan = confidence.plan(confidence.ConfidenceConfig(workspace=__import__('pathlib').Path(sys.argv[1]), "
        "features=sys.argv[2]))\n"
        "confidence.run(plan)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(workspace), stage.name], check=False)
    assert done.returncode == -9
    assert len(np.load(stage / CROSS_ENTROPIES)) == 5
    again, steps = pipeline.select(asked)
    assert [step.ran for step in steps] == [False, True, True]
    assert (stage / CROSS_ENTROPIES).read_bytes() == whole
    assert again[-1][1].table.equals(expected.table)


def test_scoring_again_fits_no_classifier_again(workspace: Path, image_folder: Path, scorer: Path) -> None:
    asked = request(workspace)
    pipeline.select(asked)
    more = ScoringConfig(
        source=str(image_folder), workspace=workspace, scorer=str(scorer), codec="rgb", size=8, evals=6, device="cpu"
    )
    scoring.run(scoring.plan(more))
    _, steps = pipeline.select(asked)
    assert [step.ran for step in steps] == [False, False, True]


# What is told


class Told:
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def __getattr__(self, name: str) -> Any:
        from d2c.progress import Silent

        return getattr(Silent(), name)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def warnings(asked: SelectRequest) -> list[str]:
    told = Told()
    pipeline.select(asked, told)  # type: ignore[arg-type]
    return told.warnings


def test_a_classifier_that_means_something_is_not_warned_of(workspace: Path) -> None:
    assert warnings(request(workspace)) == []


def test_features_that_were_told_the_class_are_warned_of_every_time(workspace: Path) -> None:
    for _ in range(2):
        found = warnings(request(workspace, features="scorer"))
        assert len(found) == 1
        assert "told each image's class" in found[0]


def test_a_classifier_no_better_than_chance_is_warned_of(workspace: Path, tmp_path: Path) -> None:
    keys = read_table(workspace / "scores" / SCORES)["key"]
    values = np.random.default_rng(0).normal(size=(95, 4))
    pq.write_table(pa.table({"key": keys, "f": [row.tolist() for row in values]}), tmp_path / "noise.parquet")
    assert "by chance" in warnings(request(workspace, features=str(tmp_path / "noise.parquet")))[0]


@pytest.mark.parametrize(("labels", "what"), [("none", "one class"), ("clusters:3", "clusters:3")])
def test_unlabelled_images_are_said_to_be(
    tmp_path: Path, image_folder: Path, scorer: Path, labels: str, what: str
) -> None:
    workspace, names = tmp_path / "workspace", ["image"]
    if labels != "none":
        source = open_labelled(str(image_folder), labels, Workspace(workspace), seed=0)
        names = [one.source_id for one in source.classes]
    (tmp_path / "map.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    asked = ScoringConfig(
        source=str(image_folder), workspace=workspace, scorer=str(scorer), codec="rgb", size=8, evals=2, device="cpu"
    )
    asked = replace(asked, labels=labels, class_map=tmp_path / "map.json")
    scoring.run(scoring.plan(asked))
    table = read_table(workspace / "scores" / SCORES)
    values = table["label"].to_numpy()[:, None] + np.random.default_rng(0).normal(size=(table.num_rows, 3))
    pq.write_table(pa.table({"key": table["key"], "f": [row.tolist() for row in values]}), tmp_path / "mine.parquet")
    found = warnings(request(workspace, features=str(tmp_path / "mine.parquet")))
    assert any(what in one for one in found)


def test_select_tells_how_good_the_classifier_is(workspace: Path) -> None:
    command = ["select", "--workspace", str(workspace), "--method", "ot", "--per-class", "3,5", "--device", "cpu"]
    command += ["--features", str(own_features(workspace))]
    planned = json.loads(CliRunner().invoke(app, [*command, "--dry-run", "--json"]).stdout)["steps"]
    assert [(step["stage"], step["reasons"]) for step in planned] == [
        ("embed", ["not run yet"]),
        ("classify", ["after embed"]),
        ("select", ["after classify"]),
        ("select", ["after classify"]),
    ]
    assert not (workspace / "confidence").exists()
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert told["confidence"]["accuracy"] > told["confidence"]["chance"]
    planned = json.loads(CliRunner().invoke(app, [*command, "--dry-run", "--json"]).stdout)["steps"]
    assert [step["would_run"] for step in planned] == [False] * 4


def test_explain_tells_how_sure_the_classifier_is(workspace: Path) -> None:
    made = pipeline.select(request(workspace))[0][-1][1]
    key = made.table["key"][0].as_py()
    told = explain(Workspace(workspace), key)
    name = made.record.config["features"]
    row = read_table(workspace / "scores" / SCORES)["key"].to_pylist().index(key)
    assert told["cross_entropy"] == confidence.load(Workspace(workspace), name)[row]
    assert told["class_mean_cross_entropy"] > 0


def test_a_selection_by_hand_says_what_it_lacks(workspace: Path) -> None:
    from d2c import embedding, selection

    plan = embedding.plan(embedding.EmbeddingConfig(workspace=workspace, encoder=str(own_features(workspace))))
    name = embedding.run(plan).name
    with pytest.raises(D2CError, match="no finished confidence") as caught:
        selection.plan(SelectionConfig(workspace=workspace, method="ot", per_class=3, features=name))
    assert "d2c select --method ot" in str(caught.value.hint)
