"""Where a pulled artifact may go: nothing of anybody's is lost, and a kill leaves nothing that is in the way."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from formats_fixture import contents, make_samples, write_artifact
from publishing_fixture import LICENCE, artifact, flip, names, pull, push
from typer.testing import CliRunner

from d2c import fetching
from d2c.errors import D2CError, UsageError
from d2c.fetching import FetchingConfig
from d2c_cli.app import app
from formats.errors import FormatError
from formats.files import write_json
from formats.swap import recover


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    made = artifact(tmp_path / "made")
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "got").symlink_to(disk / "a")
    with pytest.raises(FormatError, match="leads nowhere") as caught:
        pull(tmp_path / "typo", tmp_path / "got")
    assert caught.value.where == str(tmp_path / "got")
    artifact(disk / "a", "parquet")
    pull(made, tmp_path / "got", overwrite=True)
    assert (tmp_path / "got").readlink() == disk / "a"
    assert contents(disk / "a") == contents(made)
    assert names(disk) == ["a"]
    assert names(tmp_path) == ["disk", "got", "made"]


def test_recovery_unlinks_links_and_leaves_what_they_lead_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("years of work")
    (tmp_path / "got").mkdir()
    for name in (".tmp-1-got.replaced", ".tmp-1-got.partial-pull.deleted"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    recover(tmp_path / "got")
    assert names(tmp_path) == ["got", "mine"]
    assert names(tmp_path / "mine") == ["thesis"]


def test_places_that_cannot_be_renamed_to_are_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, here = artifact(tmp_path / "made"), tmp_path / "here"
    (here / "in").mkdir(parents=True)
    for folder, out in ((here, "."), (here, ""), (here, here), (here / "in", here)):
        monkeypatch.chdir(folder)
        with pytest.raises(FormatError, match="folder that you are in"):
            pull(tmp_path / "typo", Path(out))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == here)
    with pytest.raises(FormatError, match="mount point") as caught:
        pull(tmp_path / "typo", here)
    assert str(here / "shards") in str(caught.value.hint)
    pull(made, here / "shards")


@pytest.mark.parametrize("inner", ["", "copy", "shards/copy"])
def test_an_artifact_goes_not_into_itself(tmp_path: Path, inner: str) -> None:
    made = artifact(tmp_path / "made")
    (tmp_path / "link").symlink_to(made)
    before = contents(made)
    with pytest.raises(UsageError, match="into itself"):
        push(made, tmp_path / "link" / inner)
    with pytest.raises(UsageError, match="into itself"):
        pull(made, tmp_path / "link" / inner)
    assert contents(made) == before


def test_what_a_kill_leaves_is_not_in_the_way(tmp_path: Path) -> None:
    made, partial = artifact(tmp_path / "made"), tmp_path / "got.partial-pull"
    torn = partial / ".tmp-4711-origin.json"
    partial.mkdir()
    torn.write_text("{")
    pull(made, tmp_path / "got")
    assert names(tmp_path) == ["got", "made"]
    # Between the swap and the cleaning up.
    (partial / "parts").mkdir(parents=True)
    write_json(partial / "origin.json", {})
    torn.write_text("{")
    shutil.copytree(partial, tmp_path / ".tmp-4711-got.partial-pull.deleted")
    assert pull(made, tmp_path / "got").files == 0
    assert names(tmp_path) == ["got", "made"]
    partial.mkdir()
    (partial / "mine").write_text("x")
    pull(made, tmp_path / "got")
    assert names(partial) == ["mine"]


def test_an_earlier_pull_is_replaced_with_its_licence(tmp_path: Path) -> None:
    old = write_artifact(tmp_path / "old", "tar", 3, licence=LICENCE)
    new = artifact(tmp_path / "new", samples=make_samples(12))
    for made in (old, new):
        (made / "LICENSE").write_text("CC0")
    out = tmp_path / "got"
    pull(old, out)
    with pytest.raises(D2CError, match="another artifact"):
        pull(new, out)
    pull(new, out, overwrite=True)
    assert contents(out) == contents(new)
    assert names(tmp_path) == ["got", "new", "old"]
    (out / "LICENSE").write_text("mine")
    pull(old, out, overwrite=True)
    assert contents(out) == contents(old)
    kept = next(tmp_path.glob("got.LICENSE-*"))
    assert kept.read_text() == "mine"


def test_a_copy_without_a_readable_manifest_is_replaced_when_asked(tmp_path: Path) -> None:
    made, out = artifact(tmp_path / "made"), tmp_path / "got"
    pull(made, out)
    for text in ("{", None):
        (out / "SHA256SUMS").unlink(missing_ok=True)
        (out / "manifest.json").write_text("{") if text else (out / "manifest.json").unlink()
        with pytest.raises(D2CError, match="left of an artifact") as caught:
            pull(made, out)
        assert "move it away" in str(caught.value.hint)
        (out / "thesis.tex").write_text("years of work")
        with pytest.raises(FormatError, match="something else") as caught:
            pull(made, out, overwrite=True)
        assert "thesis.tex" in str(caught.value.found)
        (out / "thesis.tex").unlink()
        assert pull(made, out, overwrite=True).files == 0
        assert contents(out) == contents(made)


@pytest.mark.parametrize("manifest", [None, "{}", '{"name": "a web page"}'])
def test_a_folder_with_a_few_of_the_names_is_no_artifact(tmp_path: Path, manifest: str | None) -> None:
    made, out = artifact(tmp_path / "made"), tmp_path / "web"
    out.mkdir()
    (out / "README.md").write_text("mine")
    if manifest:
        (out / "manifest.json").write_text(manifest)
    before = contents(out)
    with pytest.raises(FormatError, match="something else"):
        pull(made, out, overwrite=True)
    assert contents(out) == before


def test_healing_keeps_the_readme_that_somebody_wrote(tmp_path: Path) -> None:
    made, out = artifact(tmp_path / "made"), tmp_path / "got"
    pull(made, out)
    (out / "README.md").write_text("mine")
    flip(next((out / "shards").iterdir()))
    assert pull(made, out).files == 1
    assert contents(out) == {**contents(made), "README.md": b"mine"}


@pytest.mark.parametrize("call", ["push", "pull"])
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    made, to = artifact(tmp_path / "made"), tmp_path / "to"
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")

    def onto_full(descriptor: int) -> None:
        full.write_bytes(b"x")

    plan = fetching.plan(FetchingConfig(source=str(made), out=to))
    monkeypatch.setattr(os, "fsync", onto_full)
    with pytest.raises(OSError, match="No space left") as caught:
        push(made, to) if call == "push" else fetching.run(plan)
    assert str(caught.value.filename).startswith(str(to))


def d2c(*args: str | Path) -> Any:
    return CliRunner().invoke(app, [*map(str, args)], prog_name="d2c", catch_exceptions=False)


def test_the_command_line_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = artifact(tmp_path / "made")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for args in (("inspect", "."), ("push", ".", tmp_path / "x")):
        result = d2c(*args)
        assert (result.exit_code, "no finished artifact" in result.stderr) == (1, True), args
    for usage in (("push", made, ""), ("pull", "", "x")):
        assert d2c(*usage).exit_code == 2, usage
    for here in ("", "."):
        result = d2c("pull", made, here)
        assert (result.exit_code, "the folder that you are in" in result.stderr) == (1, True)
    result = d2c("pull", tmp_path / "nope", "x")
    assert (result.exit_code, "d2c push" in result.stderr) == (1, False)
    assert "no published artifact" in result.stderr
    assert f"did you mean {made}" in d2c("pull", tmp_path / "mad", "x").stderr
    assert names(tmp_path / "empty") == []


def test_a_password_in_a_url_is_neither_shown_nor_kept(tmp_path: Path) -> None:
    made = artifact(tmp_path / "made")
    # ftp connects as soon as it is named; nobody listens on port 1.
    url = "ftp://user:secret@127.0.0.1:1/x"
    for args in (("push", made, url), ("pull", url, tmp_path / "got"), ("push", made, "s4://user:secret@host/x")):
        for options in ((), ("--json",)):
            result = d2c(*args, *options)
            assert result.exit_code in (1, 2)
            assert "secret" not in result.stdout + result.stderr
            assert "://" in result.stderr
