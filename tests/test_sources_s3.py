"""Parquet in an object store, read in place by ranges: S3 as a real server speaks it (moto's, on loopback)."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import pack_request

from d2c import pipeline, scoring
from d2c.errors import D2CError, UsageError
from d2c.images import BadImage
from d2c.sources import open_source
from formats import open_artifact

s3fs = pytest.importorskip("s3fs", reason="s3:// needs s3fs: pip install 'd2c-toolkit[s3]'")
IMAGES = [os.urandom(20_000) for _ in range(12)]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every range that is fetched: file name and bytes."""
    done: list[tuple[str, int]] = []
    cat = s3fs.S3FileSystem._cat_file

    async def note(self: Any, path: str, *, start: int, end: int, **options: Any) -> bytes:
        data: bytes = await cat(self, path, start=start, end=end, **options)
        done.append((path.rpartition("/")[2], len(data)))
        return data

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", note)
    return done


def table(images: list[bytes], labels: list[int]) -> pa.Table:
    rows = pa.array(
        [{"bytes": data, "path": None} for data in images], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    return pa.table({"image": rows, "label": labels})


def put(fs: Any, path: str, images: list[bytes], labels: list[int]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table(images, labels), sink, row_group_size=2, compression="none", use_dictionary=False)
    fs.pipe(path, sink.getvalue().to_pybytes())


def two_files(fs: Any, prefix: str = "pets/v1/data") -> None:
    put(fs, f"{prefix}/train-0.parquet", IMAGES[:6], [0, 1, 2, 0, 1, 2])
    put(fs, f"{prefix}/train-1.parquet", IMAGES[6:], [2, 1, 0, 2, 1, 0])
    put(fs, f"{prefix}/test-0.parquet", IMAGES[:2], [0, 1])
    fs.pipe("pets/v1/README.md", b"card")


@pytest.mark.parametrize("url", ["s3://pets/v1", "s3://pets/v1/", "s3://pets/v1/data"])
def test_a_prefix_is_read_as_a_folder_is(store: Any, tmp_path: Path, url: str) -> None:
    two_files(store)
    source = open_source(url)
    store.get("pets/v1", str(tmp_path / "v1"), recursive=True)
    local = open_source(tmp_path / "v1")
    assert source.kind == "parquet"
    assert source.location == url.rstrip("/")
    assert source.name == url.rstrip("/").rpartition("/")[2]
    assert source.keys == local.keys
    assert source.labels.tolist() == local.labels.tolist()
    assert source.classes == local.classes
    assert source.notes == local.notes == ("images are read from the 2 train files of 3",)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, range(12))) == IMAGES


def test_pictures_are_fetched_by_row_group_and_once(store: Any, fetched: list[tuple[str, int]]) -> None:
    two_files(store)
    source = open_source("s3://pets/v1")
    assert sum(size for _, size in fetched) < 3 * 70_000, "opening reads footers and labels"
    assert not any(name.startswith("test") for name, _ in fetched)
    fetched.clear()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, [7, 7, 6, 7])) == [IMAGES[7], IMAGES[7], IMAGES[6], IMAGES[7]]
    assert [name for name, _ in fetched] == ["train-1.parquet"]
    assert 40_000 <= fetched[0][1] < 42_000, "two pictures, without the footer"


def test_one_object_is_a_source(store: Any) -> None:
    put(store, "pets/one.parquet", IMAGES[:3], [0, 1, 0])
    source = open_source("s3://pets/one.parquet")
    assert source.keys == ["one/00000000", "one/00000001", "one/00000002"]
    assert source.read(2) == IMAGES[2]
    assert len(open_source("s3://pets/one.parquet", labels="none").classes) == 1


