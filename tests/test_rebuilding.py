"""From a recipe and an own copy of the images back to the artifact, proved hash by hash."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pack_request
from formats_fixture import contents
from killing import run_and_kill
from rebuilding_fixture import other_rounding, rebuild, receive, send, spoil
from typer.testing import CliRunner

from d2c import packing, picks, pipeline, rebuilding
from d2c.errors import D2CError, UsageError
from d2c.rebuilding import RebuildRequest
from d2c.sit import SiT, model_spec
from d2c.sources import open_source
from d2c.tokens import save_array
from d2c_cli.app import app
from formats import IntegrityError, open_artifact, verify
from formats.describe import describe


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory, scored: Path) -> Path:
    return send(tmp_path_factory.mktemp("sent"), scored)


@pytest.fixture
def request_(sent: Path, tmp_path: Path, image_folder: Path, scorer: Path) -> RebuildRequest:
    return receive(sent, tmp_path, image_folder, scorer)


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
    (key,) = spoil(request_, 5)
    with pytest.raises(IntegrityError, match="this image is not the one that the recipe was made from") as caught:
        rebuild(request_)
    assert key in str(caught.value)
    assert "--source" in str(caught.value)
    assert "d2c score" not in str(caught.value)
    assert not request_.out.exists()


def test_all_images_are_checked_before_anything_is_encoded(request_: RebuildRequest) -> None:
    keys = spoil(request_, *range(12))
    with pytest.raises(IntegrityError, match="12 of 12") as caught:
        rebuild(request_)
    assert all(key in str(caught.value) for key in sorted(keys)[:3])
    assert not request_.workspace.exists()


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


def test_approximate_after_a_strict_failure_encodes_nothing_again(
    request_: RebuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_rounding(monkeypatch)
    with pytest.raises(IntegrityError, match="not the recipe's"):
        rebuild(request_)
    monkeypatch.setattr(packing, "_samples", lambda *_: pytest.fail("encoded again"))
    result = rebuild(replace(request_, approximate=True))
    assert not result.identical
    assert verify(request_.out, "deep").ok


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


def test_options_that_contradict_the_recipe_are_told_so(request_: RebuildRequest) -> None:
    for codec in ("vae", "rbg", "stabilityai/sd-vae-ft-ema"):
        with pytest.raises(UsageError, match="the recipe's codec is rgb"):
            rebuilding.plan(replace(request_, codec=codec))
    for vision in ("none", "dinov2"):
        for scorer in (request_.scorer, None):
            with pytest.raises(UsageError, match="has vision tokens that must be rebuilt"):
                rebuilding.plan(replace(request_, vision=vision, scorer=scorer))


@pytest.fixture
def with_vae(request_: RebuildRequest, tmp_path: Path) -> RebuildRequest:
    """A recipe of latents of a tiny VAE, in the sender's folder ``tiny``."""
    save_vae(tmp_path / "tiny", seed=0)
    config = packing.PackingConfig(
        workspace=tmp_path, out=tmp_path / "of-vae", selection="all", container="recipe", device="cpu"
    )
    source = open_source(request_.source)
    chosen = picks.everything(source, limit=6, seed=0)
    packing.run(packing.plan_source(config, source, chosen, str(tmp_path / "tiny"), 8))
    return replace(request_, recipe=config.out, scorer=None)


def save_vae(folder: Path, seed: int) -> None:
    import diffusers

    torch.manual_seed(seed)
    untyped: Any = diffusers
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    untyped.AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4).save_pretrained(folder)


def test_the_vae_is_named_by_the_receiver_and_checked(with_vae: RebuildRequest, tmp_path: Path) -> None:
    for codec, error, words in (
        (None, D2CError, "must not name[\\s\\S]*--codec"),
        ("rgb", UsageError, "the recipe's codec is vae"),
        ("rbg", UsageError, "no such VAE"),
    ):
        with pytest.raises(error, match=words):
            rebuilding.plan(replace(with_vae, codec=codec))
    save_vae(tmp_path / "other" / "tiny", seed=1)
    with pytest.raises(IntegrityError, match="not the recipe's"):
        rebuild(replace(with_vae, codec=str(tmp_path / "other" / "tiny")))
    assert rebuild(replace(with_vae, codec=str(tmp_path / "tiny"))).identical


def test_the_vae_may_lie_in_a_folder_of_another_name(with_vae: RebuildRequest, tmp_path: Path) -> None:
    (tmp_path / "tiny").rename(tmp_path / "mine")
    assert rebuild(replace(with_vae, codec=str(tmp_path / "mine"))).identical


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    # What `save_array` writes to before it renames.
    (tmp_path / f".tmp-{os.getpid()}-tokens.npy").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space") as caught:
        save_array(tmp_path / "tokens.npy", np.zeros((512, 512), np.float16))
    assert caught.value.errno == errno.ENOSPC
    save_array(tmp_path / "tokens.npy", np.arange(6, dtype=np.float16).reshape(2, 3))
    assert np.load(tmp_path / "tokens.npy", mmap_mode="r").tolist() == [[0, 1, 2], [3, 4, 5]]


def command(request: RebuildRequest, *more: str) -> Any:
    options = {"source": request.source, "workspace": request.workspace, "out": request.out, "scorer": request.scorer}
    named = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    args = ["rebuild", str(request.recipe), *named, "--device", "cpu", "--shards", "3", "--json", *more]
    return CliRunner().invoke(app, args, prog_name="d2c", catch_exceptions=False)


def test_a_dry_run_says_what_would_be_replaced_and_why(request_: RebuildRequest, packed: Path) -> None:
    said = json.loads(command(request_, "--dry-run").stdout)
    assert (said["out"], said["workspace"]) == (str(request_.out), str(request_.workspace))
    assert (said["replaces"], said["steps"][0]["reasons"]) == (None, ["not packed yet"])
    assert not request_.workspace.exists()
    shutil.copytree(packed, request_.out)
    assert command(request_, "--dry-run").exit_code == 1
    said = json.loads(command(request_, "--dry-run", "--overwrite").stdout)
    assert (said["replaces"], said["steps"][0]["reasons"]) == (open_artifact(packed).content_id, ["--overwrite"])


def test_the_command_counts_bytes_as_inspect_does(request_: RebuildRequest) -> None:
    said = json.loads(command(request_).stdout)["artifact"]
    assert said["bytes"] == describe(request_.out)["bytes"]
    assert json.loads(command(request_, "--dry-run").stdout)["steps"][0]["would_run"] is False
    spoil(request_, 1)
    assert command(request_).exit_code == 3
