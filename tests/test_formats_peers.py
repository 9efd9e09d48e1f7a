"""Other people's readers on our files: webdataset, datasets, tar + numpy, GNU tar, pyarrow, sha256sum, HTTP clients."""

from __future__ import annotations

import gc
import io
import json
import re
import shutil
import subprocess
import tarfile
import threading
import urllib.request
import warnings
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from coded_fixture import write_coded
from formats_fixture import COLUMNS, make_samples, write_artifact

from formats import open_artifact
from formats.npy import npy_header, parse_npy_header
from formats.schema import DTYPES, INT8, Column


def _stored(sample: Any) -> dict[str, Any]:
    return {name: value for name, value in sample.info.items() if value is not None}


def test_webdataset_reads_the_tars(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a", "tar", 3)
    urls = sorted(map(str, (path / "shards").iterdir()))
    with warnings.catch_warnings():
        # It warns about deprecated torch names when imported, and leaves files for the garbage collector to close.
        warnings.simplefilter("ignore")
        import webdataset

        read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        gc.collect()
    assert len(read) == 20
    for sample, found in zip(make_samples(), read, strict=True):
        assert found["__key__"] == sample.key
        assert found["cls"] == sample.label
        assert found["json"] == _stored(sample)
        for column in COLUMNS:
            assert found[f"{column.name}.npy"].dtype == column.numpy
            np.testing.assert_array_equal(found[f"{column.name}.npy"], sample.arrays[column.name])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_datasets_reads_the_folder(
    tmp_path: Path, container: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", minversion="5", reason="datasets 5 is not installed")
    path = write_artifact(tmp_path / "a", container, 3)
    (path / "croissant.json").write_text("{}")
    cache = str(tmp_path / "cache")
    read = list(datasets.load_dataset(str(path), split="train", streaming=streaming, cache_dir=cache))
    key, label = {"tar": ("__key__", "cls"), "parquet": ("key", "label")}[container]
    assert [row[key] for row in read] == [sample.key for sample in make_samples()]
    for sample, row in zip(make_samples(), read, strict=True):
        facts = row["json"] if container == "tar" else json.loads(row["json"])
        assert (row[label], facts) == (sample.label, _stored(sample))
        for column in COLUMNS:
            if container == "tar":
                array = np.array(row[f"{column.name}.npy"], column.numpy)
            else:
                array = np.frombuffer(row[column.name], column.numpy).reshape(column.shape)
            np.testing.assert_array_equal(array, sample.arrays[column.name])


def test_tarfile_and_numpy_read_the_tars(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a", "tar", 1)
    with tarfile.open(path / "shards/train-00000-of-00001.tar") as tar:
        members = tar.getmembers()
        names = [f"{s.key}.{e}" for s in make_samples() for e in ("cls", "json", "latent.npy", "tokens.npy")]
        assert [member.name for member in members] == names
        assert {(m.mode, m.uid, m.gid, m.uname, m.gname, m.mtime, m.type) for m in members} == {
            (0o644, 0, 0, "", "", 0, tarfile.REGTYPE)
        }
        for sample in make_samples():
            for column in COLUMNS:
                stream = tar.extractfile(f"{sample.key}.{column.name}.npy")
                assert stream is not None
                array = np.load(io.BytesIO(stream.read()), allow_pickle=False)
                assert array.dtype == column.numpy
                np.testing.assert_array_equal(array, sample.arrays[column.name])


def test_header_is_the_one_the_standard_library_writes(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a", "tar", 1)
    data = (path / "shards/train-00000-of-00001.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            ours, theirs = data[member.offset : member.offset_data], member.tobuf(tarfile.USTAR_FORMAT)
            # Device numbers of a regular file are zeros to us and blanks to it, which changes the checksum at 148.
            assert (ours[:148], ours[156:329]) == (theirs[:148], theirs[156:329])
    assert len(data) % 10240 == 0


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar program here")
def test_tar_program_lists_the_tars_without_complaint(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a", "tar", 1)
    command = ["tar", "tvf", str(path / "shards/train-00000-of-00001.tar")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 80


def test_pyarrow_reads_the_parquet_shards(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a", "parquet", 3)
    rows = []
    for file in sorted((path / "parquet").iterdir()):
        shard = pq.ParquetFile(file, page_checksum_verification=True)
        with shard:
            columns = json.loads(shard.schema_arrow.metadata[b"d2c"])["columns"]
            rows += shard.read().to_pylist()
            for i in range(shard.metadata.num_columns):
                chunk = shard.metadata.row_group(0).column(i)
                assert (chunk.compression, chunk.has_dictionary_page) == ("UNCOMPRESSED", False)
                assert not chunk.is_stats_set
    for sample, row in zip(make_samples(), rows, strict=True):
        assert (row["key"], row["label"], json.loads(row["json"])) == (sample.key, sample.label, _stored(sample))
        for column in columns:
            array = np.frombuffer(row[column["name"]], f"<{column['dtype']}").reshape(column["shape"])
            np.testing.assert_array_equal(array, sample.arrays[column["name"]])


def test_row_groups_are_small_where_samples_are_large(tmp_path: Path) -> None:
    for side, rows in ((8, 130), (128, 64)):
        columns = (Column("latent", "f2", (2, 4, side, side)),)
        path = write_artifact(tmp_path / str(side), "parquet", 1, make_samples(130, columns), columns)
        metadata = pq.read_metadata(path / "parquet/train-00000-of-00001.parquet")
        assert metadata.row_group(0).num_rows == rows


@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_index_alone_is_enough_to_fetch_one_array(tmp_path: Path, container: str) -> None:
    path = write_artifact(tmp_path / "a", container)
    row = pq.read_table(path / "meta/samples.parquet").to_pylist()[13]
    with (path / row["shard"]).open("rb") as stream:
        stream.seek(row["latent.offset"])
        array = np.frombuffer(stream.read(row["latent.nbytes"]), "<f2").reshape(2, 4, 4, 4)
    np.testing.assert_array_equal(array, make_samples()[13].arrays["latent"])


class _Ranges(SimpleHTTPRequestHandler):
    """The standard library's file server, with ranges, as object stores and hubs have them."""

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            return super().do_GET()
        data = Path(self.translate_path(self.path)).read_bytes()[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return None

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address at which `tmp_path` is served."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Ranges, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset needs curl for HTTP, and there is none here")
def test_webdataset_streams_over_http(tmp_path: Path, served: str) -> None:
    write_artifact(tmp_path / "a", "tar", 2)
    urls = f"{served}/a/shards/train-{{00000..00001}}-of-00002.tar"
    with warnings.catch_warnings():
        # It warns about deprecated torch names when imported, and leaves pipes for the garbage collector to close.
        warnings.simplefilter("ignore")
        import webdataset

        read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        gc.collect()
    assert [found["__key__"] for found in read] == [sample.key for sample in make_samples()]
    for sample, found in zip(make_samples(), read, strict=True):
        np.testing.assert_array_equal(found["latent.npy"], sample.arrays["latent"])


def test_standard_library_streams_over_http(tmp_path: Path, served: str) -> None:
    write_artifact(tmp_path / "a", "tar", 1)
    url = f"{served}/a/shards/train-00000-of-00001.tar"
    with urllib.request.urlopen(url) as answer, tarfile.open(fileobj=answer, mode="r|") as tar:
        for member, sample in zip((m for m in tar if m.name.endswith("latent.npy")), make_samples(), strict=True):
            stream = tar.extractfile(member)
            assert stream is not None
            np.testing.assert_array_equal(np.load(io.BytesIO(stream.read())), sample.arrays["latent"])


@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_one_http_range_is_one_array(tmp_path: Path, container: str, served: str) -> None:
    path = write_artifact(tmp_path / "a", container)
    row = pq.read_table(path / "meta/samples.parquet").to_pylist()[13]
    first, size = row["latent.offset"], row["latent.nbytes"]
    wanted = {"Range": f"bytes={first}-{first + size - 1}"}
    with urllib.request.urlopen(urllib.request.Request(f"{served}/a/{row['shard']}", headers=wanted)) as answer:
        assert answer.status == 206
        data = answer.read()
    assert len(data) == size
    np.testing.assert_array_equal(np.frombuffer(data, "<f2").reshape(2, 4, 4, 4), make_samples()[13].arrays["latent"])


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no coreutils here")
@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_coreutils_check_the_sums(tmp_path: Path, container: str) -> None:
    path = write_artifact(tmp_path / "a", container)
    command = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    done = subprocess.run(command, cwd=path, capture_output=True, text=True, check=True)
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert {line.removesuffix(": OK") for line in done.stdout.splitlines()} == files - {
        "README.md",
        "croissant.json",
        "SHA256SUMS",
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 4, 32, 32), (1000, 16, 2048)])
def test_npy_header_is_what_numpy_reads_and_writes(dtype: str, shape: tuple[int, ...]) -> None:
    header = npy_header(dtype, shape)
    assert len(header) % 64 == 0
    stream = io.BytesIO(header)
    assert np.lib.format.read_magic(stream) == (1, 0)
    assert np.lib.format.read_array_header_1_0(stream) == (shape, False, np.dtype(f"<{dtype}"))
    theirs = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        theirs, {"descr": np.dtype(f"<{dtype}").str, "fortran_order": False, "shape": shape}
    )
    size = len(theirs.getvalue()) + int(np.prod(shape)) * np.dtype(dtype).itemsize
    assert parse_npy_header(theirs.getvalue(), size, "x")[:2] == (dtype, shape)


@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_examples_of_the_documentation_run(tmp_path: Path, container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).resolve().parents[1] / "docs/format.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    other = {"tar": "parquet/", "parquet": "shards/"}[container]
    write_coded(tmp_path / "my-artifact", INT8, container)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    ran = 0
    for example in examples:
        if f"my-artifact/{other}" not in example:
            scope: dict[str, Any] = {}
            with warnings.catch_warnings():
                # webdataset leaves files for the garbage collector to close.
                warnings.simplefilter("ignore")
                exec(example, scope)
                gc.collect()
            if INT8 in example:
                last = open_artifact("my-artifact").values("tokens", [-1])[0]
                np.testing.assert_array_equal(scope["tokens"], last, strict=True)
            ran += 1
    assert ran == 5