def test_the_digest_follows_the_content(store: Any) -> None:
    put(store, "pets/one.parquet", IMAGES[:3], [0, 1, 0])
    before = open_source("s3://pets/one.parquet").digest
    put(store, "pets/one.parquet", IMAGES[:3], [0, 1, 0])
    assert open_source("s3://pets/one.parquet").digest == before, "written again, the same bytes"
    put(store, "pets/one.parquet", IMAGES[1:4], [0, 1, 0])
    assert open_source("s3://pets/one.parquet").digest != before


def test_a_lost_object_stops_the_job_and_a_damaged_group_is_a_bad_picture(store: Any) -> None:
    put(store, "pets/one.parquet", IMAGES[:4], [0, 1, 0, 1])
    source = open_source("s3://pets/one.parquet")
    data = bytearray(store.cat("pets/one.parquet"))
    place = data.index(IMAGES[2]) - 30
    data[place : place + 20] = b"\xff" * 20
    store.pipe("pets/one.parquet", bytes(data))
    assert source.read(0) == IMAGES[0]
    with pytest.raises(BadImage, match="cannot be read"):
        source.read(2)
    store.rm("pets/one.parquet")
    with pytest.raises(D2CError, match="no such file") as caught:
        source.read(3)
    assert caught.value.where == "pets/one.parquet"


def test_what_cannot_be_read_is_said(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    two_files(store, "pets/v1/a")
    put(store, "pets/v1/b/x.parquet", IMAGES[:1], [0])
    with pytest.raises(D2CError, match="several data sets") as caught:
        open_source("s3://pets/v1")
    assert "s3://pets/v1/a" in str(caught.value.hint)
    store.pipe("pets/pictures/cat/1.png", b"x")
    with pytest.raises(D2CError, match="no Parquet at this URL"):
        open_source("s3://pets/pictures")
    with pytest.raises(D2CError, match="no such file"):
        open_source("s3://pets/nothing")
    with pytest.raises(D2CError, match=r"no such (bucket|file)"):
        open_source("s3://no-such-bucket-here/x")
    with pytest.raises(UsageError, match="cannot be opened"):
        open_source("s4://pets/v1")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(D2CError, match="not installed") as caught:
        open_source("s3://pets/v1")
    assert caught.value.hint == 'pip install "d2c-toolkit[s3]"'


def test_any_store_of_fsspec(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    put(memory, "/pets/one.parquet", IMAGES[:3], [0, 1, 0])
    source = open_source("memory://pets")
    assert source.read(1) == IMAGES[1]
    assert open_source("memory://pets").digest == source.digest
    memory.rm("/pets", recursive=True)
    (tmp_path / "a b").mkdir()
    pq.write_table(table(IMAGES[:2], [0, 1]), tmp_path / "a b/x.parquet")
    assert open_source(f"file://{tmp_path}/a b").read(1) == IMAGES[1]


def test_images_in_a_store_are_scored_attached_and_packed_in_place(
    tmp_path: Path, store: Any, image_folder: Path, scorer: Path
) -> None:
    files = sorted(image_folder.rglob("*.png"))
    with store.open("pets/data/train.parquet", "wb") as stream:
        images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
        names = [file.parent.name for file in files]
        pq.write_table(pa.table({"image": images, "label": names}), stream)
    workspace = tmp_path / "workspace"
    config = scoring.ScoringConfig(
        source="s3://pets/data", workspace=workspace, scorer=str(scorer), codec="rgb", size=8, evals=2, device="cpu"
    )
    result = scoring.run(scoring.plan(config))
    source = result.record.summary["source"]
    assert (source["path"], source["name"], source["labels"]) == ("s3://pets/data", "data", "source")
    pipeline.pack(pack_request(workspace, tmp_path / "shards", per_class=4))
    assert open_artifact(tmp_path / "shards").manifest["source"]["name"] == "data"


def test_a_password_in_a_url_is_refused() -> None:
    with pytest.raises(UsageError, match="must not keep") as caught:
        open_source("https://me:secret@example.invalid/train.parquet")
    assert "secret" not in str(caught.value)
