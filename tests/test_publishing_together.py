"""Several pushes to one folder, pushes that were killed, and links that lead out of it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from formats_fixture import contents, make_samples, write_artifact
from killing import run_and_kill
from publishing_fixture import LICENCE, artifact, names, pull, push

from d2c import publishing
from d2c.errors import D2CError
from d2c.publishing import PublishingConfig
from formats.errors import FormatError
from formats.lock import WriterLock


def plan(made: Path, shelf: Path, **options: Any) -> publishing.Plan:
    return publishing.plan(PublishingConfig(artifact=made, destination=str(shelf), **options))


def test_one_push_at_a_time(tmp_path: Path) -> None:
    made, shelf = artifact(tmp_path / "made"), tmp_path / "shelf"
    (tmp_path / "link").symlink_to(shelf)
    shelf.mkdir()
    lock = WriterLock(tmp_path / "shelf.lock")
    for name in ("shelf", "link"):
        with pytest.raises(FormatError, match=f"held by process {os.getpid()}"):
            push(made, tmp_path / name)
    assert names(shelf) == []
    lock.release()
    push(made, tmp_path / "link")
    assert contents(shelf) == contents(made)
    assert names(tmp_path) == ["link", "made", "shelf"]


def test_a_push_that_was_planned_before_another_looks_again(tmp_path: Path) -> None:
    old = write_artifact(tmp_path / "old", "tar", 3, licence=LICENCE)
    new = artifact(tmp_path / "new", samples=make_samples(12))
    shelf = tmp_path / "shelf"
    late, same, forced = plan(new, shelf), plan(old, shelf), plan(new, shelf, overwrite=True)
    push(old, shelf)
    with pytest.raises(D2CError, match="another artifact is published"):
        publishing.run(late)
    assert contents(shelf) == contents(old)
    assert publishing.run(same).files == 0
    publishing.run(forced)
    assert contents(shelf) == contents(new)


def test_what_arrives_otherwise_is_not_left_with_a_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, shelf = artifact(tmp_path / "made"), tmp_path / "shelf"
    copy = shutil.copyfile

    def spoil(here: Path, there: Path) -> None:
        copy(here, there)
        if there.name.endswith("00001-of-00004.tar"):
            there.write_bytes(bytes(there.stat().st_size))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", spoil)
        with pytest.raises(D2CError, match="train-00001-of-00004"):
            push(made, shelf)
    assert not (shelf / "manifest.json").exists()
    push(made, shelf)
    assert contents(shelf) == contents(made)


def push_and_die(config: PublishingConfig, progress: Any) -> None:
    copy = shutil.copyfile

    def die(here: Path, there: Path) -> None:
        there.write_bytes(b"torn")
        if here.name.startswith("train-00001"):
            os.kill(os.getpid(), signal.SIGKILL)
        copy(here, there)

    shutil.copyfile = die  # type: ignore[assignment]
    publishing.run(publishing.plan(config), progress)


def test_a_killed_push_is_finished_by_the_next(tmp_path: Path) -> None:
    made, shelf = artifact(tmp_path / "made"), tmp_path / "shelf"
    run_and_kill(push_and_die, PublishingConfig(artifact=made, destination=str(shelf)), "none", 1)
    torn = next((shelf / "shards").glob(".tmp-*"))
    (shelf / ".tmp-4711-manifest.json").write_text("{")
    (shelf / "shards" / ".tmp-mine").write_text("not a write that was torn")
    with pytest.raises(D2CError, match="not part of this artifact") as caught:
        push(made, shelf)
    assert caught.value.found == "shards/.tmp-mine"
    assert torn.exists()
    (shelf / "shards" / ".tmp-mine").unlink()
    push(made, shelf)
    assert contents(shelf) == contents(made)
    pull(shelf, tmp_path / "got")


@pytest.mark.parametrize("link", ["shards", "meta/thesis", "README.md", "shards/train-00000-of-00004.tar"])
def test_links_in_the_destination_are_not_followed(tmp_path: Path, link: str) -> None:
    made, shelf, mine = artifact(tmp_path / "made"), tmp_path / "shelf", tmp_path / "mine"
    mine.mkdir()
    (mine / "train-00000-of-00009.tar").write_text("years of work")
    path = shelf / link
    path.parent.mkdir(parents=True)
    path.symlink_to(mine if "." not in link else mine / "train-00000-of-00009.tar")
    for overwrite in (False, True):
        with pytest.raises(D2CError, match="symbolic link") as caught:
            push(made, shelf, overwrite=overwrite)
        assert caught.value.where == str(path)
    assert names(mine) == ["train-00000-of-00009.tar"]
    assert path.is_symlink()
