"""The choices nobody named: they follow the data, are said, and are recorded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIDE, pack_request
from PIL import Image

from d2c import generation, pipeline, score_pipeline, scoring, training
from d2c.choices import PAPER_SCORER, choose_codec, choose_scorer, choose_scorer_model
from d2c.errors import D2CError
from d2c.progress import Silent
from d2c.recipe import recipe
from d2c.score_pipeline import ScoreRequest
from d2c.scoring import ScoringConfig
from d2c.sit import model_spec
from d2c.sources import Source, open_source
from formats import open_artifact, verify


class Heard(Silent):
    """Progress that remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def images(root: Path, classes: list[str], side: int, count: int = 3) -> Source:
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(root / name / f"{index}.png")
    return open_source(root)


def request(source: Path, workspace: Path, **options: Any) -> ScoreRequest:
    defaults: dict[str, Any] = {"device": "cpu", "evals": 2, "scorer_steps": 4}
    return ScoreRequest(source=source, workspace=workspace, **{**defaults, **options})


@pytest.mark.parametrize(
    ("side", "expected"), [(8, ("rgb", 8)), (30, ("rgb", 28)), (64, ("rgb", 64)), (80, ("vae", 256))]
)
def test_small_images_are_modelled_as_they_are_and_large_ones_through_the_vae(
    tmp_path: Path, side: int, expected: tuple[str, int]
) -> None:
    assert choose_codec(images(tmp_path / "x", ["a", "b"], side), None, None) == expected


def test_a_named_codec_or_size_is_respected(tmp_path: Path) -> None:
    large = images(tmp_path / "x", ["a", "b"], 80)
    assert choose_codec(large, "rgb", None) == ("rgb", 64)
    assert choose_codec(large, None, 32) == ("rgb", 32)
    assert choose_codec(large, "vae", 512) == ("vae", 512)


@pytest.mark.parametrize("size", [4, 8, 12, 16, 20, 28, 32, 48, 64, 128])
def test_the_scorer_that_score_trains_fits_every_small_size(size: int) -> None:
    spec = model_spec(choose_scorer_model("rgb", size), size, 3, 10)
    assert spec.tokens <= 256


def test_the_papers_scorer_is_for_imagenet_at_full_size_and_nothing_else(tmp_path: Path) -> None:
    imagenet = images(tmp_path / "imagenet", ["n01440764", "n01443537"], 80)
    other = images(tmp_path / "pets", ["cat", "dog"], 80)
    assert choose_scorer(imagenet, None, "vae") == PAPER_SCORER
    assert choose_scorer(imagenet, None, "rgb") == "train"
    assert choose_scorer(other, None, "vae") == "train"
    assert choose_scorer(imagenet, "train", "vae") == "train"


def test_imagenet_without_its_scorer_at_hand_names_both_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    images(tmp_path / "imagenet", ["n01440764", "n01443537"], 80)
    with pytest.raises(D2CError, match=r"--scorer FILE(.|\n)*--scorer train"):
        score_pipeline.score(request(tmp_path / "imagenet", tmp_path / "ws"))


def test_any_other_data_gets_a_scorer_of_its_own_which_is_said_and_recorded(tmp_path: Path, image_folder: Path) -> None:
    heard = Heard()
    result, steps = score_pipeline.score(request(image_folder, tmp_path / "ws"), heard)
    assert [step.stage for step in steps if step.ran] == ["train the scorer", "score"]
    assert any("no scorer was named" in line and "sit-tiny/2" in line for line in heard.lines)
    facts = result.record.summary["scorer"]["facts"]
    assert (facts["kind"], facts["model"]) == ("run", "sit-tiny/2")
    again, steps = score_pipeline.score(request(image_folder, tmp_path / "ws"))
    assert not [step for step in steps if step.ran]
    assert again.record == result.record


def test_the_trained_scorer_does_not_depend_on_the_number_of_processes(tmp_path: Path, image_folder: Path) -> None:
    one, _ = score_pipeline.score(request(image_folder, tmp_path / "1"))
    two, _ = score_pipeline.score(request(image_folder, tmp_path / "2", gpus=2))
    assert one.record.outputs == two.record.outputs


