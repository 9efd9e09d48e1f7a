"""Picks are the images that were scored, byte for byte, or are named."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from d2c import picks as picked
from d2c.errors import D2CError
from d2c.picks import Picks
from d2c.progress import Bar, Silent
from d2c.sources import open_source
from formats.hashing import xxh3


class Counted:
    def __init__(self, bar: Bar) -> None:
        self.bar, self.count = bar, 0

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def advance(self, count: int = 1, note: str = "") -> None:
        self.count += count


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(7):
        (tmp_path / "data" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "a" / f"{i}.png").write_bytes(b"image %d" % i)
    return tmp_path / "data"


@pytest.fixture
def wanted(folder: Path) -> Picks:
    keys = [f"a/{i}.png" for i in range(7)]
    return Picks(pa.table({"key": keys, "xxh3": [xxh3((folder / key).read_bytes()) for key in keys]}))


def changed(folder: Path, wanted: Picks) -> tuple[list[str], int]:
    bar = Counted(Silent().bar("check", len(wanted), "image"))
    return picked.changed(open_source(folder), wanted, bar, threads=2), bar.count


def test_unchanged_files_are_all_read_and_none_is_named(folder: Path, wanted: Picks) -> None:
    assert changed(folder, wanted) == ([], 7)


def test_every_changed_or_unreadable_file_is_named(
    folder: Path, wanted: Picks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picked, "_AT_ONCE", 3)
    source = open_source(folder)
    (folder / "a" / "1.png").write_bytes(b"another")
    (folder / "a" / "4.png").unlink()
    (folder / "a" / "6.png").write_bytes(b"")
    bar = Counted(Silent().bar("check", 7, "image"))
    assert picked.changed(source, wanted, bar, threads=2) == ["a/1.png", "a/4.png", "a/6.png"]
    assert bar.count == 7


def test_a_file_that_the_source_does_not_list_is_an_error(folder: Path, wanted: Picks) -> None:
    (folder / "a" / "4.png").unlink()
    with pytest.raises(D2CError, match=r"no longer in the source[\s\S]*a/4\.png"):
        changed(folder, wanted)
