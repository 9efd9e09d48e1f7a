"""The choices nobody named: they follow the data, are said, and are recorded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import pack_request
from PIL import Image

from d2c import pipeline
from d2c.choices import PAPER_SCORER, choose_codec, choose_scorer, choose_scorer_model
from d2c.errors import D2CError
from d2c.pipeline import ScoreRequest
from d2c.progress import Silent
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
        pipeline.score(request(tmp_path / "imagenet", tmp_path / "ws"))


def test_any_other_data_gets_a_scorer_of_its_own_which_is_said_and_recorded(tmp_path: Path, image_folder: Path) -> None:
    heard = Heard()
    result, steps = pipeline.score(request(image_folder, tmp_path / "ws"), heard)
    assert [step.stage for step in steps if step.ran] == ["train the scorer", "score"]
    assert any("no scorer was named" in line and "sit-tiny/2" in line for line in heard.lines)
    facts = result.record.summary["scorer"]["facts"]
    assert (facts["kind"], facts["model"]) == ("run", "sit-tiny/2")
    again, steps = pipeline.score(request(image_folder, tmp_path / "ws"))
    assert not [step for step in steps if step.ran]
    assert again.record == result.record


def test_the_trained_scorer_does_not_depend_on_the_number_of_processes(tmp_path: Path, image_folder: Path) -> None:
    one, _ = pipeline.score(request(image_folder, tmp_path / "1"))
    two, _ = pipeline.score(request(image_folder, tmp_path / "2", gpus=2))
    assert one.record.outputs == two.record.outputs


def test_the_scorer_is_trained_on_what_can_be_read(tmp_path: Path, image_folder: Path) -> None:
    folder = Path(shutil.copytree(image_folder, tmp_path / "pets"))
    (folder / "cat" / "zzz.png").write_bytes(b"\x89PNG broken")
    result, _ = pipeline.score(request(folder, tmp_path / "ws"))
    assert (result.record.summary["images"], result.record.summary["bad_files"]) == (95, 1)


@pytest.mark.parametrize("classes", [["only"], ["with space", "größer", "x"]])
def test_one_class_and_odd_names_go_through_to_a_verified_artifact(tmp_path: Path, classes: list[str]) -> None:
    images(tmp_path / "pics", classes, 8, count=6)
    (tmp_path / "pics" / "empty").mkdir()
    pipeline.score(request(tmp_path / "pics", tmp_path / "ws"))
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
    result, _ = pipeline.score(request(tmp_path / "pics", tmp_path / "ws"))
    assert (result.record.summary["images"], result.record.summary["bad_files"]) == (7, 0)