def test_a_scorer_that_is_not_to_be_compiled_is_not_and_is_another_one_only_where_it_would_be(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, asked = open_source(image_folder), request(image_folder, tmp_path / "workspace")
    typed = replace(asked, compile=False)

    def folder(request: ScoreRequest) -> Path:
        return score_pipeline.plan_scorer(request, source, "rgb", 8).folder

    plain = folder(asked)
    assert folder(typed) == plain
    monkeypatch.setattr(score_pipeline, "pays", lambda *_: True)  # of a GPU with a lot to do
    assert folder(asked) == plain
    assert folder(typed) != plain

    trained: list[training.TrainingConfig] = []

    def note(config: training.TrainingConfig) -> None:
        trained.append(config)
        raise ProcessLookupError

    monkeypatch.setattr(training, "plan", note)
    for wanted in (asked, typed):
        with pytest.raises(ProcessLookupError):
            score_pipeline.score(wanted)
    assert [config.compile for config in trained] == [True, False]


def test_the_scorer_is_trained_on_what_can_be_read(tmp_path: Path, image_folder: Path) -> None:
    folder = Path(shutil.copytree(image_folder, tmp_path / "pets"))
    (folder / "cat" / "zzz.png").write_bytes(b"\x89PNG broken")
    result, _ = score_pipeline.score(request(folder, tmp_path / "ws"))
    assert (result.record.summary["images"], result.record.summary["bad_files"]) == (95, 1)


@pytest.mark.parametrize("classes", [["only"], ["with space", "größer", "x"]])
def test_one_class_and_odd_names_go_through_to_a_verified_artifact(tmp_path: Path, classes: list[str]) -> None:
    images(tmp_path / "pics", classes, 8, count=6)
    (tmp_path / "pics" / "empty").mkdir()
    score_pipeline.score(request(tmp_path / "pics", tmp_path / "ws"))
    pipeline.pack(pack_request(tmp_path / "ws", tmp_path / "shards", per_class=2))
    assert verify(tmp_path / "shards", "deep").ok
    artifact = open_artifact(tmp_path / "shards")
    assert [row.name for row in artifact.classes] == sorted(classes)
    assert len(artifact) == 2 * len(classes)


def test_greyscale_palette_cmyk_rotated_and_16_bit_images_are_scored_like_the_rest(tmp_path: Path) -> None:
    images(tmp_path / "pics", ["a"], 8, count=2)
    folder = tmp_path / "pics" / "a"
    base = Image.open(folder / "0.png")
    base.convert("L").save(folder / "grey.png")
    base.convert("P").save(folder / "palette.png")
    base.convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    base.save(folder / "rotated.jpg", exif=exif)
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(folder / "deep.png")
    result, _ = score_pipeline.score(request(tmp_path / "pics", tmp_path / "ws"))
    assert (result.record.summary["images"], result.record.summary["bad_files"]) == (7, 0)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE with random weights, saved by diffusers: 16 px become 8 x 8 latents of 4 channels."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        untyped: Any = diffusers
        model = untyped.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(8, 8),
            norm_num_groups=4,
        )
    folder = tmp_path_factory.mktemp("vae") / "small-vae"
    model.save_pretrained(folder)
    return folder


def test_images_go_through_a_vae_to_a_trained_and_sampled_model(tmp_path: Path, vae: Path) -> None:
    images(tmp_path / "pics", ["a", "b"], 20, count=8)
    options = {"codec": str(vae), "size": 16, "scorer_model": "sit-tiny/2"}
    score_pipeline.score(request(tmp_path / "pics", tmp_path / "ws", **options))
    packed = pack_request(tmp_path / "ws", tmp_path / "shards", per_class=3, text="hashed", vision="scorer")
    pipeline.pack(packed)
    artifact = open_artifact(tmp_path / "shards")
    assert artifact.array(0, "latent").shape == (2, 4, 8, 8)
    assert (artifact.array(0, "latent")[1] > 0).all()  # standard deviations, not logarithms
    assert str(vae.parent) not in (tmp_path / "shards" / "manifest.json").read_text()
    config = training.TrainingConfig(
        artifact=tmp_path / "shards",
        out=tmp_path / "run",
        model="sit-tiny/2",
        recipe=recipe("small", steps=2, batch_size=3),
        device="cpu",
    )
    training.run(training.plan(config))
    sampled = generation.GenerationConfig(
        run=tmp_path / "run", out=tmp_path / "out", count=2, codec=str(vae), device="cpu", npz=True
    )
    result = generation.run(generation.plan(sampled))
    with np.load(result.path / generation.ARRAYS) as arrays:
        assert arrays["arr_0"].shape == (2, 16, 16, 3)


def test_another_vae_than_the_one_scored_with_is_not_packed(tmp_path: Path, vae: Path) -> None:
    from safetensors.torch import load_file, save_file

    images(tmp_path / "pics", ["a", "b"], 20, count=4)
    own = Path(shutil.copytree(vae, tmp_path / "vae"))
    options = {"codec": str(own), "size": 16, "scorer_model": "sit-tiny/2"}
    score_pipeline.score(request(tmp_path / "pics", tmp_path / "ws", **options))
    weights = own / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(D2CError, match="not the one that the images were scored with"):
        pipeline.pack(pack_request(tmp_path / "ws", tmp_path / "shards", per_class=2, text="none", vision="none"))


@pytest.mark.parametrize("vision", ["scorer", "none"])
def test_images_that_were_moved_are_told_of_with_the_command_that_finds_them(
    workspace: Path, tmp_path: Path, image_folder: Path, scorer: Path, vision: str
) -> None:
    home = shutil.copytree(image_folder, tmp_path / "before" / "pets")
    config = ScoringConfig(
        source=home, workspace=workspace, scorer=str(scorer), codec="rgb", size=SIDE, evals=4, device="cpu"
    )
    scoring.run(scoring.plan(config))
    home.rename(tmp_path / "pets")
    request = pack_request(workspace, tmp_path / "shards", per_class=4, vision=vision)
    with pytest.raises(D2CError, match="no longer where they were") as caught:
        pipeline.pack(request)
    assert caught.value.where == str(home)
    assert f"d2c score NEW_PLACE --workspace {workspace};" in str(caught.value.hint)
    moved = scoring.plan(replace(config, source=tmp_path / "pets"))
    assert not moved.reasons
    scoring.run(moved)
    assert pipeline.pack(request)[0].samples == 12
