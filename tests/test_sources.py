"""Folders, Parquet and tar files of pictures: what is found, what is left out and why."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from images_fixture import jpeg, png, real_data, two_classes, write_tree

from d2c.errors import D2CError
from d2c.images import BadImage, decode
from d2c.sources import Source, imagenet_classes, open_source
from d2c.sources.imagenet import synsets_by_name


def reasons(source: Source) -> dict[str, str]:
    assert {entry.stage for entry in source.bad} <= {"scan"}
    return {entry.key: entry.reason for entry in source.bad}


def names(source: Source) -> list[str]:
    assert [entry.id for entry in source.classes] == list(range(len(source.classes)))
    return [entry.name for entry in source.classes]


def labelled(source: Source) -> dict[str, str]:
    """Key -> class; checks what holds for every source."""
    assert source.keys == sorted(source.keys, key=lambda key: key.encode())
    assert source.labels.dtype == np.int32
    assert len(source) == len(source.keys) == len(source.labels)
    assert sorted(source.storage_order().tolist()) == list(range(len(source)))
    return {key: source.classes[label].source_id for key, label in zip(source.keys, source.labels, strict=True)}


# Folders.


def test_folder_of_class_folders(tmp_path: Path) -> None:
    source = open_source(two_classes(tmp_path / "pets"))
    assert source.kind == "folder"
    assert source.location == str(tmp_path / "pets")
    assert labelled(source) == {f"{c}/{i}.png": c for c in ("cat", "dog") for i in range(3)}
    assert names(source) == ["cat", "dog"]
    assert not source.bad
    assert not source.notes
    assert not source.is_imagenet
    assert source.read(4) == (tmp_path / "pets/dog/1.png").read_bytes()


def test_deeper_folders_belong_to_the_first_level(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a/x/y/1.png": png(), "a/2.png": png(), "b/x/3.jpg": jpeg()})
    assert labelled(open_source(tmp_path)) == {"a/x/y/1.png": "a", "a/2.png": "a", "b/x/3.jpg": "b"}


def test_names_with_spaces_and_other_letters(tmp_path: Path) -> None:
    files = ["Käse und Brot/ä ö.png", "Käse/1.png", "猫/写真 1.PNG", "a b/1.png", "a/1.png"]
    source = open_source(write_tree(tmp_path, {name: png(8, 8, i) for i, name in enumerate(files)}))
    assert labelled(source) == {name: name.split("/")[0] for name in files}
    assert names(source) == sorted(["Käse und Brot", "Käse", "猫", "a b", "a"], key=str.encode)
    for index, key in enumerate(source.keys):
        assert source.read(index) == (tmp_path / key).read_bytes()


def test_flat_folder_is_one_class(tmp_path: Path) -> None:
    source = open_source(write_tree(tmp_path / "holiday", {"1.png": png(), "2.png": png()}))
    assert labelled(source) == {"1.png": "holiday", "2.png": "holiday"}
    assert source.notes == ("one class only: holiday",)


def test_one_class_folder_is_said(tmp_path: Path) -> None:
    source = open_source(write_tree(tmp_path, {"only/1.png": png()}))
    assert names(source) == ["only"]
    assert source.notes == ("one class only: only",)


def test_one_folder_around_the_class_folders_is_said(tmp_path: Path) -> None:
    two_classes(tmp_path / "wrapper")
    (note,) = open_source(tmp_path).notes
    assert note == f"one class only: wrapper; if its sub-folders are classes, give {tmp_path / 'wrapper'}"


def test_empty_class_folder_is_said_and_gets_no_number(tmp_path: Path) -> None:
    source = open_source(write_tree(two_classes(tmp_path), {"bird/": b"", "axolotl/notes.txt": b"soon"}))
    assert names(source) == ["cat", "dog"]
    assert source.notes == ("2 class folders without images: axolotl, bird",)


def test_every_unused_file_has_a_reason(tmp_path: Path) -> None:
    junk = {
        "cat/clip.mp4": b"x",
        "cat/README": b"x",
        "cat/zero.png": b"",
        "loose.png": png(),
        "cat/.hidden.png": png(),
        "cat/.DS_Store": b"x",
        "cat/Thumbs.db": b"x",
        "cat/labels.csv": b"x",
        "info.json": b"{}",
        ".cache/1.png": png(),
    }
    root = write_tree(two_classes(tmp_path), junk)
    (root / "dog/folder.png").mkdir()
    (root / "dog/gone.png").symlink_to("nowhere.png")
    (root / "dog/up").symlink_to(root / "dog", target_is_directory=True)
    os.mkfifo(root / "dog/pipe.png")
    source = open_source(root)
    assert len(source) == 6
    assert reasons(source) == {
        "cat/README": "no file extension",
        "cat/clip.mp4": "unsupported file extension '.mp4'",
        "cat/zero.png": "the file is empty (0 bytes)",
        "dog/folder.png": "a folder with the name of an image file",
        "dog/gone.png": "a symbolic link to nothing",
        "dog/pipe.png": "not a regular file",
        "dog/up": "a symbolic link to a folder above it",
        "loose.png": "outside any class folder",
    }


def test_names_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    root = two_classes(tmp_path)
    (root / os.fsdecode(b"cat/caf\xe9.png")).write_bytes(png())
    (root / "cat/a\nb.png").write_bytes(png())
    (root / os.fsdecode(b"\xff\xfe")).mkdir()
    found = reasons(open_source(root))
    assert found == {
        "\\xff\\xfe": "the name is not UTF-8; nothing in this folder is used",
        "cat/a\\nb.png": "the name has a control character",
        "cat/caf\\xe9.png": "the name is not UTF-8",
    }
    json.dumps(found).encode("utf-8")


def test_linked_class_folder_is_followed(tmp_path: Path) -> None:
    two_classes(tmp_path / "real")
    (tmp_path / "view").mkdir()
    (tmp_path / "view/feline").symlink_to(tmp_path / "real/cat", target_is_directory=True)
    assert set(labelled(open_source(tmp_path / "view"))) == {f"feline/{i}.png" for i in range(3)}


def test_train_split_is_used_and_said(tmp_path: Path) -> None:
    two_classes(tmp_path / "train")
    two_classes(tmp_path / "val")
    write_tree(tmp_path, {"cover.png": png()})
    source = open_source(tmp_path)
    assert set(labelled(source).values()) == {"cat", "dog"}
    assert len(source) == 6
    assert source.notes == ("images are read from train/; not from val",)
    assert reasons(source) == {"cover.png": "outside train/"}
    assert source.read(0) == (tmp_path / "train/cat/0.png").read_bytes()


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    source = open_source(write_tree(tmp_path, {f"{c}/1.png": png() for c in ("bus", "train", "tram")}))
    assert names(source) == ["bus", "train", "tram"]


def test_file_lost_after_the_scan_is_a_bad_image(tmp_path: Path) -> None:
    source = open_source(two_classes(tmp_path))
    (tmp_path / "cat/0.png").unlink()
    with pytest.raises(BadImage, match="cannot be read: No such file"):
        source.read(0)


def test_digest_changes_with_content_only(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "a")
    before = open_source(root).digest
    assert open_source(root).digest == before
    root.rename(tmp_path / "b")
    root = tmp_path / "b"
    assert open_source(root).digest == before, "the same files under another root are the same source"
    (root / "cat/0.png").rename(root / "dog/9.png")
    moved = open_source(root).digest
    assert moved != before
    (root / "cat/1.png").write_bytes(png(9, 9))
    assert open_source(root).digest not in (before, moved)


@dataclass
class _Counter:
    totals: list[int]
    done: int = 0

    def bar(self, label: str, total: int, unit: str, done: int = 0) -> _Counter:
        self.totals.append(total)
        return self

    def __enter__(self) -> _Counter:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count

    def say(self, message: str) -> None:
        raise AssertionError(message)

    warn = say


def test_scan_reports_progress(tmp_path: Path) -> None:
    counter = _Counter([])
    open_source(two_classes(tmp_path), counter)
    assert counter.totals == [2]
    assert counter.done == 2


# Paths that are no source.


def test_typo_names_the_likely_path(tmp_path: Path) -> None:
    two_classes(tmp_path / "imagenet" / "train")
    with pytest.raises(D2CError) as caught:
        open_source(tmp_path / "imagnet" / "train")
    assert caught.value.hint == f"did you mean {tmp_path / 'imagenet' / 'train'}?"
    assert caught.value.found == f"{tmp_path / 'imagnet'} does not exist"


def test_nothing_alike_still_has_a_next_step(tmp_path: Path) -> None:
    with pytest.raises(D2CError, match="look at what is in"):
        open_source(tmp_path / "zzz")


@pytest.mark.parametrize(
    ("name", "word"), [("x.tar.gz", "unpack it"), ("x.zip", "unpack it"), ("x.png", "folder that holds the pictures")]
)
def test_other_files_are_refused_with_a_way_out(tmp_path: Path, name: str, word: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(D2CError) as caught:
        open_source(tmp_path / name)
    assert word in str(caught.value.hint)


def test_no_images_says_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(D2CError, match="nothing that looks like a picture"):
        open_source(tmp_path)
    write_tree(tmp_path, {"cat/movie.mp4": b"x"})
    with pytest.raises(D2CError, match=r"cat/movie.mp4: unsupported file extension '.mp4'"):
        open_source(tmp_path)


# Parquet.


def hub_metadata(class_names: Sequence[str]) -> dict[bytes, bytes]:
    features = {"image": {"_type": "Image"}, "label": {"names": list(class_names), "_type": "ClassLabel"}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[Any] | None,
    *,
    paths: Sequence[str | None] | None = None,
    metadata: Mapping[bytes, bytes] | None = None,
    group: int = 2,
) -> Path:
    rows = [{"bytes": data, "path": paths[i] if paths else None} for i, data in enumerate(images)]
    columns: dict[str, Any] = {"image": pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))}
    if labels is not None:
        columns["label"] = pa.array(labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=group)
    return path


def test_parquet_as_hubs_export_it(tmp_path: Path) -> None:
    images = [png(8, 8, i) for i in range(5)]
    path = write_parquet(
        tmp_path / "pets.parquet",
        images,
        [1, 0, 1, 2, -1],
        paths=["e.png", "d.png", "c.png", "b.png", "a.png"],
        metadata=hub_metadata(["cat", "dog", "gold fish"]),
    )
    source = open_source(path)
    assert source.kind == "parquet"
    assert labelled(source) == {"b.png": "gold fish", "c.png": "dog", "d.png": "cat", "e.png": "dog"}
    assert names(source) == ["cat", "dog", "gold fish"]
    assert reasons(source) == {"a.png": "the row has no label"}
    assert [source.read(i) for i in range(4)] == images[3::-1]
    assert source.storage_order().tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("paths", [None, ["x.png"] * 3, ["a.png", None, "c.png"]])
def test_parquet_rows_without_usable_paths_are_named_by_row(tmp_path: Path, paths: list[str | None] | None) -> None:
    source = open_source(write_parquet(tmp_path / "p.parquet", [png(), png(), png()], [7, 7, 3], paths=paths))
    assert labelled(source) == {"p/00000000": "7", "p/00000001": "7", "p/00000002": "3"}
    assert names(source) == ["3", "7"]


def test_parquet_class_that_does_not_occur_gets_no_number(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "p.parquet", [png(), png()], [2, 0], metadata=hub_metadata(["a", "b", "c"]))
    assert names(open_source(path)) == ["a", "c"]


def test_parquet_folder_uses_its_train_files(tmp_path: Path) -> None:
    for split in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_parquet(tmp_path / "data" / f"{split}.parquet", [png(), png()], [0, 1])
    write_tree(tmp_path, {"README.md": b"card"})
    source = open_source(tmp_path)
    assert source.keys[0] == "train-00000-of-00002/00000000"
    assert len(source) == 4
    assert source.notes == ("images are read from the 2 train files of 3",)


@pytest.mark.parametrize("dictionary", [False, True])
def test_parquet_with_binary_and_string_columns(tmp_path: Path, dictionary: bool) -> None:
    label = pa.array(["dog", "cat", None])
    table = pa.table(
        {"img": [png(8, 8, 1), png(8, 8, 2), png()], "label": label.dictionary_encode() if dictionary else label}
    )
    pq.write_table(table, tmp_path / "p.parquet")
    source = open_source(tmp_path / "p.parquet")
    assert labelled(source) == {"p/00000000": "dog", "p/00000001": "cat"}
    assert source.read(1) == png(8, 8, 2)
    assert reasons(source) == {"p/00000002": "the row has no label"}


def test_parquet_row_without_bytes_is_bad_when_read(tmp_path: Path) -> None:
    source = open_source(write_parquet(tmp_path / "p.parquet", [png(), None], [0, 1]))
    source.read(0)
    with pytest.raises(BadImage, match="no image bytes"):
        source.read(1)


def test_parquet_damage_is_found_by_the_page_checksum(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    needle = os.urandom(64)
    table = pa.table({"image": [needle, png()], "label": [0, 1]})
    pq.write_table(
        table, path, compression="none", use_dictionary=False, write_page_checksum=True, write_statistics=False
    )
    data = bytearray(path.read_bytes())
    data[data.index(needle) + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadImage, match="cannot be read"):
        open_source(path).read(0)


def test_parquet_without_a_clear_label_or_image_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png()], "a": [1], "b": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(D2CError, match="rename the label column"):
        open_source(tmp_path / "a.parquet")
    pq.write_table(pa.table({"url": ["x"], "label": [1]}), tmp_path / "b.parquet")
    with pytest.raises(D2CError, match="no image column"):
        open_source(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(D2CError, match="not readable Parquet"):
        open_source(tmp_path / "c.parquet")


def test_parquet_without_labels_is_one_class(tmp_path: Path) -> None:
    source = open_source(write_parquet(tmp_path / "p.parquet", [png(), png()], None))
    assert names(source) == ["images"]


def test_opening_parquet_reads_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "p.parquet", [os.urandom(5000) for _ in range(8)], list(range(8)))
    asked: list[list[str]] = []
    read = pq.ParquetFile.read

    def spy(self: Any, *, columns: list[str]) -> Any:
        asked.append(columns)
        return read(self, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read", spy)
    open_source(path)
    assert asked == [["label", "image.path"]]


def test_threads_share_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [png(8, 8, i) for i in range(40)]
    source = open_source(write_parquet(tmp_path / "p.parquet", images, [0] * 40, group=20))
    groups: list[int] = []
    read = pq.ParquetFile.read_row_group

    def spy(self: Any, group: int, columns: list[str]) -> Any:
        groups.append(group)
        return read(self, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, range(40))) == images
    assert sorted(groups) == [0, 1]


# Tar.


def write_tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]  # a mode in a variable
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tar_of_a_folder(tmp_path: Path) -> None:
    root = two_classes(tmp_path / "pets")
    with tarfile.open(tmp_path / "pets.tar", "w") as tar:
        tar.add(root, "pets")
    source = open_source(tmp_path / "pets.tar")
    folder = open_source(root)
    assert source.kind == "tar"
    assert labelled(source) == labelled(folder)
    assert names(source) == names(folder)
    assert [source.read(i) for i in range(6)] == [folder.read(i) for i in range(6)]
    assert not source.bad


@pytest.mark.parametrize("prefix", ["", "./", "/data/"])
def test_tar_member_prefixes(tmp_path: Path, prefix: str) -> None:
    files = {f"{prefix}{name}": png() for name in ("Zoë/1 a.png", "Zoë/deep/2.png", "b/3.png")}
    assert labelled(open_source(write_tar(tmp_path / "x.tar", files))) == {
        "Zoë/1 a.png": "Zoë",
        "Zoë/deep/2.png": "Zoë",
        "b/3.png": "b",
    }


def test_flat_tar_is_one_class(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "cats.tar", {"1.png": png(), "2.png": png()}))
    assert labelled(source) == {"1.png": "cats", "2.png": "cats"}


def test_folder_of_class_tars(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_tar(tmp_path / f"{name}.tar", {"1.png": png(8, 8, ord(name[0]))})
    source = open_source(tmp_path)
    assert labelled(source) == {"cat/1.png": "cat", "dog/1.png": "dog"}
    assert source.read(1) == png(8, 8, ord("d"))


def test_tar_leaves_out_with_reasons(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        members = [("a/1.png", png()), ("b/1.png", png()), ("a/1.png", jpeg()), ("a/0.png", b"")]
        for name, data in [*members, ("a/v.mp4", b"x"), ("top.png", png()), ("a/readme.txt", b"x")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("b/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "1.png"
        tar.addfile(link)
    source = open_source(path)
    assert labelled(source) == {"a/1.png": "a", "b/1.png": "b"}
    assert source.read(0) == png()
    assert reasons(source) == {
        "a/0.png": "the file is empty (0 bytes)",
        "a/1.png": "the name appears again in the tar; the first one is used",
        "a/v.mp4": "unsupported file extension '.mp4'",
        "b/link.png": "a link inside the tar, not a file",
        "top.png": "outside any class folder",
    }


def test_webdataset_shards_written_by_webdataset(tmp_path: Path) -> None:
    import webdataset

    expected = {}
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"train-{shard:04d}.tar")) as writer:
            for i in range(3):
                data = png(8, 8, shard * 3 + i)
                writer.write({"__key__": f"{i:04d}", "png": data, "cls": 10 - i, "json": {"i": i}, "npy": np.zeros(2)})
                expected[f"train-{shard:04d}/{i:04d}"] = (str(10 - i), data)
    source = open_source(tmp_path)
    assert labelled(source) == {key: label for key, (label, _) in expected.items()}
    assert names(source) == ["8", "9", "10"], "numbers are sorted by value"
    assert [source.read(i) for i in range(6)] == [expected[key][1] for key in source.keys]
    assert not source.bad


def test_webdataset_sample_without_label_or_with_two_pictures(tmp_path: Path) -> None:
    files = {
        "a.png": png(),
        "a.cls": b"dog\n",
        "a.mask.png": png(),
        "a.jpg": jpeg(),
        "b.png": png(),
        "c.npy": b"x",
    }
    source = open_source(write_tar(tmp_path / "x.tar", files))
    assert labelled(source) == {"a": "dog"}
    assert reasons(source) == {
        "a.jpg": "a second picture of the sample; a.png is used",
        "a.mask.png": "a second picture (mask.png) of the sample",
        "b.png": "no .cls member beside it",
        "c.npy": "unsupported file extension '.npy'",
    }


def test_compressed_and_damaged_tars_are_told_apart(tmp_path: Path) -> None:
    write_tar(tmp_path / "z.tar", {"a/1.png": png()}, "w:gz")
    with pytest.raises(D2CError, match="compressed"):
        open_source(tmp_path / "z.tar")
    (tmp_path / "t.tar").write_bytes(b"text" * 500)
    with pytest.raises(D2CError, match="damaged or not a tar"):
        open_source(tmp_path / "t.tar")


@pytest.mark.parametrize("how", ["header", "cut"])
def test_damage_inside_a_tar_never_shortens_it_silently(tmp_path: Path, how: str) -> None:
    path = write_tar(tmp_path / "x.tar", {f"a/{i}.png": os.urandom(700) for i in range(6)})
    data = bytearray(path.read_bytes())
    if how == "header":
        third = 3 * (512 + 1024)
        data[third + 20] ^= 0xFF
    else:
        del data[3000:]
    path.write_bytes(data)
    with pytest.raises(D2CError, match="damaged"):
        open_source(path)


# ImageNet.


def test_imagenet_is_known_by_its_synsets(tmp_path: Path) -> None:
    source = open_source(write_tree(tmp_path, {f"{s}/1.JPEG": jpeg() for s in ("n02123045", "n01440764")}))
    assert source.is_imagenet
    assert names(source) == ["tench", "tabby"]
    assert source.imagenet_ids is not None
    assert source.imagenet_ids.tolist() == [0, 281]
    classes = imagenet_classes()
    assert len(classes) == 1000
    assert (classes[207].source_id, classes[207].name) == ("n02099601", "golden retriever")
    assert synsets_by_name([entry.name for entry in classes]) == [entry.source_id for entry in classes]
    assert synsets_by_name([entry.name for entry in reversed(classes)]) is None


def test_synsets_outside_the_thousand_are_not_imagenet(tmp_path: Path) -> None:
    source = open_source(write_tree(tmp_path, {f"{s}/1.png": png() for s in ("n01440764", "n99999999")}))
    assert not source.is_imagenet
    assert names(source) == ["n01440764", "n99999999"]


# Real files.


def test_cifar10_parquet() -> None:
    source = open_source(real_data("cifar10-train.parquet"))
    assert len(source) == 50_000
    assert np.bincount(source.labels).tolist() == [5000] * 10
    assert names(source)[:2] == ["airplane", "automobile"]
    assert decode(source.read(49_999)).size == (32, 32)


def test_imagenet_tar() -> None:
    source = open_source(real_data("imagenet-samples-200.tar"))
    assert len(source) == len(source.classes) == 200
    assert source.is_imagenet
    assert not source.bad
