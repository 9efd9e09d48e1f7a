"""Features for selectors: computed once for all scored images, by the scorer or from a user's own table."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from d2c import checkpoint, embedding, own_table, pipeline, scoring
from d2c.embedding import EmbeddingConfig
from d2c.errors import D2CError, UsageError
from d2c.pipeline import SelectRequest
from d2c.scoring import ScoringConfig
from d2c.sit import SiT, model_spec
from d2c.workspace import FEATURES, SCORES, Workspace
from formats.files import read_json, read_table, write_json


def config(workspace: Path, **options: object) -> EmbeddingConfig:
    return replace(EmbeddingConfig(workspace=workspace, device="cpu", batch_size=16), **options)  # type: ignore[arg-type]


def embed(asked: EmbeddingConfig) -> np.ndarray:
    name = embedding.run(embedding.plan(asked)).name
    return np.array(embedding.load(Workspace(asked.workspace), name))


def keys(workspace: Path) -> list[str]:
    return list(read_table(workspace / "scores" / SCORES)["key"].to_pylist())


def test_features_of_the_scorer_are_one_vector_an_image_and_computed_once(workspace: Path) -> None:
    found = embed(config(workspace))
    assert found.shape[0] == 95
    assert found.dtype == np.float16
    assert np.ptp(found.astype(np.float32), axis=0).max() > 0
    assert not embedding.plan(config(workspace)).reasons


def score(workspace: Path, images: Path, scorer: Path, **options: Any) -> None:
    asked: dict[str, Any] = {"codec": "rgb", "size": 8, "evals": 2, "device": "cpu", **options}
    scoring.run(scoring.plan(ScoringConfig(source=str(images), workspace=workspace, scorer=str(scorer), **asked)))


def test_the_scorers_features_follow_the_classes_that_it_is_told(
    workspace: Path, tmp_path: Path, image_folder: Path, scorer: Path
) -> None:
    names = [row["source_id"] for row in Workspace(workspace).classes()]
    write_json(tmp_path / "map.json", {name: (number + 1) % 3 for number, name in enumerate(names)})
    score(workspace, image_folder, scorer, class_map=tmp_path / "map.json")
    request = SelectRequest(workspace=workspace, method="kernel", per_class=(3,), device="cpu")
    pipeline.select(request)
    turned = embed(config(workspace))
    assert not embedding.plan(config(workspace)).reasons
    score(workspace, image_folder, scorer)
    assert embedding.plan(config(workspace)).reasons == ["classes changed"]
    assert [step.ran for step in pipeline.select(request)[1]] == [True, True]
    assert not np.array_equal(embed(config(workspace)), turned)


def test_features_of_any_encoder_follow_the_size_of_the_images(
    workspace: Path, tmp_path: Path, image_folder: Path
) -> None:
    save_file(timm.create_model("test_vit", img_size=64).state_dict(), tmp_path / "vit.safetensors")
    encoder = config(workspace, encoder=f"timm:test_vit:{tmp_path / 'vit.safetensors'}")
    at_eight = embed(encoder)
    smaller = tmp_path / "smaller"
    smaller.mkdir()
    spec = model_spec("sit-tiny/2", 4, 3, 3)
    write_json(smaller / "model.json", spec.to_dict())
    checkpoint.save_tensors(smaller / "ema.safetensors", SiT(spec).state_dict())
    pq.write_table(pa.table({"key": keys(workspace), "f": [[1.0]] * 95}), tmp_path / "mine.parquet")
    own = config(workspace, encoder=str(tmp_path / "mine.parquet"))
    embed(own)
    score(workspace, image_folder, smaller, size=4)
    assert embedding.plan(encoder).reasons == ["size changed"]
    assert not np.array_equal(embed(encoder), at_eight)
    # What the user brings was made of the images as the user had them.
    assert not embedding.plan(own).reasons


def test_any_number_of_processes_computes_the_same_bytes(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = embed(config(workspace))
    several = embed(config(workspace, gpus=2, overwrite=True))
    assert np.array_equal(alone, several)


def test_what_another_device_finished_is_taken_as_it_is(workspace: Path) -> None:
    on_gpu = embedding.run(embedding.plan(config(workspace, precision="bf16"))).name
    plan = embedding.plan(config(workspace))
    assert (plan.reasons, plan.stage.path.name) == ([], on_gpu)
    assert embedding.plan(config(workspace, precision="fp32")).reasons == ["not run yet"]
    embed(config(workspace, precision="fp32"))
    assert embedding.plan(config(workspace)).stage.path.name != on_gpu


def test_an_image_that_changed_since_it_was_scored_has_no_features(workspace: Path) -> None:
    source = Path(Workspace(workspace).scores.require("").summary["source"]["path"])
    own = workspace.parent / "own"
    shutil.copytree(source, own)
    Workspace(workspace).scores.refresh(
        source={**Workspace(workspace).scores.require("").summary["source"], "path": str(own)}
    )
    changed = keys(workspace)[3]
    Image.new("RGB", (20, 20), (9, 200, 30)).save(own / changed)
    with pytest.raises(D2CError, match=rf"changed since it was scored[\s\S]*{changed}"):
        embed(config(workspace))


def test_images_stored_in_another_order_half_way_are_noticed(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "_PART", 32)
    plan = embedding.plan(config(workspace))
    monkeypatch.setattr(embedding, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        embedding.run(plan)
    first, second, *_ = sorted((plan.stage.path / "parts").iterdir())
    shutil.copy(first, second)
    monkeypatch.undo()
    monkeypatch.setattr(embedding, "_PART", 32)
    with pytest.raises(D2CError, match=r"63 of 95 images have features"):
        embed(config(workspace))


def test_an_interrupted_pass_goes_on(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = embed(config(workspace))
    monkeypatch.setattr(embedding, "_PART", 32)
    asked = config(workspace, batch_size=8)
    plan = embedding.plan(asked)
    monkeypatch.setattr(embedding, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        embedding.run(plan)
    parts = sorted((plan.stage.path / "parts").iterdir())
    assert len(parts) == 3
    kept = [part.stat().st_mtime_ns for part in parts[1:]]
    parts[0].unlink()
    monkeypatch.undo()
    monkeypatch.setattr(embedding, "_PART", 32)
    again = embed(asked)
    assert [part.stat().st_mtime_ns for part in parts[1:]] == kept
    np.testing.assert_allclose(again.astype(np.float32), whole.astype(np.float32), rtol=2e-3, atol=2e-3)


def test_a_users_table_in_any_order_is_taken_by_key(workspace: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(95, 3)).astype(np.float32)
    order = np.random.default_rng(1).permutation(95)
    table = pa.table({"key": keys(workspace), "dino": [row.tolist() for row in values]}).take(order)
    pq.write_table(table, tmp_path / "mine.parquet")
    found = embed(config(workspace, encoder=str(tmp_path / "mine.parquet")))
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("method", ["k-center", "kernel", "ot"])
def test_a_users_features_keep_what_tells_them_apart(workspace: Path, tmp_path: Path, method: str) -> None:
    # The same points about 0 and about 1,000, where 16 bits tell apart steps of 0.5 alone.
    values = np.random.default_rng(0).integers(-64, 65, size=(95, 3)) / 512
    picked = []
    for mean in (0, 1000):
        pq.write_table(pa.table({"key": keys(workspace), "f": (values + mean).tolist()}), tmp_path / "mine.parquet")
        own = config(workspace, encoder=str(tmp_path / "mine.parquet"))
        np.testing.assert_array_equal(embed(own), values + mean)
        request = SelectRequest(
            workspace=workspace,
            method=method,
            per_class=(4,),
            features=own.encoder,
            confidence=0,
            device="cpu",
        )
        picked.append(pipeline.select(request)[0][0][1].table["key"].to_pylist())
    assert picked[0] == picked[1]


def test_rounded_features_of_an_earlier_state_are_read_again(workspace: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": keys(workspace), "f": [[1.0]] * 95}), tmp_path / "mine.parquet")
    own = config(workspace, encoder=str(tmp_path / "mine.parquet"))
    embed(own)
    record = read_json(embedding.plan(own).stage.path / "stage.json")
    del record["inputs"]["precision"]
    write_json(embedding.plan(own).stage.path / "stage.json", record)
    assert embedding.plan(own).reasons == ["precision changed"]


@pytest.mark.parametrize("rows", [7, 10, 4096])
def test_a_users_table_is_read_in_pieces(
    workspace: Path, tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_table, "ROWS", rows)
    values = np.random.default_rng(0).integers(-99, 99, size=(125, 3)).astype(np.float32)
    # The first group of rows, and others here and there, are of images that nobody scored.
    order = np.concatenate([np.arange(95, 115), np.random.default_rng(1).permutation([*range(95), *range(115, 125)])])
    named = [*keys(workspace), *(f"none/{i}.png" for i in range(30))]
    table = pa.table({"key": named, "f": values.tolist()}).take(order)
    pq.write_table(table, tmp_path / "mine.parquet", row_group_size=20)
    found = embed(config(workspace, encoder=str(tmp_path / "mine.parquet")))
    np.testing.assert_array_equal(found, values[:95])


@pytest.mark.parametrize(
    ("first", "wrong"),
    [
        (0, [[]]),
        (60, [[1.0]]),
        (94, [None]),
        (50, [[1.0, None]]),
        (50, [[1.0]] * 10),
        (50, [None] * 10),
        (0, [[]] * 10),
    ],
)
def test_a_wrong_row_is_noticed_in_whatever_piece_it_is(
    workspace: Path, tmp_path: Path, first: int, wrong: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_table, "ROWS", 10)
    values: list[Any] = [[1.0, 2.0]] * 95
    values[first : first + len(wrong)] = wrong
    pq.write_table(pa.table({"key": keys(workspace), "f": values}), tmp_path / "mine.parquet")
    plan = embedding.plan(config(workspace, encoder=str(tmp_path / "mine.parquet")))
    with pytest.raises(D2CError, match=r"one length|finite"):
        embedding.run(plan)
    assert not (plan.stage.path / FEATURES).exists()


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"key": pa.array([], pa.string()), "a": []}, "no table of features"),
        ({"name": ["x"], "f": [[1.0]]}, "names no images"),
        ({"key": [["x"]], "f": [[1.0]]}, "names no images"),
        ({"key": ["x", "y", "x"], "f": [[1.0]] * 3}, "images twice"),
        ({"key": [7], "f": [[1.0]]}, "lacks scored images"),
        ({"key": ["nothing.png"], "f": [[1.0]]}, "lacks scored images"),
    ],
)
def test_a_table_that_does_not_serve_says_why(
    workspace: Path, tmp_path: Path, columns: dict[str, Any], what: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "mine.parquet")
    with pytest.raises(D2CError, match=what):
        embed(config(workspace, encoder=str(tmp_path / "mine.parquet")))


@pytest.mark.parametrize(
    ("key", "lists"),
    [
        (pa.large_string(), pa.large_list(pa.float64())),
        (pa.dictionary(pa.int32(), pa.string()), pa.list_(pa.float32(), 3)),
        (pa.string(), pa.list_(pa.int16())),
    ],
)
def test_tables_as_polars_and_pandas_write_them_are_taken(
    workspace: Path, tmp_path: Path, key: pa.DataType, lists: pa.DataType
) -> None:
    values = np.random.default_rng(0).integers(-9, 9, size=(95, 3))
    named = pa.array(keys(workspace), pa.string()).cast(key)
    pq.write_table(pa.table({"key": named, "f": pa.array(values.tolist(), lists)}), tmp_path / "mine.parquet")
    found = embed(config(workspace, encoder=str(tmp_path / "mine.parquet")))
    np.testing.assert_array_equal(found, values)


def test_uneven_or_endless_features_are_refused(workspace: Path, tmp_path: Path) -> None:
    for values in ([[1.0, 2.0]] * 94 + [[1.0]], [[1.0]] * 94 + [[1e16]], [[1.0]] * 94 + [[1e60]]):
        pq.write_table(pa.table({"key": keys(workspace), "f": values}), tmp_path / "mine.parquet")
        with pytest.raises(D2CError, match=r"one length|finite"):
            embed(config(workspace, encoder=str(tmp_path / "mine.parquet")))


def test_a_missing_table_is_no_encoder(workspace: Path) -> None:
    with pytest.raises(D2CError, match="no such table"):
        embed(config(workspace, encoder="typo.parquet"))


def test_select_embeds_what_its_method_needs_and_nothing_else(workspace: Path) -> None:
    results, steps = pipeline.select(
        SelectRequest(workspace=workspace, method="moments", per_class=(3, 6), device="cpu")
    )
    assert [step.stage for step in steps] == ["embed", "select", "select"]
    small, large = (set(result.table["key"].to_pylist()) for _, result in results)
    assert (len(small), len(large)) == (9, 18)
    assert small < large
    assert Workspace(workspace).current("selection") == {"name": results[1][1].name}
    _, steps = pipeline.select(SelectRequest(workspace=workspace, method="kernel", per_class=(3,), device="cpu"))
    assert [step.ran for step in steps] == [False, True]
    _, steps = pipeline.select(SelectRequest(workspace=workspace, per_class=(3,), device="cpu"))
    assert [step.stage for step in steps] == ["select"]


def test_a_selection_by_images_in_several_processes_is_the_same(workspace: Path) -> None:
    request = SelectRequest(workspace=workspace, method="match", per_class=(4,), device="cpu")
    alone = pipeline.select(request)[0][0][1].table
    both = pipeline.select(replace(request, gpus=2, overwrite=True))[0][0][1].table
    assert alone.equals(both)


def test_two_kinds_of_budget_are_refused_before_anything_is_computed(workspace: Path) -> None:
    with pytest.raises(UsageError, match="one kind of budget"):
        pipeline.select(SelectRequest(workspace=workspace, method="ot", per_class=(3,), ratio=(0.1,)))
    assert not (workspace / "features").exists()


def test_scoring_with_more_evaluations_computes_no_features_again(
    workspace: Path, image_folder: Path, scorer: Path
) -> None:
    embed(config(workspace))
    score(workspace, image_folder, scorer, evals=6)
    assert not embedding.plan(config(workspace)).reasons
    assert (embedding.plan(config(workspace)).stage.path / FEATURES).exists()
