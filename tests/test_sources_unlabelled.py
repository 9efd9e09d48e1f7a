"""Pictures without labels, or whose labels are not wanted: one class."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from images_fixture import png, two_classes, write_tree

from d2c.errors import UsageError
from d2c.sources import Source, open_source, relabel


def keys_of_one_class(source: Source) -> list[str]:
    assert [(entry.id, entry.name, entry.source_id) for entry in source.classes] == [(0, "image", "image")]
    assert not source.labels.any()
    assert not source.is_imagenet
    assert not source.notes
    return source.keys


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_folder_with_pictures_at_every_depth(tmp_path: Path) -> None:
    files = {"b.png": png(8, 8, 1), "x/a.png": png(8, 8, 2), "x/y/c.png": png(8, 8, 3), "empty/": b"", "v.mp4": b"x"}
    source = open_source(write_tree(tmp_path, files), labels="none")
    assert keys_of_one_class(source) == ["b.png", "x/a.png", "x/y/c.png"]
    assert [source.read(i) for i in range(3)] == [files[key] for key in source.keys]
    assert [entry.key for entry in source.bad] == ["v.mp4"]


def test_synsets_without_labels_are_not_imagenet(tmp_path: Path) -> None:
    source = open_source(write_tree(tmp_path, {"n01440764/1.JPEG": png(), "n02123045/1.JPEG": png()}), labels="none")
    assert keys_of_one_class(source) == ["n01440764/1.JPEG", "n02123045/1.JPEG"]


def test_parquet_rows_without_label_are_used_and_no_column_must_be_the_label(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png()] * 3, "a": [1, None, 2], "b": ["x", "y", "z"]}), tmp_path / "p.parquet")
    source = open_source(tmp_path / "p.parquet", labels="none")
    assert keys_of_one_class(source) == ["p/00000000", "p/00000001", "p/00000002"]
    assert not source.bad


def test_tar_with_and_without_label_members(tmp_path: Path) -> None:
    files = {"a.png": png(), "a.cls": b"3", "b.png": png(), "b.json": b"{}"}
    assert keys_of_one_class(open_source(write_tar(tmp_path / "w.tar", files), labels="none")) == ["a", "b"]
    files = {"x/1.png": png(), "x/2.png": png(), "top.png": png()}
    source = open_source(write_tar(tmp_path / "f.tar", files), labels="none")
    assert keys_of_one_class(source) == ["top.png", "x/1.png", "x/2.png"]
    assert not source.bad


def test_unknown_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="source or none"):
        open_source(two_classes(tmp_path), labels="folders")  # type: ignore[arg-type]  # what a person may type


def test_labels_are_part_of_the_digest(tmp_path: Path) -> None:
    root = two_classes(tmp_path)
    labelled, one = open_source(root), open_source(root, labels="none")
    assert one.keys == labelled.keys
    halves = np.arange(6) % 2
    relabelled = [
        relabel(one, halves, ["p", "q"]),
        relabel(one, 1 - halves, ["p", "q"]),
        relabel(one, halves, ["q", "p"]),
    ]
    assert len({source.digest for source in (labelled, one, *relabelled)}) == 5
    assert relabel(labelled, halves, ["p", "q"]).digest == relabel(open_source(root), halves, ["p", "q"]).digest
    assert relabelled[0].labels.dtype == np.int32
    assert relabelled[0].labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert [entry.name for entry in relabelled[0].classes] == ["p", "q"]
    assert relabelled[0].read(4) == labelled.read(4)


def test_relabelling_with_the_wrong_labels_is_refused(tmp_path: Path) -> None:
    source = open_source(two_classes(tmp_path))
    with pytest.raises(ValueError, match="for 6 pictures"):
        relabel(source, np.zeros(5, np.int32), ["a"])
    with pytest.raises(ValueError, match=r"0\.\.1 for 1 classes"):
        relabel(source, np.arange(6) // 3, ["a"])
