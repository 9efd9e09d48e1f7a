"""Mirror images: stored beside the images with tokens of their own, and met in training together with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import pack_request
from rebuilding_fixture import rebuild
from safetensors.torch import save_file

from d2c import pipeline, training
from d2c.errors import D2CError, UsageError
from d2c.latents import open_codec
from d2c.loading import Loader
from d2c.rebuilding import RebuildRequest
from d2c.recipe import recipe
from d2c.scorers import load_denoiser
from d2c.vision import open_vision
from formats import open_artifact, verify
from formats.repack import Changes, repack

CPU = torch.device("cpu")
BOTH = ("orig", "hflip")


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory, scored: Path) -> Path:
    """As `packed`, with both views."""
    folder = tmp_path_factory.mktemp("mirrored")
    shutil.copytree(scored, folder / "workspace")
    pipeline.pack(pack_request(folder / "workspace", folder / "shards", per_class=4, views=BOTH))
    return folder / "shards"


def loader(path: Path, **options: Any) -> Loader:
    defaults: dict[str, Any] = {"batch_size": 12, "seed": 0, "device": CPU, "token_column": "scorer"}
    return Loader(open_artifact(path), **{**defaults, **options})


def test_the_mirror_images_have_latents_and_tokens_of_their_own(mirrored: Path, packed: Path, scorer: Path) -> None:
    artifact, plain = open_artifact(mirrored), open_artifact(packed)
    assert artifact.manifest["container"]["views"] == ["orig", "hflip"]
    assert plain.manifest["container"]["views"] == ["orig"]
    assert verify(mirrored, "deep").ok
    codec = open_codec("rgb", 8, CPU)
    encoder = open_vision("scorer", 4, CPU, scorer=load_denoiser(str(scorer)), codec=codec, seed=0)
    for row in range(len(artifact)):
        latent = artifact.array(row, "latent")
        assert artifact.info(row) == plain.info(row)
        np.testing.assert_array_equal(latent, plain.array(row, "latent"))
        np.testing.assert_array_equal(artifact.array(row, "latent_hflip"), latent[..., ::-1])
        pixels = np.ascontiguousarray(latent[0].transpose(1, 2, 0)[:, ::-1])[None]
        expected = encoder.encode(pixels, artifact.labels[row : row + 1].astype(np.int64))[0]
        # One image and a whole batch round their sums differently.
        np.testing.assert_allclose(artifact.values("scorer_hflip", [row])[0], expected, atol=4e-2)
        assert not np.allclose(artifact.values("scorer", [row])[0], expected, atol=4e-2)


def test_views_are_remembered_and_need_no_vision(workspace: Path, tmp_path: Path) -> None:
    pipeline.pack(pack_request(workspace, tmp_path / "a", per_class=2, views=BOTH, vision="none"))
    assert [column.name for column in open_artifact(tmp_path / "a").columns] == ["latent", "latent_hflip"]
    name = pipeline.current_selection(workspace)
    pipeline.attach(pack_request(workspace, tmp_path / "b", views=BOTH), name)
    pipeline.pack(pack_request(workspace, tmp_path / "b"))
    assert "scorer_hflip_scale" in [column.name for column in open_artifact(tmp_path / "b").columns]
    with pytest.raises(UsageError, match="cannot be seen in these views"):
        pipeline.pack(pack_request(workspace, tmp_path / "c", views=("hflip",)))


def test_another_codec_and_container_keep_both_views(mirrored: Path, tmp_path: Path) -> None:
    artifact = repack(mirrored, tmp_path / "p", Changes(container="parquet", tokens="u4-chrms1"))
    assert artifact.manifest["container"]["views"] == ["orig", "hflip"]
    codecs = {column.name: column.codec for column in artifact.columns}
    assert codecs["scorer"] == codecs["scorer_hflip"] == "u4-chrms1"


def test_a_recipe_of_both_views_is_rebuilt_to_the_byte(
    scored: Path, image_folder: Path, scorer: Path, tmp_path: Path
) -> None:
    shutil.copytree(scored, tmp_path / "workspace")
    pipeline.pack(
        pack_request(
            tmp_path / "workspace", tmp_path / "recipe", per_class=4, views=BOTH, container="recipe", licence="MIT"
        )
    )
    request = RebuildRequest(
        recipe=tmp_path / "recipe",
        source=str(shutil.copytree(image_folder, tmp_path / "own" / "pets")),
        workspace=tmp_path / "rebuild",
        out=tmp_path / "rebuilt",
        scorer=str(scorer),
        device="cpu",
        shards=3,
    )
    assert rebuild(request).identical
    assert open_artifact(tmp_path / "rebuilt").manifest["container"]["views"] == ["orig", "hflip"]


def test_a_class_token_is_stored_beside_the_patches(workspace: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", img_size=64, num_classes=7).state_dict(), tmp_path / "tiny.safetensors")
    vision = f"timm:test_vit:{tmp_path / 'tiny.safetensors'}"
    pipeline.pack(pack_request(workspace, tmp_path / "shards", per_class=2, vision=vision, tokens="fp16", views=BOTH))
    artifact = open_artifact(tmp_path / "shards")
    assert artifact.manifest["encoders"]["vision"]["class_token"]
    encoder = open_vision(vision, 4, CPU)
    for row in range(len(artifact)):
        pixels = artifact.array(row, "latent")[0].transpose(1, 2, 0)[None]
        for name, seen in (("", pixels), ("_hflip", pixels[:, :, ::-1])):
            whole = encoder.encode(np.ascontiguousarray(seen), np.zeros(1, np.int64))[0].astype(np.float32)
            np.testing.assert_allclose(artifact.array(row, f"test_vit_cls{name}"), whole[0], atol=1e-2)
            np.testing.assert_allclose(artifact.array(row, f"test_vit{name}"), whole[1:], atol=1e-2)


def test_a_mirrored_latent_never_comes_without_its_own_tokens(mirrored: Path) -> None:
    plain, grid, stored = (loader(mirrored, flip=flip) for flip in ("none", "grid", "stored"))
    turned = 0
    for step in range(20):
        one, two, three = plain.batch(step), grid.batch(step), stored.batch(step)
        assert torch.equal(two.raw, three.raw)  # in pixels the mirror image of the latent is that of the image
        assert torch.equal(one.labels, two.labels)
        assert one.tokens is not None
        assert two.tokens is not None
        assert three.tokens is not None
        for row in range(12):
            mirror = not torch.equal(one.raw[row], two.raw[row])
            turned += mirror
            assert torch.equal(two.raw[row], one.raw[row].flip(-1) if mirror else one.raw[row])
            tokens = one.tokens[row].view(4, 4, -1)
            assert torch.equal(two.tokens[row].view(4, 4, -1), tokens.flip(1) if mirror else tokens)
            assert torch.equal(three.tokens[row], one.tokens[row]) != mirror
    assert 90 < turned < 150  # of 240: half of them


@pytest.mark.parametrize("flip", ["grid", "stored"])
def test_mirrored_batches_are_the_same_on_any_ranks_and_from_disk(mirrored: Path, flip: Any) -> None:
    whole, mapped = loader(mirrored, flip=flip), loader(mirrored, flip=flip, budget=0.0)
    halves = [loader(mirrored, flip=flip, rank=rank, world=2) for rank in range(2)]
    for step in range(3):
        want, disk, parts = whole.batch(step), mapped.batch(step), [half.batch(step) for half in halves]
        for name in ("raw", "tokens"):
            assert torch.equal(getattr(disk, name), getattr(want, name))
            joined = torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1)
            assert torch.equal(joined, getattr(want, name))


def configured(artifact: Path, out: Path, *changes: str) -> training.TrainingConfig:
    numbers = recipe("small", steps=4, batch_size=6).changed(changes)
    return training.TrainingConfig(artifact=artifact, out=out, model="sit-tiny/2", recipe=numbers, device="cpu")


def test_training_refuses_mirror_images_that_are_not_there(packed: Path, mirrored: Path, tmp_path: Path) -> None:
    with pytest.raises(D2CError, match=r"holds no mirror images(.|\n)*--views orig,hflip(.|\n)*flip=grid"):
        training.plan(configured(packed, tmp_path / "run", "flip=stored"))
    losses = {
        flip: training.run(training.plan(configured(mirrored, tmp_path / flip, f"flip={flip}"))).loss
        for flip in ("none", "grid", "stored")
    }
    assert len(set(losses.values())) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("flips=grid", "no such field"),
        ("flip", "no such field"),
        ("name=mine", "no such field"),
        ("flip=both", "unknown flip"),
        ("steps=1.5", "steps cannot have this value"),
        ("lr=-1", "lr must be positive"),
        ("lr=nan", "lr must be finite"),
        ("lr=inf", "lr must be finite"),
        ("lr=fast", "lr cannot have this value(.|\n)*a number"),
        ("clip_norm=inf", "clip_norm must be finite"),
        ("weight_decay=1e999", "weight_decay must be finite"),
        ("weight_decay=-0.1", "weight_decay must not be negative"),
        ("betas=0.9", "betas cannot have this value(.|\n)*two numbers, such as 0.9,0.999"),
        ("betas=0.9,1.0", "betas is out of its range(.|\n)*less than 1"),
        ("betas=-0.1,0.9", "betas is out of its range"),
        ("betas=0.9,nan", "betas must be finite"),
        ("text=maybe", "text cannot have this value(.|\n)*true or false"),
        ("ema_decay=1.5", "ema_decay is out of its range"),
        ("ema_decay=1", "ema_decay is out of its range"),
        ("class_dropout=1", "class_dropout is out of its range"),
        ("spatial_norm=1.1", "spatial_norm is out of its range"),
        ("steps=1" + "0" * 400, "steps is too large"),
        ("align_until=2000000000", "align_until is too large"),
    ],
)
def test_a_field_that_a_recipe_does_not_have_is_refused(change: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe("d2c").changed([change])


def test_fields_of_a_recipe_can_be_changed_one_by_one() -> None:
    changed = recipe("d2c").changed(["lr=2e-4", "betas=0.9,0.95", "text=false", "flip=grid", "steps=7"])
    assert (changed.lr, changed.betas, changed.text, changed.flip, changed.steps) == (
        2e-4,
        (0.9, 0.95),
        False,
        "grid",
        7,
    )
    assert recipe("d2c") != changed
