"""Folders that the `datasets` library itself has saved."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from images_fixture import png
from PIL import Image

from d2c.errors import D2CError
from d2c.images import decode
from d2c.sources import open_source

datasets = pytest.importorskip("datasets", reason="the judge of these tests is the datasets library")
datasets.disable_progress_bars()

IMAGES = [png(8, 8, seed) for seed in range(7)]
LABELS = [2, 0, 1, 2, 0, -1, 1]


def dataset(**columns: Any) -> Any:
    given = {"image": [{"bytes": data, "path": None} for data in IMAGES], "label": LABELS, **columns}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "sea lion"])}
    features |= {name: datasets.Value("string") for name in columns if name not in features}
    return datasets.Dataset.from_dict(given, features=datasets.Features(features))


def test_saved_dataset_in_several_files(tmp_path: Path) -> None:
    dataset().save_to_disk(tmp_path / "pets", num_shards=3)
    source = open_source(tmp_path / "pets")
    assert source.kind == "dataset"
    assert [entry.name for entry in source.classes] == ["cat", "dog", "sea lion"]
    assert [(entry.key, entry.reason) for entry in source.bad] == [
        ("data-00002-of-00003/00000000", "the row has no label")
    ]
    assert source.labels.tolist() == [label for label in LABELS if label >= 0]
    assert source.keys[3:5] == ["data-00001-of-00003/00000000", "data-00001-of-00003/00000001"]
    again = datasets.load_from_disk(tmp_path / "pets")
    theirs = [row for row in again if row["label"] >= 0]
    for index, row in enumerate(theirs):
        assert decode(source.read(index)).tobytes() == row["image"].tobytes()
    assert open_source(tmp_path / "pets").digest == source.digest
    assert len(open_source(tmp_path / "pets", labels="none")) == 7


def test_rows_chosen_before_saving_are_the_ones_read(tmp_path: Path) -> None:
    dataset().select([6, 1, 2]).save_to_disk(tmp_path)
    source = open_source(tmp_path)
    assert [source.read(i) for i in range(3)] == [IMAGES[6], IMAGES[1], IMAGES[2]]
    assert source.labels.tolist() == [1, 0, 1]


def test_pictures_from_files_are_inside_and_keep_their_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.png").write_bytes(png(8, 8, ord(name)))
    made = datasets.Dataset.from_dict({"image": [str(tmp_path / "b.png"), str(tmp_path / "a.png")], "label": [5, 7]})
    made.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    (tmp_path / "a.png").unlink()
    source = open_source(tmp_path / "saved")
    assert source.keys == ["a.png", "b.png"]
    assert source.read(0) == png(8, 8, ord("a"))
    assert [entry.name for entry in source.classes] == ["5", "7"]
    assert source.storage_order().tolist() == [1, 0]


def test_plain_binary_column(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"img": IMAGES[:2], "label": ["x", "y"]})
    made.save_to_disk(tmp_path)
    source = open_source(tmp_path)
    assert [source.read(i) for i in range(2)] == IMAGES[:2]
    assert Image.open(io.BytesIO(source.read(0))).size == (8, 8)


def test_of_several_splits_train_is_read(tmp_path: Path) -> None:
    datasets.DatasetDict({"test": dataset().select([0]), "train": dataset()}).save_to_disk(tmp_path / "both")
    source = open_source(tmp_path / "both")
    assert len(source) == 6
    assert source.notes == ("images are read from train/; not from test",)
    datasets.DatasetDict({"a": dataset(), "b": dataset()}).save_to_disk(tmp_path / "neither")
    with pytest.raises(D2CError, match="not clear which split") as caught:
        open_source(tmp_path / "neither")
    assert str(tmp_path / "neither" / "a") in str(caught.value.hint)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_damage_is_named_by_its_file(tmp_path: Path, name: str) -> None:
    dataset().save_to_disk(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(D2CError) as caught:
        open_source(tmp_path)
    assert caught.value.where == str(tmp_path / name)


def test_a_lost_file_is_named(tmp_path: Path) -> None:
    dataset().save_to_disk(tmp_path, num_shards=2)
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(D2CError, match=r"data-00001-of-00002\.arrow"):
        open_source(tmp_path)
