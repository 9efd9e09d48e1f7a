"""What comes in: resumed, repaired and checked, and at its place only when it is whole."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from formats_fixture import contents
from killing import run_and_kill
from publishing_fixture import artifact, flip, names, pull, resign

from d2c import fetching
from d2c.errors import D2CError, UsageError
from d2c.fetching import FetchingConfig
from d2c.remotes import UnavailableError, pieces
from d2c.remotes.folder import Folder
from formats.errors import FormatError, IntegrityError, VersionError
from formats.files import read_json, write_json
from formats.hashing import sha256_file
from formats.lock import WriterLock

TEXTS = {"manifest.json", "SHA256SUMS", "README.md", "croissant.json", "LICENSE"}


def pull_in_a_process(config: FetchingConfig, progress: Any) -> None:
    pieces.PIECE = 1 << 10
    fetching.run(fetching.plan(config, progress), progress)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the files that were read from a folder that is pulled from."""
    seen: set[str] = set()
    read = Folder.read

    def note(self: Folder, name: str, start: int, end: int) -> bytes:
        seen.add(name)
        return read(self, name, start, end)

    monkeypatch.setattr(Folder, "read", note)
    return seen


def test_a_killed_pull_goes_on_where_it_stopped(tmp_path: Path, fetched: set[str]) -> None:
    made = artifact(tmp_path / "made")
    out = tmp_path / "got"
    config = FetchingConfig(source=str(made), out=out)
    shards = sorted(f"shards/{name}" for name in names(made / "shards"))
    size = (made / shards[0]).stat().st_size
    run_and_kill(pull_in_a_process, config, "pull", 2 * size + 3000)
    assert not out.exists()
    parts = list((tmp_path / "got.partial-pull" / "parts").iterdir())
    assert [part.stat().st_size for part in parts] == [3072]

    starts: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        read = Folder.read
        patch.setattr(Folder, "read", lambda self, *args: (starts.append(args[1]), read(self, *args))[1])
        again = pull(made, out)
    assert 3072 in starts
    assert not fetched & set(shards[:2])
    assert fetched >= set(shards[2:])
    assert again.skipped == 2
    assert contents(out) == contents(made)
    assert names(tmp_path) == ["got", "made"]


def test_a_part_of_other_content_is_not_resumed(tmp_path: Path) -> None:
    made = artifact(tmp_path / "made")
    record = read_json(made / "manifest.json")["files"][1]
    part = tmp_path / "got.partial-pull" / "parts" / record["sha256"]
    part.parent.mkdir(parents=True)
    part.write_bytes(b"torn by a power cut")
    write_json(tmp_path / "got.partial-pull" / "origin.json", {})
    stray = tmp_path / "got.partial-pull" / "artifact" / "shards" / "of-an-older-version.tar"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"x")
    pull(made, tmp_path / "got")
    assert contents(tmp_path / "got") == contents(made)


def test_an_intact_copy_is_left_alone_and_a_damaged_one_gets_only_what_it_lacks(
    tmp_path: Path, fetched: set[str]
) -> None:
    made = artifact(tmp_path / "made")
    out = tmp_path / "got"
    pull(made, out)
    before = (out / "manifest.json").stat().st_ino
    assert pull(made, out).files == 0
    assert (out / "manifest.json").stat().st_ino == before

    shards = sorted((out / "shards").iterdir())
    flip(shards[0])
    shards[2].unlink()
    (out / "manifest.json").write_text("{")
    fetched.clear()
    result = pull(made, out)
    assert fetched - TEXTS == {f"shards/{shards[0].name}", f"shards/{shards[2].name}"}
    assert (result.files, result.skipped) == (2, len(read_json(made / "manifest.json")["files"]) - 2)
    assert contents(out) == contents(made)
    assert names(tmp_path) == ["got", "made"]


def test_something_else_at_the_place_is_kept(tmp_path: Path) -> None:
    made = artifact(tmp_path / "made")
    mine, mixed, other = tmp_path / "mine", tmp_path / "mixed", tmp_path / "other"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    pull(made, mixed)
    (mixed / "notes.txt").write_text("mine")
    artifact(other, "parquet")
    before = {path: contents(path) for path in (mine, mixed, other)}
    for path, overwrite in ((mine, False), (mine, True), (mixed, False), (mixed, True), (other, False)):
        with pytest.raises(FormatError):
            pull(made, path, overwrite=overwrite)
        assert contents(path) == before[path]
    partial = tmp_path / "new.partial-pull"
    partial.mkdir()
    (partial / "mine").write_text("x")
    with pytest.raises(D2CError, match="no unfinished pull"):
        pull(made, tmp_path / "new")
    pull(made, other, overwrite=True)
    assert contents(other) == contents(made)
    assert names(tmp_path) == ["made", "mine", "mixed", "new.partial-pull", "other"]


def test_a_tampered_shard_is_an_error_and_nothing_appears(tmp_path: Path) -> None:
    made = artifact(tmp_path / "made")
    shard = sorted((made / "shards").iterdir())[1]
    good = shard.read_bytes()
    for bad in (good[:700] + bytes([good[700] ^ 1]) + good[701:], good[:-1], b""):
        shard.write_bytes(bad)
        with pytest.raises(IntegrityError, match="does not arrive as the manifest describes") as caught:
            pull(made, tmp_path / "got")
        assert caught.value.where == str(shard)
        assert f"{len(bad):,} bytes" in str(caught.value.found)
        assert f"{len(good):,} bytes" in str(caught.value.expected)
        assert not (tmp_path / "got").exists()
    shard.unlink()
    with pytest.raises(IntegrityError, match="missing") as caught:
        pull(made, tmp_path / "got")
    assert None not in (caught.value.found, caught.value.expected, caught.value.hint)
    shard.mkdir()
    with pytest.raises(IntegrityError, match="a folder is where the file should be"):
        pull(made, tmp_path / "got")
    shard.rmdir()
    assert names(tmp_path) == ["got.partial-pull", "made"]
    shard.write_bytes(good)
    assert pull(made, tmp_path / "got").skipped == 1


