"""Attach and pack: what lands in the artifact, and that it is the same however it got there."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coded_fixture import agree, cost_of
from conftest import pack_request
from killing import run_and_kill
from PIL import Image

from d2c import attachment, packing, pipeline, selection
from d2c.errors import D2CError, UsageError
from d2c.images import center_crop, decode
from d2c.latents import LatentSpec, open_codec
from d2c.progress import Progress, Silent
from d2c.selection import Selection, SelectionConfig
from d2c.tokens import VisionTokens
from d2c.vision import open_vision
from d2c.workspace import Workspace
from formats import FormatError, IntegrityError, open_artifact


def chosen_by(workspace: Path, per_class: int) -> Selection:
    return selection.run(selection.plan(SelectionConfig(workspace=workspace, per_class=per_class)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_artifact_holds_the_picks_with_their_pixels(packed: Path, image_folder: Path) -> None:
    artifact = open_artifact(packed)
    assert len(artifact) == 12
    for row in range(len(artifact)):
        info = artifact.info(row)
        original = decode((image_folder / info["source_key"]).read_bytes())
        np.testing.assert_array_equal(
            artifact.array(row, "latent")[0], np.asarray(center_crop(original, 8)).transpose(2, 0, 1)
        )
        assert artifact.classes[artifact.labels[row]].name == info["source_key"].split("/")[0]


def test_the_picks_are_the_selections_and_carry_their_scores(packed: Path) -> None:
    artifact = open_artifact(packed)
    workspace = Workspace(packed.parent / "workspace")
    chosen = selection.load(workspace, pipeline.current_selection(workspace.path)).table
    scores = dict(zip(chosen["key"].to_pylist(), chosen["score"].to_pylist(), strict=True))
    infos = [artifact.info(row) for row in range(len(artifact))]
    assert {info["source_key"]: info["score"] for info in infos} == scores
    by_key = chosen.select(["key", "label", "rank"]).sort_by("key").to_pylist()
    assert artifact.selection == by_key
    assert "by key, each with its label and its rank in its class" in (packed / "README.md").read_text()


def test_every_image_has_the_tokens_of_its_own_pixels(packed: Path, scorer: Path) -> None:
    import torch

    from d2c.scorers import load_denoiser

    artifact = open_artifact(packed)
    column = artifact.manifest["encoders"]["vision"]["column"]
    device = torch.device("cpu")
    encoder = open_vision(
        "scorer", 4, device, scorer=load_denoiser(str(scorer)), codec=open_codec("rgb", 8, device), seed=0
    )
    for row in (0, 5, 11):
        pixels = artifact.array(row, "latent")[0].transpose(1, 2, 0)[None]
        expected = encoder.encode(np.ascontiguousarray(pixels), artifact.labels[row : row + 1].astype(np.int64))
        # One image and a whole batch round their sums differently; another image's tokens are far away.
        np.testing.assert_allclose(artifact.values(column, [row])[0], expected[0], atol=4e-2)


def test_text_is_stored_once_a_class_with_its_prompt(packed: Path) -> None:
    artifact = open_artifact(packed)
    assert [row.prompt for row in artifact.classes] == ["a photo of a cat", "a photo of a dog", "a photo of a sea lion"]
    assert artifact.table("text_embeds").shape == (3, 16, 256)
    assert artifact.table("text_mask").sum(1).tolist() == [5, 5, 6]


def test_the_manifest_says_where_all_of_it_came_from_and_names_no_path(packed: Path, tmp_path: Path) -> None:
    manifest = open_artifact(packed).manifest
    assert manifest["selection"]["method"] == "interval"
    assert manifest["selection"]["scorer"]["model"] == "sit-tiny/2"
    assert manifest["source"]["name"] == "pets"
    assert manifest["source"]["fingerprint"].startswith("xxh3-128:")
    assert LatentSpec.from_dict(manifest["latent"]).codec == "rgb"
    assert str(tmp_path.parent.parent) not in (packed / "manifest.json").read_text()


@pytest.mark.parametrize(("tokens", "least"), [("fp16", None), ("int8", 0.9998), ("int4", 0.97)])
def test_the_manifest_says_what_the_codec_cost_these_tokens(
    workspace: Path, tmp_path: Path, packed: Path, tokens: Any, least: float | None
) -> None:
    pipeline.pack(pack_request(workspace, tmp_path / "raw", per_class=4, tokens="fp16"))
    pipeline.pack(pack_request(workspace, tmp_path / "coded", per_class=4, tokens=tokens))
    raw, coded = open_artifact(tmp_path / "raw"), open_artifact(tmp_path / "coded")
    column = next(column for column in coded.columns if column.name == "scorer")
    if least is None:
        assert column.fidelity is None
        return
    assert column.fidelity is not None
    found = cost_of(raw.stack("scorer", range(12)), coded.values("scorer", range(12)))
    assert agree(column.fidelity, found)
    assert column.fidelity["p01"] >= least


def test_pixels_are_images_and_a_recipe_holds_none(workspace: Path, tmp_path: Path, packed: Path) -> None:
    pipeline.pack(pack_request(workspace, tmp_path / "r", per_class=4, container="recipe", licence="MIT"))
    recipe, whole = open_artifact(tmp_path / "r").manifest, open_artifact(packed).manifest
    assert recipe["licence"] == {"spdx": "MIT", "source_terms": "", "images_included": False}
    assert whole["licence"]["images_included"]
    assert recipe["content_id"] == whole["content_id"]


def test_a_selection_made_before_is_packed_by_name(workspace: Path, tmp_path: Path) -> None:
    chosen = [
        pipeline.select(pipeline.SelectRequest(workspace=workspace, total=(total,), method="random", device="cpu"))[0]
        for total in (3, 5)
    ]
    first = chosen[0][-1][1].name
    pipeline.pack(pack_request(workspace, tmp_path / "first", selected=first))
    assert len(open_artifact(tmp_path / "first")) == 3
    with pytest.raises(UsageError, match="--selection and a budget"):
        pipeline.pack(pack_request(workspace, tmp_path / "both", selected=first, per_class=4))
    with pytest.raises(D2CError, match=rf"no such selection[\s\S]*did you mean {first}"):
        pipeline.pack(pack_request(workspace, tmp_path / "none", selected=first[:-1]))


def test_two_processes_and_another_day_write_the_same_bytes(workspace: Path, tmp_path: Path, packed: Path) -> None:
    pipeline.pack(pack_request(workspace, tmp_path / "again", per_class=4, gpus=2))
    assert contents(tmp_path / "again") == contents(packed)


def test_tar_and_parquet_have_the_same_content(workspace: Path, tmp_path: Path, packed: Path) -> None:
    other, _ = pipeline.pack(pack_request(workspace, tmp_path / "p", per_class=4, container="parquet", shards=2))
    assert other.content_id == open_artifact(packed).content_id


def pack(request: pipeline.PackRequest, progress: Progress) -> None:
    pipeline.pack(request, progress)


@pytest.mark.parametrize("stage", ["attach", "pack"])
def test_killed_and_run_again_it_packs_the_same_bytes(
    workspace: Path, tmp_path: Path, packed: Path, stage: str
) -> None:
    request = pack_request(workspace, tmp_path / "shards", per_class=4)
    run_and_kill(pack, request, stage, after=5)
    assert not (tmp_path / "shards").exists()
    pipeline.pack(request)
    assert contents(tmp_path / "shards") == contents(packed)


def ran(steps: list[pipeline.Step]) -> list[str]:
    return [step.stage for step in steps if step.ran]


def test_packing_again_does_nothing_and_a_changed_option_only_what_depends_on_it(
    workspace: Path, tmp_path: Path
) -> None:
    request = pack_request(workspace, tmp_path / "shards", per_class=4)
    assert ran(pipeline.pack(request)[1]) == ["select", "attach", "pack"]
    before = (tmp_path / "shards" / "manifest.json").stat().st_mtime_ns
    assert ran(pipeline.pack(request)[1]) == []
    assert (tmp_path / "shards" / "manifest.json").stat().st_mtime_ns == before
    tars = pack_request(workspace, tmp_path / "shards", per_class=4, container="parquet")
    assert ran(pipeline.pack(tars)[1]) == ["pack"]
    plain = pack_request(workspace, tmp_path / "plain", per_class=4, vision="none")
    assert ran(pipeline.pack(plain)[1]) == ["pack"]
    other = pack_request(workspace, tmp_path / "shards", per_class=4, method="random")
    assert ran(pipeline.pack(other)[1]) == ["select", "attach", "pack"]
    assert ran(pipeline.pack(request)[1]) == ["pack"]


def test_without_a_budget_the_current_selection_is_packed(workspace: Path, tmp_path: Path) -> None:
    chosen_by(workspace, 2)
    result, _ = pipeline.pack(pack_request(workspace, tmp_path / "shards"))
    assert result.samples == 6


def test_without_a_budget_and_a_selection_it_says_what_to_give(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--ratio"):
        pipeline.pack(pack_request(workspace, tmp_path / "shards"))


def test_without_scores_it_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(D2CError, match="d2c score"):
        pipeline.pack(pack_request(tmp_path / "empty", tmp_path / "shards", ratio=0.1))


@pytest.fixture
def own_images(tmp_path: Path, image_folder: Path, scorer: Path) -> dict[str, Any]:
    """A scored source that the test may damage."""
    from d2c import scoring

    folder = Path(shutil.copytree(image_folder, tmp_path / "pets"))
    config = scoring.ScoringConfig(
        source=folder, workspace=tmp_path / "ws", scorer=str(scorer), codec="rgb", size=8, evals=2, device="cpu"
    )
    scoring.run(scoring.plan(config))
    chosen = chosen_by(tmp_path / "ws", 3)
    return {"folder": folder, "workspace": tmp_path / "ws", "key": chosen.table["key"][4].as_py()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no longer in the source"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "can no longer be read"),
        (lambda path: Image.new("RGB", (8, 8), "red").save(path), "changed since it was scored"),
    ],
)
def test_an_image_that_changed_after_scoring_is_an_error_and_nothing_is_packed(
    own_images: dict[str, Any], tmp_path: Path, damage: Any, message: str
) -> None:
    damage(own_images["folder"] / own_images["key"])
    with pytest.raises(D2CError, match=message) as caught:
        pipeline.pack(pack_request(own_images["workspace"], tmp_path / "shards"))
    assert "d2c score" in str(caught.value)
    assert not (tmp_path / "shards").exists()


def test_a_selection_by_other_scores_than_those_there_is_not_packed(
    own_images: dict[str, Any], tmp_path: Path, image_folder: Path, scorer: Path
) -> None:
    from d2c import scoring

    again = scoring.ScoringConfig(
        source=image_folder, workspace=own_images["workspace"], scorer=str(scorer), codec="rgb", size=8, evals=4,
        device="cpu",
    )  # fmt: skip
    scoring.run(scoring.plan(again))
    with pytest.raises(D2CError, match="scored again since this selection"):
        pipeline.pack(pack_request(own_images["workspace"], tmp_path / "shards"))
    assert not (tmp_path / "shards").exists()
    chosen_by(own_images["workspace"], 3)
    pipeline.pack(pack_request(own_images["workspace"], tmp_path / "shards"))


def test_a_folder_of_something_else_is_never_replaced(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "thesis.tex").write_text("years of work")
    with pytest.raises(D2CError, match="something else"):
        pipeline.pack(pack_request(workspace, tmp_path / "shards", per_class=2))
    assert (tmp_path / "shards" / "thesis.tex").exists()


def test_scorer_tokens_are_resampled_to_the_grid_that_is_asked_for_and_the_manifest_says_so(
    workspace: Path, tmp_path: Path, packed: Path
) -> None:
    pipeline.pack(pack_request(workspace, tmp_path / "shards", per_class=4, grid=2))
    coarse, fine = open_artifact(tmp_path / "shards"), open_artifact(packed)
    vision = coarse.manifest["encoders"]["vision"]
    assert (vision["grid"], vision["resize"]) == (2, "tokens, bilinear, from 4 x 4")
    row = fine.keys.index(coarse.keys[0])
    small, large = coarse.values("scorer", [0])[0], fine.values("scorer", [row])[0]
    assert small.shape == (4, 96)
    # A coarse token is a blend of its neighbourhood: on average all say the same.
    np.testing.assert_allclose(small.mean(0), large.mean(0), atol=0.1)


def test_a_workspace_and_its_source_may_move(workspace: Path, tmp_path: Path, packed: Path) -> None:
    moved = workspace.rename(tmp_path / "elsewhere")
    pipeline.pack(pack_request(moved, tmp_path / "shards", per_class=4))
    assert contents(tmp_path / "shards") == contents(packed)


def test_an_attachment_that_was_damaged_in_the_workspace_is_not_packed(workspace: Path, tmp_path: Path) -> None:
    chosen = chosen_by(workspace, 4)
    request = pack_request(workspace, tmp_path / "shards")
    pipeline.attach(request, chosen.name)
    part = next((workspace / "attachments" / chosen.name).glob("*/parts/*.npy"))
    data = bytearray(part.read_bytes())
    data[-3] ^= 1
    part.write_bytes(data)
    with pytest.raises(IntegrityError, match="changed since its stage finished"):
        pipeline.pack(request)


def test_what_another_reader_sees_wrong_is_never_put_in_its_place(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = pack_request(workspace, tmp_path / "shards", per_class=2)
    pipeline.pack(request)
    before = contents(tmp_path / "shards")

    def wrong(path: Path) -> None:
        raise IntegrityError("another reader sees other bytes than the index", where=path)

    monkeypatch.setattr("d2c.readback.check", wrong)
    for _ in range(2):
        with pytest.raises(IntegrityError, match="another reader"):
            pipeline.pack(replace(request, per_class=3))
        assert contents(tmp_path / "shards") == before
    monkeypatch.undo()
    assert pipeline.pack(replace(request, per_class=3))[0].samples == 9


def test_only_artifacts_of_this_workspace_are_replaced_and_never_by_a_recipe(
    workspace: Path, tmp_path: Path, image_folder: Path, scorer: Path
) -> None:
    from d2c import scoring

    out = tmp_path / "shards"
    pipeline.pack(pack_request(workspace, out, per_class=2))
    before = contents(out)
    other = tmp_path / "other"
    asked = scoring.ScoringConfig(
        source=image_folder, workspace=other, scorer=str(scorer), codec="rgb", size=8, evals=2, device="cpu"
    )
    scoring.run(scoring.plan(asked))
    with pytest.raises(D2CError, match="not packed from this workspace"):
        pipeline.pack(pack_request(other, out, per_class=3))
    with pytest.raises(D2CError, match="a recipe would take the place"):
        pipeline.pack(pack_request(workspace, out, per_class=2, container="recipe"))
    assert contents(out) == before
    moved = Path(shutil.move(out, tmp_path / "moved"))
    pipeline.pack(pack_request(workspace, moved, per_class=3))
    pipeline.pack(pack_request(other, moved, per_class=2, overwrite=True))
    assert len(open_artifact(moved)) == 6


def test_what_a_kill_after_the_swap_leaves_is_removed_when_there_is_nothing_to_do(
    workspace: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "shards"
    request = pack_request(workspace, out, per_class=2)
    pipeline.pack(request)
    shutil.copytree(out, out.with_name(".tmp-77-shards.replaced"))
    (out.with_name("shards.partial") / "parts").mkdir(parents=True)
    (out.with_name("other.partial") / "parts").mkdir(parents=True)
    pipeline.pack(request)
    assert sorted(path.name for path in out.parent.iterdir()) == ["other.partial", "shards"]
    # One that is still to be finished, with other options perhaps, stays.
    (out.with_name("shards.partial") / "artifact").mkdir(parents=True)
    pipeline.pack(request)
    assert out.with_name("shards.partial").exists()


@pytest.mark.parametrize("place", [".", "../mount"])
def test_a_place_that_nothing_can_be_renamed_to_is_refused_before_the_work(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "mount").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "mount")
    monkeypatch.setattr("d2c.packing._write_shards", None)
    with pytest.raises(FormatError, match=r"mount point|folder that you are in"):
        pipeline.pack(pack_request(workspace, Path(place), per_class=2))
    assert not (tmp_path / "mount.partial").exists()


def test_an_artifact_with_a_missing_shard_is_packed_again(workspace: Path, tmp_path: Path, packed: Path) -> None:
    request = pack_request(workspace, tmp_path / "shards", per_class=4)
    pipeline.pack(request)
    next((tmp_path / "shards" / "shards").glob("*.tar")).unlink()
    assert ran(pipeline.pack(request)[1]) == ["pack"]
    assert contents(tmp_path / "shards") == contents(packed)


def test_leaving_attachments_out_of_one_artifact_does_not_leave_them_out_of_the_next(
    workspace: Path, tmp_path: Path
) -> None:
    pipeline.pack(pack_request(workspace, tmp_path / "plain", per_class=4, text="none", vision="none"))
    pipeline.pack(pack_request(workspace, tmp_path / "rich", per_class=4))
    assert open_artifact(tmp_path / "rich").manifest["encoders"]["vision"] is not None


def test_what_attach_attached_is_what_pack_packs(workspace: Path, tmp_path: Path) -> None:
    chosen = chosen_by(workspace, 4)
    pipeline.attach(pack_request(workspace, tmp_path / "x", vision="none"), chosen.name)
    pipeline.pack(pack_request(workspace, tmp_path / "shards"))
    encoders = open_artifact(tmp_path / "shards").manifest["encoders"]
    assert encoders["vision"] is None
    assert encoders["text"]["name"] == "hashed"


def test_pack_takes_the_seed_and_the_precision_that_attach_had(workspace: Path, tmp_path: Path) -> None:
    chosen = chosen_by(workspace, 4)
    request = pack_request(workspace, tmp_path / "shards")
    attached, _ = pipeline.attach(replace(request, seed=5), chosen.name)
    again, step = pipeline.attach(request, chosen.name, remember=False)
    assert (again, step.ran) == (attached, False)
    _, step = pipeline.attach(replace(request, seed=6), chosen.name, remember=False)
    assert step.ran
    on_gpu = replace(pipeline.attachment_config(request, chosen.name), precision="bf16")
    assert attachment.run(attachment.plan(on_gpu)) != attached
    other = replace(on_gpu, precision="auto", grid=2)
    assert attachment.plan(other).vision_reasons == ["not run yet"]
    attachment.run(attachment.plan(replace(other, precision="bf16")))
    assert not attachment.plan(other).vision_reasons


def test_tokens_go_to_other_processes_by_name(workspace: Path, tmp_path: Path) -> None:
    chosen = chosen_by(workspace, 4)
    attached, _ = pipeline.attach(pack_request(workspace, tmp_path / "x"), chosen.name)
    assert attached.vision is not None
    tokens = VisionTokens.open(Workspace(workspace).vision(chosen.name, attached.vision))
    first = tokens.patches(0)
    sent = pickle.dumps(tokens)
    assert len(sent) < first.nbytes
    assert np.array_equal(pickle.loads(sent).patches(0), first)


def test_two_packs_into_one_workspace_do_not_mix(workspace: Path, tmp_path: Path) -> None:
    request = pack_request(workspace, tmp_path / "shards", per_class=4)
    chosen = chosen_by(workspace, 4)
    plan = attachment.plan(pipeline.attachment_config(request, chosen.name))
    assert plan.vision is not None
    with plan.vision.locked(), pytest.raises(FormatError, match="another process is writing here"):
        pipeline.pack(request)
    pipeline.pack(request)


def test_a_full_disk_is_said_and_loses_nothing(
    workspace: Path, tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    request = pack_request(workspace, tmp_path / "shards", per_class=4)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            pipeline.pack(request)
    assert not (tmp_path / "shards").exists()
    pipeline.pack(request)
    assert contents(tmp_path / "shards") == contents(packed)


def test_plans_know_the_size(workspace: Path, tmp_path: Path) -> None:
    request = pack_request(workspace, tmp_path / "shards", per_class=4)
    chosen = chosen_by(workspace, 4)
    attached, _ = pipeline.attach(request, chosen.name)
    plan = packing.plan(pipeline.packing_config(request, chosen.name, attached))
    assert plan.contents.bytes == 12 * (3 * 8 * 8 + 16 * 96 + 16 * 2)


def test_of_two_packs_into_one_folder_one_wins_and_the_other_is_told(
    workspace: Path, tmp_path: Path, packed: Path
) -> None:
    """The second starts while the first has the lock, in the middle of writing."""
    request = pack_request(workspace, tmp_path / "shards", per_class=4)
    other = pack_request(workspace, tmp_path / "shards", per_class=4, container="parquet")
    told = []

    class Intruder(Silent):
        def bar(self, label: str, total: int, unit: str, done: int = 0) -> Any:
            if label == "pack":
                with pytest.raises(FormatError, match="another process is writing here") as caught:
                    pipeline.pack(other)
                told.append(str(caught.value))
            return super().bar(label, total, unit, done)

    pipeline.pack(request, Intruder())
    assert "shards.lock" in told[0]
    assert contents(tmp_path / "shards") == contents(packed)


def test_a_torn_manifest_is_replaced_when_asked(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed.parent, tmp_path / "copy"))
    before = contents(folder / "shards")
    (folder / "shards/manifest.json").write_bytes(before["manifest.json"][:1000])
    with pytest.raises(D2CError, match=r"cannot be read[\s\S]*--overwrite"):
        pipeline.pack(pack_request(folder / "workspace", folder / "shards", per_class=4))
    assert len((folder / "shards/manifest.json").read_bytes()) == 1000
    pipeline.pack(pack_request(folder / "workspace", folder / "shards", per_class=4, overwrite=True))
    assert contents(folder / "shards") == before
