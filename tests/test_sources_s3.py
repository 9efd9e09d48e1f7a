"""Parquet in an object store, read in place by ranges: S3 as a real server speaks it (moto's, on loopback)."""

from __future__ import annotations

import os
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2c.errors import D2CError, UsageError
from d2c.images import BadImage
from d2c.sources import open_source

moto_server = pytest.importorskip("moto.server", reason="the S3 server of these tests is moto's: pip install moto[s3]")
s3fs = pytest.importorskip("s3fs", reason="s3:// needs s3fs: pip install 'd2c-toolkit[s3]'")
IMAGES = [os.urandom(20_000) for _ in range(12)]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A file system with one empty bucket, ``pets``; the environment is the only configuration."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")):
        fs.mkdir("pets")
    return fs


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