def test_a_download_that_was_corrupted_on_the_way_is_repeated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = artifact(tmp_path / "made")
    bad = {path.relative_to(made).as_posix() for path in (made / "shards").iterdir()}
    read = Folder.read

    def corrupt(self: Folder, name: str, start: int, end: int) -> bytes:
        data = read(self, name, start, end)
        if name in bad:
            bad.remove(name)
            return data[: len(data) // 2]
        return data

    monkeypatch.setattr(Folder, "read", corrupt)
    pull(made, tmp_path / "got")
    assert not bad
    assert contents(tmp_path / "got") == contents(made)


def test_a_store_that_stumbles_is_asked_again_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = artifact(tmp_path / "made")
    waits: list[float] = []
    monkeypatch.setattr(pieces.time, "sleep", waits.append)
    read, failures = Folder.read, [2]

    def stumble(self: Folder, name: str, start: int, end: int) -> bytes:
        if name.startswith("shards/") and failures[0]:
            failures[0] -= 1
            raise UnavailableError("timed out", where=name)
        return read(self, name, start, end)

    monkeypatch.setattr(Folder, "read", stumble)
    pull(made, tmp_path / "got")
    assert waits == list(pieces.BACKOFF[:2])
    failures[0] = 1000
    with pytest.raises(UnavailableError, match="timed out"):
        pull(made, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    failures[0] = 0
    pull(made, tmp_path / "other")


@pytest.mark.parametrize(
    "path", ["../evil", "/tmp/evil", "shards/../../evil", "shards//evil", "shards/.evil", "a\\..\\b"]
)
def test_a_path_that_leaves_the_artifact_is_refused_before_anything_is_fetched(
    tmp_path: Path, path: str, fetched: set[str]
) -> None:
    made = artifact(tmp_path / "made")
    manifest = read_json(made / "manifest.json")
    manifest["files"][-1]["path"] = path
    write_json(made / "manifest.json", manifest)
    resign(made)
    with pytest.raises(IntegrityError, match="malformed") as caught:
        pull(made, tmp_path / "out" / "got")
    assert path[:10] in str(caught.value)
    assert fetched <= TEXTS
    assert names(tmp_path) == ["made"]


def test_a_root_from_a_trusted_place_is_held_against_the_source(tmp_path: Path, fetched: set[str]) -> None:
    made = artifact(tmp_path / "made")
    root = sha256_file(made / "SHA256SUMS")
    with pytest.raises(IntegrityError, match="not the artifact that was asked for") as caught:
        pull(made, tmp_path / "got", root="0" * 64)
    assert root in str(caught.value.found)
    assert fetched == {"SHA256SUMS"}
    assert names(tmp_path) == ["made"]
    assert pull(made, tmp_path / "got", root=root).root == root
    with pytest.raises(UsageError, match="no sha256"):
        FetchingConfig(source="x", out=tmp_path, root="abc")


def test_a_manifest_that_its_sums_do_not_vouch_for_is_refused(tmp_path: Path) -> None:
    made = artifact(tmp_path / "made")
    sums = (made / "SHA256SUMS").read_text()
    flip(made / "manifest.json")
    with pytest.raises(IntegrityError, match="not the one that SHA256SUMS lists"):
        pull(made, tmp_path / "got")
    flip(made / "manifest.json")
    (made / "SHA256SUMS").write_text(sums.replace("classes/classes.json", "classes/classes.jsom"))
    with pytest.raises(IntegrityError, match="list different files"):
        pull(made, tmp_path / "got")
    (made / "manifest.json").write_text("[" * 100_000)
    digest = hashlib.sha256(b"[" * 100_000).hexdigest()
    (made / "SHA256SUMS").write_text(f"{digest}  manifest.json\n")
    with pytest.raises(IntegrityError, match="not valid JSON"):
        pull(made, tmp_path / "got")
    assert names(tmp_path) == ["made"]


def test_a_newer_format_is_refused_before_anything_is_fetched(tmp_path: Path, fetched: set[str]) -> None:
    made = artifact(tmp_path / "made")
    manifest = read_json(made / "manifest.json")
    for change in ({"version": "2.0"}, {"required_features": ["codec:of-the-future"]}):
        write_json(made / "manifest.json", {**manifest, "format": {**manifest["format"], **change}})
        resign(made)
        with pytest.raises(VersionError):
            pull(made, tmp_path / "got")
    assert fetched <= TEXTS
    assert names(tmp_path) == ["made"]


def test_what_arrives_as_published_is_still_verified(tmp_path: Path) -> None:
    made = artifact(tmp_path / "made")
    manifest = read_json(made / "manifest.json")
    write_json(made / "manifest.json", {**manifest, "content_id": "d2c1-xxh3-128:" + "0" * 32})
    resign(made)
    with pytest.raises(IntegrityError, match="no sound artifact"):
        pull(made, tmp_path / "got")
    assert not (tmp_path / "got").exists()


def test_two_pulls_at_once_are_not_mixed(tmp_path: Path) -> None:
    made = artifact(tmp_path / "made")
    lock = WriterLock(tmp_path / "got.lock")
    with pytest.raises(FormatError, match=f"held by process {os.getpid()}"):
        pull(made, tmp_path / "got")
    lock.release()
    pull(made, tmp_path / "got")
