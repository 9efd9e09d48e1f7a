"""From a recipe and an own copy of the images back to the artifact, proved hash by hash."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pack_request
from formats_fixture import contents
from killing import run_and_kill

from d2c import pipeline, rebuilding
from d2c.errors import D2CError, UsageError
from d2c.progress import Progress
from d2c.rebuilding import RebuildRequest
from d2c.sit import SiT, model_spec
from formats import IntegrityError, open_artifact, verify


@pytest.fixture
def request_(workspace: Path, tmp_path: Path, image_folder: Path, scorer: Path) -> RebuildRequest:
    """A recipe of four picks a class, and the receiver's own copy of images and scorer."""
    pipeline.pack(pack_request(workspace, tmp_path / "recipe", per_class=4, container="recipe", licence="MIT"))
    shutil.rmtree(workspace)
    return RebuildRequest(
        recipe=tmp_path / "recipe",
        source=Path(shutil.copytree(image_folder, tmp_path / "own" / "pets")),
        workspace=tmp_path / "rebuild",
        out=tmp_path / "rebuilt",
        scorer=str(scorer),
        device="cpu",
        shards=3,
    )


def rebuild(request: RebuildRequest, progress: Progress | None = None) -> rebuilding.Result:
    return rebuilding.run(rebuilding.plan(request), progress)


def test_a_rebuilt_artifact_has_the_content_id_of_the_sender(request_: RebuildRequest, packed: Path) -> None:
    result = rebuild(request_)
    assert result.identical
    assert result.content_id == open_artifact(packed).content_id
    assert verify(request_.out, "deep").ok
    found, sent = open_artifact(request_.out), open_artifact(packed)
    assert [found.info(i) for i in range(12)] == [sent.info(i) for i in range(12)]
    assert found.keys == sent.keys
    for name in ("encoders", "selection", "source", "seeds", "parents", "latent"):
        assert found.manifest[name] == sent.manifest[name]
    assert found.manifest["licence"] == {"spdx": "MIT", "source_terms": "", "images_included": True}


def test_without_vision_tokens_no_scorer_is_asked_for(request_: RebuildRequest, scored: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(scored, tmp_path / "home"))
    plain = pack_request(home, tmp_path / "plain", per_class=4, container="recipe", vision="none")
    pipeline.pack(plain)
    assert rebuild(replace(request_, recipe=plain.out, scorer=None)).identical


def test_an_image_that_is_not_the_senders_is_named(request_: RebuildRequest) -> None:
    key = open_artifact(request_.recipe).info(5)["source_key"]
    (request_.source / key).write_bytes((request_.source / key).read_bytes() + b"\0")
    with pytest.raises(D2CError, match=f"{key}") as caught:
        rebuild(request_)
    assert "xxh3" in str(caught.value)
    assert not request_.out.exists()


def test_missing_images_are_counted_before_anything_runs(request_: RebuildRequest) -> None:
    recipe = open_artifact(request_.recipe)
    for i in range(3):
        (request_.source / recipe.info(i)["source_key"]).unlink()
    with pytest.raises(D2CError, match="3 of 12 are missing"):
        rebuilding.plan(request_)


def test_other_classes_are_named(request_: RebuildRequest) -> None:
    (request_.source / "cat").rename(request_.source / "lynx")
    with pytest.raises(D2CError, match="lynx") as caught:
        rebuilding.plan(request_)
    assert "cat" in str(caught.value)


def test_the_scorer_is_asked_for_and_checked(request_: RebuildRequest, tmp_path: Path) -> None:
    with pytest.raises(D2CError, match="--scorer"):
        rebuilding.plan(replace(request_, scorer=None))
    other = Path(shutil.copytree(str(request_.scorer), tmp_path / "other"))
    from d2c import checkpoint

    model = SiT(model_spec("sit-tiny/2", 8, 3, 3))
    torch.nn.init.normal_(next(iter(model.parameters())))
    checkpoint.save_tensors(other / "ema.safetensors", model.state_dict())
    with pytest.raises(IntegrityError, match="not the recipe's"):
        rebuild(replace(request_, scorer=str(other)))


def other_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens as another machine might make them: nearly the same."""
    from d2c.scorer_tokens import ScorerTokens

    encode: Any = ScorerTokens.encode
    monkeypatch.setattr(ScorerTokens, "encode", lambda *args: (encode(*args) * 1.01).astype("f2"))


def test_arrays_that_differ_are_counted_and_nothing_is_left(
    request_: RebuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_rounding(monkeypatch)
    with pytest.raises(IntegrityError, match="scorer_scale: 12 of 12") as caught:
        rebuild(request_)
    assert "--approximate" in str(caught.value)
    assert "latent" not in str(caught.value)
    assert not request_.out.exists()


def test_approximate_keeps_them_as_a_child_of_the_recipe(
    request_: RebuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_rounding(monkeypatch)
    result = rebuild(replace(request_, approximate=True))
    assert not result.identical
    parent = open_artifact(request_.out).manifest["parents"][-1]
    assert (parent["operation"], parent["differing"]["latent"]) == ("rebuild", 0)
    assert parent["content_id"] == open_artifact(request_.recipe).content_id


def test_an_artifact_with_arrays_is_no_recipe(request_: RebuildRequest, packed: Path) -> None:
    with pytest.raises(UsageError, match="no recipe"):
        rebuilding.plan(replace(request_, recipe=packed))


@pytest.mark.parametrize("stage", ["attach", "pack"])
def test_killed_and_run_again_it_rebuilds_the_same_bytes(request_: RebuildRequest, tmp_path: Path, stage: str) -> None:
    run_and_kill(rebuild, request_, stage, after=5)
    assert not request_.out.exists()
    rebuild(request_)
    rebuild(replace(request_, out=tmp_path / "undisturbed", workspace=tmp_path / "other"))
    assert contents(request_.out) == contents(tmp_path / "undisturbed")
