"""Rebuilding believes neither a recipe nor what already lies where the artifact goes."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import pack_request
from faults import INDEX, Copy
from formats_fixture import contents
from rebuilding_fixture import other_rounding, rebuild, receive, send, spoil

from d2c import pipeline, rebuilding
from d2c.errors import D2CError, UsageError
from d2c.rebuilding import RebuildRequest
from formats import IntegrityError, open_artifact, verify


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory, scored: Path) -> Path:
    return send(tmp_path_factory.mktemp("sent"), scored)


@pytest.fixture
def request_(sent: Path, tmp_path: Path, image_folder: Path, scorer: Path) -> RebuildRequest:
    return receive(sent, tmp_path, image_folder, scorer)


def no_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2c.packing._write_shards", None)
    monkeypatch.setattr("d2c.attachment._encode_parts", None)


def test_what_is_rebuilt_already_is_verified_and_not_made_again(
    request_: RebuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = rebuild(request_)
    before = contents(request_.out)
    no_encoding(monkeypatch)
    assert rebuilding.plan(request_).reasons == []
    assert rebuild(request_) == first
    assert contents(request_.out) == before


def test_an_array_that_was_changed_behind_sealed_hashes_is_found(
    request_: RebuildRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rebuild(request_)
    artifact = open_artifact(request_.out)
    copy = Copy(request_.out, tmp_path / "forged")
    data = bytearray(copy.read(copy.shards[0]))
    data[artifact.index["latent.offset"][0].as_py()] ^= 1
    copy.write(copy.shards[0], bytes(data))
    copy.seal()
    no_encoding(monkeypatch)
    with pytest.raises(IntegrityError, match="damaged"):
        rebuild(replace(request_, out=copy.root))


def claim(copy: Copy, rebuilt: Path) -> None:
    """Let an artifact say that it was rebuilt as ``rebuilt`` was."""
    claimed = open_artifact(rebuilt).manifest
    copy.seal(copy.manifest() | {name: claimed[name] for name in ("packed_from", "content_id")})


@pytest.mark.parametrize("vision", ["scorer", "none"])
def test_an_artifact_that_only_claims_to_be_rebuilt_is_not_believed(
    request_: RebuildRequest, scored: Path, tmp_path: Path, vision: str
) -> None:
    rebuild(request_)
    home = Path(shutil.copytree(scored, tmp_path / "home"))
    pipeline.pack(pack_request(home, tmp_path / "other", per_class=4, method="random", vision=vision))
    copy = Copy(tmp_path / "other", tmp_path / "forged")
    request = replace(request_, out=copy.root)
    copy.seal(copy.manifest() | {"packed_from": open_artifact(request_.out).manifest["packed_from"]})
    assert verify(copy.root, "deep").ok
    with pytest.raises(IntegrityError):
        rebuild(request)
    claim(copy, request_.out)
    with pytest.raises(IntegrityError):
        rebuild(request)
    assert rebuild(replace(request, overwrite=True)).identical


def test_an_approximate_artifact_is_not_taken_for_the_recipes(
    request_: RebuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as other:
        other_rounding(other)
        made = rebuild(replace(request_, approximate=True))
        assert rebuild(replace(request_, approximate=True)) == made
    shutil.rmtree(request_.workspace)
    assert rebuilding.plan(request_).reasons == ["approximate changed"]
    assert rebuild(request_).identical
    # What is the recipe's is good enough for whoever would take less.
    assert rebuilding.plan(replace(request_, approximate=True)).reasons == []
    assert rebuild(replace(request_, approximate=True)).identical


def test_another_copy_of_the_images_is_checked_anew(request_: RebuildRequest) -> None:
    rebuild(request_)
    spoil(request_, 3)
    assert rebuilding.plan(request_).reasons == ["source changed"]
    with pytest.raises(IntegrityError, match="not the one"):
        rebuild(request_)


def test_another_artifact_is_only_replaced_on_request(request_: RebuildRequest, packed: Path) -> None:
    shutil.copytree(packed, request_.out)
    before = contents(request_.out)
    with pytest.raises(D2CError, match="not rebuilt from this recipe") as caught:
        rebuilding.plan(request_)
    assert "--overwrite" in str(caught.value)
    assert contents(request_.out) == before
    plan = rebuilding.plan(replace(request_, overwrite=True))
    assert (plan.replaced, plan.reasons) == (open_artifact(packed).content_id, ["--overwrite"])
    assert rebuilding.run(plan).identical
    assert "packed_from" in open_artifact(request_.out).manifest


def test_a_manifest_that_cannot_be_read_is_not_replaced_either(request_: RebuildRequest) -> None:
    request_.out.mkdir()
    (request_.out / "manifest.json").write_text("[]")
    with pytest.raises(D2CError, match="not rebuilt from this recipe"):
        rebuilding.plan(request_)


@pytest.mark.parametrize("out", ["recipe", "recipe/rebuilt", "other/../recipe", "link", ".", "own/pets", "rebuild"])
def test_nothing_that_is_needed_is_replaced(request_: RebuildRequest, tmp_path: Path, out: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(request_.recipe)
    before = contents(request_.recipe)
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="would take the place of"):
            rebuilding.plan(replace(request_, out=tmp_path / out, overwrite=overwrite))
    assert contents(request_.recipe) == before


def test_own_scores_are_not_replaced(request_: RebuildRequest, workspace: Path) -> None:
    before = contents(workspace)
    with pytest.raises(D2CError, match="scores of your own"):
        rebuilding.plan(replace(request_, workspace=workspace))
    assert contents(workspace) == before


HOSTILE: dict[str, Any] = {
    "seeds.pack": lambda m: m["seeds"].pop("pack"),
    "seeds.pack is": lambda m: m["seeds"].update(pack=[1]),
    "preprocess.size": lambda m: m["preprocess"].pop("size"),
    "preprocess.size is": lambda m: m["preprocess"].update(size="8"),
    "preprocess.size of": lambda m: m["preprocess"].update(size=10**9),
    "latent.size": lambda m: m["latent"].update(size=10**6),
    "latent.size unlike": lambda m: m["preprocess"].update(size=16),
    "latent.encoder": lambda m: m["latent"].pop("encoder"),
    "latent.codec": lambda m: m["latent"].update(codec="/etc/passwd"),
    "latent.codec rgb": lambda m: m["latent"].update(encoder="/etc/passwd"),
    "columns": lambda m: m.update(encoders={}),
    "encoders.vision": lambda m: m["encoders"].update(vision=[]),
    "encoders.vision.asked": lambda m: m["encoders"]["vision"].pop("asked"),
    "encoders.vision.column": lambda m: m["encoders"]["vision"].update(column="nothing"),
    "encoders.vision.column is": lambda m: m["encoders"]["vision"].update(column="latent"),
    "encoders.vision.grid": lambda m: m["encoders"]["vision"].update(grid=0),
    "encoders.vision.weights_xxh3": lambda m: m["encoders"]["vision"].update(weights_xxh3=None),
    "asked.grid": lambda m: m["encoders"]["vision"]["asked"].pop("grid"),
    "asked.grid of": lambda m: m["encoders"]["vision"]["asked"].update(grid=10**5),
    "asked.batch_size": lambda m: m["encoders"]["vision"]["asked"].update(batch_size=10**9),
    "asked.batch_size is": lambda m: m["encoders"]["vision"]["asked"].update(batch_size=True),
    "asked.precision": lambda m: m["encoders"]["vision"]["asked"].update(precision={"a": 1}),
    "asked.seed": lambda m: m["encoders"]["vision"]["asked"].update(seed=2**80),
    "asked.vision": lambda m: m["encoders"]["vision"]["asked"].update(vision=7),
    "selection.scorer": lambda m: m["selection"].update(scorer=None),
    "selection.scores.objective": lambda m: m["selection"]["scores"].update(objective="x"),
    "licence.spdx": lambda m: m["licence"].update(spdx=7),
    "class_tables": lambda m: m["class_tables"][0].update(name="../../../outside"),
    "file of this machine": lambda m: m["encoders"]["vision"]["asked"].update(vision="timm:vit_tiny:/etc/passwd"),
    "file of this machine, a tag": lambda m: m["encoders"]["vision"]["asked"].update(vision="open_clip:ViT-B-32:../w"),
    "file of this machine, here": lambda m: m["encoders"]["vision"]["asked"].update(vision="open_clip:ViT-B-32:here"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_recipe_that_cannot_be_meant_is_refused(
    request_: RebuildRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").touch()
    copy = Copy(request_.recipe, tmp_path / "hostile")
    manifest = copy.manifest()
    HOSTILE[name](manifest)
    copy.seal(manifest)
    open_artifact(copy.root)
    with pytest.raises(IntegrityError) as caught:
        rebuilding.plan(replace(request_, recipe=copy.root))
    assert re.split(",? ", name)[0].removeprefix("file") in str(caught.value)


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"source_key": None}, "source_key"),
        ({"source_key": "the same"}, "source_key"),
        ({"source_xxh3": "../x"}, "source_xxh3"),
        ({"score": "high"}, "score"),
        ({"selection_rank": 2**40}, "selection_rank"),
    ],
)
def test_facts_that_cannot_be_meant_are_refused(
    request_: RebuildRequest, tmp_path: Path, facts: dict[str, Any], named: str
) -> None:
    copy = Copy(request_.recipe, tmp_path / "hostile")
    table = pq.read_table(copy.root / INDEX)
    changed = [json.loads(info) | facts for info in table["info"].to_pylist()]
    texts = [json.dumps({name: value for name, value in row.items() if value is not None}) for row in changed]
    place = table.schema.get_field_index("info")
    (copy.root / INDEX).unlink()
    pq.write_table(table.set_column(place, table.schema.field(place), [texts]), copy.root / INDEX)
    copy.seal()
    with pytest.raises(IntegrityError, match=named):
        rebuilding.plan(replace(request_, recipe=copy.root))
