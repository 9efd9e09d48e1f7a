"""Images without labels: one class or clusters, from scoring to a packed artifact and its recipe."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import pack_request

from d2c import clusters, labelling, pipeline, rebuilding, score_pipeline
from d2c.errors import UsageError
from d2c.score_pipeline import ScoreRequest
from d2c.workspace import CLASSES, SCORES, Workspace
from formats import open_artifact
from formats.files import read_json, read_table


@pytest.fixture(scope="module")
def heap(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """The pictures of `image_folder` in one folder, without labels."""
    root = tmp_path_factory.mktemp("data") / "heap"
    root.mkdir()
    for file in image_folder.rglob("*.png"):
        shutil.copy(file, root / f"{file.parent.name}-{file.name}")
    return root


def request(heap: Path, workspace: Path, labels: str) -> ScoreRequest:
    return ScoreRequest(
        source=str(heap), workspace=workspace, labels=labels, evals=2, scorer_steps=2, device="cpu", batch_size=32
    )


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory, heap: Path) -> Path:
    """A workspace in which `heap` is scored with clusters as classes."""
    workspace = tmp_path_factory.mktemp("clustered") / "workspace"
    score_pipeline.score(request(heap, workspace, "clusters:3"))
    return workspace


def test_clusters_become_the_classes_of_scores_and_selection(clustered: Path) -> None:
    assert [row["name"] for row in read_json(clustered / "scores" / CLASSES)] == [f"cluster {i:03d}" for i in range(3)]
    scores = read_table(clustered / "scores" / SCORES)
    source = labelling.reopen(Workspace(clustered))
    assert dict(zip(source.keys, source.labels.tolist(), strict=True)) == dict(
        zip(scores["key"].to_pylist(), scores["label"].to_pylist(), strict=True)
    )


def test_images_are_clustered_once(clustered: Path, heap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_k_means", lambda *_: pytest.fail("clustered again"))
    assert not labelling.clustering_due(str(heap), "clusters:3", Workspace(clustered), seed=0)
    _, steps = score_pipeline.score(request(heap, clustered, "clusters:3"))
    assert not steps[-1].ran
    assert labelling.clustering_due(str(heap), "clusters:4", Workspace(clustered), seed=0)


def test_tasks_of_a_job_array_do_not_all_cluster(tmp_path: Path, heap: Path) -> None:
    with pytest.raises(UsageError, match="share their clusters"):
        score_pipeline.score(replace(request(heap, tmp_path, "clusters:3"), share=(1, 2)))


def test_clusters_are_packed_without_text_and_rebuilt_from_their_recipe(
    tmp_path: Path, clustered: Path, heap: Path
) -> None:
    workspace = shutil.copytree(clustered, tmp_path / "workspace")
    pipeline.pack(pack_request(workspace, tmp_path / "shards", per_class=4, vision="scorer"))
    packed = open_artifact(tmp_path / "shards")
    assert packed.manifest["source"]["labels"] == "clusters:3"
    assert packed.manifest["encoders"]["text"] is None
    assert sorted(Counter(packed.labels.tolist()).values()) == [4, 4, 4]
    pipeline.pack(pack_request(workspace, tmp_path / "recipe", vision="scorer", container="recipe"))
    scorer = next((workspace / "scorer").glob("*/run"))
    asked = rebuilding.RebuildRequest(
        recipe=tmp_path / "recipe",
        source=str(shutil.copytree(heap, tmp_path / "copy")),
        workspace=tmp_path / "rebuild",
        out=tmp_path / "rebuilt",
        scorer=str(scorer),
        device="cpu",
        shards=3,
    )
    assert rebuilding.run(rebuilding.plan(asked)).identical


@pytest.mark.parametrize("labels", ["cluster:5", "clusters", "clusters:one", "Source"])
def test_other_labels_are_refused(labels: str, heap: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="clusters:K"):
        score_pipeline.score(request(heap, tmp_path, labels))


def test_one_class_for_all(tmp_path: Path, heap: Path) -> None:
    score_pipeline.score(request(heap, tmp_path / "ws", "none"))
    assert [row["count"] for row in read_json(tmp_path / "ws" / "scores" / CLASSES)] == [95]


def test_a_table_without_labels_is_scored_as_one_class(tmp_path: Path, heap: Path) -> None:
    files = sorted(heap.iterdir())
    pq.write_table(
        pa.table({"image": [{"bytes": f.read_bytes(), "path": f.name} for f in files]}), tmp_path / "t.parquet"
    )
    score_pipeline.score(request(tmp_path / "t.parquet", tmp_path / "ws", "none"))
    source = labelling.reopen(Workspace(tmp_path / "ws"))
    assert np.unique(source.labels).tolist() == [0]
    assert len(source) == 95
