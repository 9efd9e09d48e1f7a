"""ImageNet as it is downloaded: where its pictures are, what its classes are called, and what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from images_fixture import jpeg, write_tree

from d2c.sources import imagenet_classes, open_source

TENCH, TABBY = "n01440764", "n02123045"
LAYOUT = {
    f"ILSVRC/Data/CLS-LOC/train/{TENCH}/{TENCH}_10026.JPEG": jpeg(8, 8, 1),
    f"ILSVRC/Data/CLS-LOC/train/{TABBY}/{TABBY}_1.JPEG": jpeg(8, 8, 2),
    "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG": jpeg(),
    "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG": jpeg(),
    f"ILSVRC/Annotations/CLS-LOC/train/{TENCH}/{TENCH}_10026.xml": b"<annotation/>",
    "ILSVRC/ImageSets/CLS-LOC/train_cls.txt": b"x",
    "LOC_synset_mapping.txt": b"n01440764 Schleie, Tinca tinca\nn02123045 getigerte Katze\n",
}


@pytest.mark.parametrize("given", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC", "ILSVRC/Data/CLS-LOC/train"])
def test_kaggles_layout_is_read_from_any_of_its_folders(tmp_path: Path, given: str) -> None:
    write_tree(tmp_path, LAYOUT)
    source = open_source(tmp_path / given)
    assert source.keys == [f"{TENCH}/{TENCH}_10026.JPEG", f"{TABBY}/{TABBY}_1.JPEG"]
    assert [entry.name for entry in source.classes] == ["Schleie", "getigerte Katze"]
    assert source.imagenet_ids is not None
    assert source.imagenet_ids.tolist() == [0, 281]
    assert not source.bad
    assert source.read(1) == jpeg(8, 8, 2)
    if given == "":
        assert source.notes[0] == "images are read from ILSVRC/Data/CLS-LOC/train/; not from test, val"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("synset_words.txt", "n01440764 tench fish, Tinca tinca\n"),
        ("devkit/data/map_clsloc.txt", "n01440764 449 tench_fish\n"),
    ],
)
def test_other_lists_of_names(tmp_path: Path, file: str, text: str) -> None:
    write_tree(tmp_path, {f"train/{TENCH}/1.JPEG": jpeg(), f"train/{TABBY}/1.JPEG": jpeg(), file: text.encode()})
    # What the list lacks keeps the usual name.
    assert [entry.name for entry in open_source(tmp_path / "train").classes] == ["tench fish", "tabby"]


def test_all_thousand_classes_are_in_the_order_that_everyone_uses(tmp_path: Path) -> None:
    synsets = [entry.source_id for entry in imagenet_classes()]
    assert synsets == sorted(synsets)
    write_tree(tmp_path, {f"train/{synset}/1.JPEG": b"x" for synset in synsets})
    source = open_source(tmp_path)
    assert [entry.source_id for entry in source.classes] == synsets
    assert source.imagenet_ids is not None
    assert source.imagenet_ids.tolist() == list(range(1000)) == source.labels.tolist()
    assert source.notes == ("images are read from train/",)
    (tmp_path / f"train/{synsets[7]}/1.JPEG").unlink()
    (tmp_path / f"train/{synsets[999]}/1.JPEG").unlink()
    source = open_source(tmp_path)
    assert source.imagenet_ids is not None
    assert source.imagenet_ids[source.labels[7]] == 8
    assert source.notes[-1] == f"998 of ImageNet's 1,000 classes; missing: {synsets[7]}, {synsets[999]}"


def test_a_strange_class_among_imagenets_is_said(tmp_path: Path) -> None:
    source = open_source(write_tree(tmp_path, {f"{name}/1.JPEG": jpeg() for name in (TENCH, TABBY, "misc")}))
    assert not source.is_imagenet
    assert source.notes == ("not taken as ImageNet: 2 classes are of its 1,000, 1 are not: misc",)
