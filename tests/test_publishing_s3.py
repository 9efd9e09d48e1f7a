"""Publishing to S3 as a real server speaks it: moto's, on loopback."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from formats_fixture import contents, make_samples, write_artifact
from publishing_fixture import LICENCE, artifact, names, pull, push

from d2c.errors import D2CError
from d2c.remotes import Outgoing, open_store, pieces
from d2c.remotes import objects as remote_objects
from formats.errors import IntegrityError
from formats.files import read_json
from formats.hashing import sha256_file

s3fs = pytest.importorskip("s3fs", reason="s3:// needs s3fs: pip install 'd2c-toolkit[s3]'")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bucket(store: Any) -> str:
    """An empty bucket."""
    return "pets"


@functools.cache
def s3() -> Any:
    return s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)


def objects(prefix: str) -> dict[str, bytes]:
    return {path.removeprefix(f"{prefix}/"): data for path, data in s3().cat(s3().find(prefix)).items()}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was stored and removed, in order, by the last part of its name."""
    done: list[str] = []
    put, remove = s3fs.S3FileSystem._put_file, s3fs.S3FileSystem._rm_file

    async def note_put(self: Any, here: str, there: str, **options: Any) -> None:
        done.append(f"+{there.rpartition('/')[2]}")
        await put(self, here, there, **options)

    async def note_remove(self: Any, path: str, **options: Any) -> None:
        done.append(f"-{path.rpartition('/')[2]}")
        await remove(self, path, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_put_file", note_put)
    monkeypatch.setattr(s3fs.S3FileSystem, "_rm_file", note_remove)
    return done


@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_round_trip_keeps_every_byte(tmp_path: Path, bucket: str, container: str) -> None:
    made = artifact(tmp_path / "made", container)
    result = push(made, f"s3://{bucket}/sets/tiny/")
    assert objects(f"{bucket}/sets/tiny") == contents(made)
    got = pull(f"s3://{bucket}/sets/tiny", tmp_path / "got", root=result.root)
    assert contents(tmp_path / "got") == contents(made)
    assert got.content_id == result.content_id


def test_an_upload_goes_on_and_the_manifest_comes_last(tmp_path: Path, bucket: str, sent: list[str]) -> None:
    made = artifact(tmp_path / "made")
    url, prefix = f"s3://{bucket}/a", f"{bucket}/a"
    push(made, url)
    assert sent[-2:] == ["+SHA256SUMS", "+manifest.json"]
    sent.clear()
    assert push(made, url).files == 0
    assert sent == []
    s3().rm_file(f"{prefix}/manifest.json")
    s3().rm_file(f"{prefix}/shards/train-00001-of-00004.tar")
    with pytest.raises(D2CError, match="no published artifact"):
        pull(url, tmp_path / "got")
    # As many bytes, stored by somebody who does not say what they are: read, and found to be others.
    size = (made / "shards/train-00002-of-00004.tar").stat().st_size
    s3().pipe_file(f"{prefix}/shards/train-00002-of-00004.tar", bytes(size))
    s3().pipe_file(f"{prefix}/shards/train-00003-of-00004.tar", (made / "shards/train-00003-of-00004.tar").read_bytes())
    sent.clear()
    push(made, url)
    assert sent == ["+train-00001-of-00004.tar", "+train-00002-of-00004.tar", "+manifest.json"]
    assert objects(prefix) == contents(made)


def test_the_old_manifest_goes_before_anything_else_changes(tmp_path: Path, bucket: str, sent: list[str]) -> None:
    old = write_artifact(tmp_path / "old", "tar", 3, licence=LICENCE)
    new = artifact(tmp_path / "new", samples=make_samples(12))
    push(old, f"s3://{bucket}")
    with pytest.raises(D2CError, match="another artifact is published"):
        push(new, f"s3://{bucket}")
    sent.clear()
    push(new, f"s3://{bucket}", overwrite=True)
    assert sent[0] == "-manifest.json"
    assert sent[-1] == "+manifest.json"
    assert objects(bucket) == contents(new)


def test_a_tampered_object_is_an_error_and_only_it_is_fetched_again(tmp_path: Path, bucket: str) -> None:
    made = artifact(tmp_path / "made")
    push(made, f"s3://{bucket}/a")
    path = f"{bucket}/a/shards/train-00001-of-00004.tar"
    good = s3().cat_file(path)
    for bad in (good[:-1] + b"x", good[:1000]):
        s3().pipe_file(path, bad)
        with pytest.raises(IntegrityError, match="train-00001-of-00004"):
            pull(f"s3://{bucket}/a", tmp_path / "got")
        assert names(tmp_path) == ["got.partial-pull", "made"]
    s3().pipe_file(path, good)
    count = len(read_json(made / "manifest.json")["files"])
    assert pull(f"s3://{bucket}/a", tmp_path / "got").skipped == 1
    assert pull(f"s3://{bucket}/a", tmp_path / "other").files == count
    assert contents(tmp_path / "got") == contents(made)


@pytest.mark.parametrize("moment", ["train-00002-of-00003.tar", "SHA256SUMS", "manifest.json"])
def test_two_pushes_at_once_leave_no_manifest_that_lies(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    one = write_artifact(tmp_path / "one", "tar", 3, licence=LICENCE)
    two = artifact(tmp_path / "two")
    url, put = f"s3://{bucket}/a", s3fs.S3FileSystem._put_file

    async def put_late(self: Any, here: str, there: str, **options: Any) -> None:
        """Before this is stored, another push runs from its plan to its end."""
        if there.endswith(moment):
            monkeypatch.setattr(s3fs.S3FileSystem, "_put_file", put)
            command = [sys.executable, "-m", "d2c_cli", "push", str(two), url, "--overwrite"]
            done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
            assert done.returncode == 0, done.stderr
        await put(self, here, there, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_put_file", put_late)
    with pytest.raises(D2CError, match="did not keep every file"):
        push(one, url)
    assert "manifest.json" not in objects(f"{bucket}/a")
    push(two, url, overwrite=True)
    assert objects(f"{bucket}/a") == contents(two)


def test_a_damaged_object_is_healed_whatever_is_noted_with_it(
    tmp_path: Path, bucket: str, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = artifact(tmp_path / "made")
    url, name = f"s3://{bucket}/a", "train-00001-of-00004.tar"
    push(made, url)
    good = (made / "shards" / name).read_bytes()
    bad = good[:700] + bytes([good[700] ^ 1]) + good[701:]
    facts = next(file for file in read_json(made / "manifest.json")["files"] if file["path"].endswith(name))

    def damage() -> None:
        s3().pipe_file(f"{bucket}/a/shards/{name}", bad, Metadata={"sha256": facts["sha256"]})
        sent.clear()

    damage()
    assert push(made, url).files == 1
    assert sent == [f"+{name}"]
    # A store that gives the tag of the good bytes to the bad ones.
    damage()
    with monkeypatch.context() as patch:
        patch.setattr(remote_objects, "s3_tag", lambda path, part: s3().info(f"{bucket}/a/shards/{name}")["ETag"][1:-1])
        assert push(made, url, overwrite=True).files == 1
    assert objects(f"{bucket}/a") == contents(made)
    # An object in parts, whose tag is no MD5 of its bytes.
    monkeypatch.setattr(remote_objects, "_PART", 5 << 20)
    large = tmp_path / "large"
    large.write_bytes(os.urandom(11 << 20))
    store = open_store(url)
    file = Outgoing("shards/large", large, 11 << 20, sha256_file(large))
    store.send([file], [], lambda count: None, lambda: None)
    assert s3().info(f"{bucket}/a/shards/large")["ETag"].endswith('-3"')
    with monkeypatch.context() as patch:
        patch.setattr(remote_objects.ObjectStore, "read", lambda *args: pytest.fail("read back without need"))
        assert store.holds(file)
    assert store.holds(file, closely=True)


def test_an_object_that_ends_too_early_is_damage(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = artifact(tmp_path / "made")
    (made / "LICENSE").write_text("")
    push(made, f"s3://{bucket}/a")
    pull(f"s3://{bucket}/a", tmp_path / "got")
    assert contents(tmp_path / "got") == contents(made)
    path = f"{bucket}/a/shards/train-00001-of-00004.tar"
    s3().pipe_file(path, s3().cat_file(path)[:4096])
    monkeypatch.setattr(pieces, "PIECE", 1024)
    with pytest.raises(IntegrityError, match="does not arrive"):
        pull(f"s3://{bucket}/a", tmp_path / "other")


def test_errors_name_the_remedy(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = artifact(tmp_path / "made")
    for call in (lambda: push(made, "s3://no-such-bucket/a"), lambda: pull("s3://no-such-bucket/a", tmp_path / "got")):
        with pytest.raises(D2CError, match="no such bucket"):
            call()
    with pytest.raises(D2CError, match="no published artifact"):
        pull(f"s3://{bucket}/nothing", tmp_path / "got")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(D2CError, match="no credentials") as caught:
        push(made, f"s3://{bucket}/a")
    assert "AWS_ACCESS_KEY_ID" in str(caught.value.hint)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(D2CError, match="not installed") as caught:
        push(made, f"s3://{bucket}/a")
    assert caught.value.hint == 'pip install "d2c-toolkit[s3]"'
    assert names(tmp_path) == ["made"]


def test_from_the_shell(tmp_path: Path, bucket: str) -> None:
    made = artifact(tmp_path / "made")

    def d2c(*args: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "d2c_cli", *args]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = d2c("push", "made", f"s3://{bucket}/a")
    assert done.returncode == 0, done.stderr
    done = d2c("pull", f"s3://{bucket}/a", "got")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "got") == contents(made)
    done = d2c("push", "made", "s3://no-such-bucket/a")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
