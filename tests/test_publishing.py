"""What leaves the house: verified, licensed, nothing twice, the manifest last. Folders stand for every other place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from formats_fixture import contents, make_samples, write_artifact
from publishing_fixture import LICENCE, artifact, flip, names, pull, push, resign
from typer.testing import CliRunner

from d2c import publishing, remotes
from d2c.errors import D2CError, UsageError
from d2c.progress import Silent
from d2c.publishing import PublishingConfig
from d2c_cli.app import app
from formats import open_artifact
from formats.describe import describe
from formats.errors import FormatError, IntegrityError
from formats.files import read_json, write_json
from formats.hashing import sha256_file


@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_round_trip_keeps_every_byte(tmp_path: Path, container: str) -> None:
    made = artifact(tmp_path / "made", container)
    (made / "LICENSE").write_text("CC0")
    sent = push(made, tmp_path / "shelf" / "a")
    got = pull(tmp_path / "shelf" / "a", tmp_path / "got")
    assert contents(tmp_path / "got") == contents(tmp_path / "shelf" / "a") == contents(made)
    assert (got.content_id, got.root, got.files) == (
        sent.content_id,
        sent.root,
        len(read_json(made / "manifest.json")["files"]),
    )
    assert sent.root == sha256_file(made / "SHA256SUMS")
    assert names(tmp_path) == ["got", "made", "shelf"]


def test_what_is_there_is_not_sent_again(tmp_path: Path) -> None:
    made = artifact(tmp_path / "made")
    first = push(made, tmp_path / "shelf")
    assert (push(made, tmp_path / "shelf").files, first.skipped) == (0, 0)
    shard = next((tmp_path / "shelf" / "shards").iterdir())
    flip(shard)
    (tmp_path / "shelf" / "manifest.json").unlink()
    again = publishing.plan(PublishingConfig(artifact=made, destination=str(tmp_path / "shelf")))
    assert [file.name for file in again.files] == [f"shards/{shard.name}", "manifest.json"]
    publishing.run(again)
    assert contents(tmp_path / "shelf") == contents(made)


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def test_a_card_that_was_edited_there_is_kept(tmp_path: Path) -> None:
    made, shelf = artifact(tmp_path / "made"), tmp_path / "shelf"
    (made / "LICENSE").write_text("CC0")
    push(made, shelf)
    with (shelf / "README.md").open("a") as card:
        card.write("EDITED")
    (shelf / "croissant.json").unlink()
    flip(next((shelf / "shards").iterdir()))
    edited, heard = (shelf / "README.md").read_bytes(), Heard()
    assert publishing.plan(PublishingConfig(artifact=made, destination=str(shelf))).kept == ["README.md"]
    publishing.run(publishing.plan(PublishingConfig(artifact=made, destination=str(shelf))), heard)
    assert contents(shelf) == {**contents(made), "README.md": edited}
    assert "README.md" in heard.lines[-1]
    assert "--overwrite" in heard.lines[-1]
    push(made, shelf, overwrite=True)
    assert contents(shelf) == contents(made)


def test_only_what_belongs_to_the_artifact_is_sent(tmp_path: Path) -> None:
    made = artifact(tmp_path / "made")
    (made / "notes.txt").write_text("mine")
    (tmp_path / "secret").write_text("mine too")
    (made / "LICENSE").symlink_to(tmp_path / "secret")
    push(made, tmp_path / "shelf")
    assert set(contents(made)) - set(contents(tmp_path / "shelf")) == {"notes.txt", "LICENSE"}


@pytest.mark.parametrize(
    "licence", [{}, {**LICENCE, "spdx": " "}, {**LICENCE, "source_terms": ""}, {"spdx": "CC0-1.0"}]
)
def test_without_a_licence_nothing_is_published(tmp_path: Path, licence: dict[str, str]) -> None:
    made = artifact(tmp_path / "made", licence=licence)
    with pytest.raises(FormatError, match=r"licence") as caught:
        push(made, tmp_path / "shelf")
    assert not (tmp_path / "shelf").exists()
    assert caught.value.hint == f"d2c repack {made} NEW --licence SPDX --source-terms URL"


def test_the_hint_about_the_licence_works_for_a_recipe_too(tmp_path: Path) -> None:
    made, shelf = write_artifact(tmp_path / "made", "recipe", licence={}), tmp_path / "shelf"
    with pytest.raises(D2CError) as caught:
        push(made, shelf)
    terms = {"NEW": str(tmp_path / "new"), "SPDX": "CC0-1.0", "URL": "https://example.org/terms"}
    words = [terms.get(word, word) for word in str(caught.value.hint).split()]
    assert d2c(*words[1:])[0] == 0
    assert push(tmp_path / "new", shelf).content_id == open_artifact(made).content_id


def test_a_damaged_artifact_is_not_published(tmp_path: Path) -> None:
    made = artifact(tmp_path / "made")
    flip(next((made / "shards").iterdir()))
    with pytest.raises(IntegrityError, match="damaged artifact"):
        push(made, tmp_path / "shelf")
    assert not (tmp_path / "shelf").exists()


def test_a_manifest_with_a_wrong_sha256_is_not_published(tmp_path: Path) -> None:
    made = artifact(tmp_path / "made")
    manifest = read_json(made / "manifest.json")
    manifest["files"][0]["sha256"] = "0" * 64
    write_json(made / "manifest.json", manifest)
    resign(made)
    with pytest.raises(IntegrityError, match="not the one that the manifest lists"):
        push(made, tmp_path / "shelf")
    assert not (tmp_path / "shelf").exists()


def test_another_artifact_is_replaced_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_artifact(tmp_path / "old", "tar", 3, licence=LICENCE)
    new = artifact(tmp_path / "new", samples=make_samples(12))
    shelf = tmp_path / "shelf"
    push(old, shelf)
    with pytest.raises(D2CError, match="another artifact is published"):
        push(new, shelf)
    assert contents(shelf) == contents(old)

    def fail(*_: object) -> None:
        raise OSError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", fail)
        with pytest.raises(OSError, match="gone"):
            push(new, shelf, overwrite=True)
    assert not (shelf / "manifest.json").exists()
    with pytest.raises(D2CError, match="no published artifact"):
        pull(shelf, tmp_path / "got")
    push(new, shelf, overwrite=True)
    assert contents(shelf) == contents(new)


def test_foreign_files_in_the_way_are_never_removed(tmp_path: Path) -> None:
    made = artifact(tmp_path / "made")
    thesis = tmp_path / "shelf" / "meta" / "thesis.tex"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(D2CError, match="not part of this artifact") as caught:
            push(made, tmp_path / "shelf", overwrite=overwrite)
        assert "meta/thesis.tex" in str(caught.value)
    assert contents(tmp_path / "shelf") == {"meta/thesis.tex": b"years of work"}


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("s4://bucket/a", "did you mean s3"),
        ("S3:/bucket/a", "for a local path"),
        ("hf:org/name", "for a local path"),
        ("s3://", None),
        ("hf://name", None),
        ("hf://models/org/name", None),
        ("hf://datasets/org/name/sub", None),
    ],
)
def test_a_malformed_url_is_a_usage_error(tmp_path: Path, url: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        remotes.open_store(url)
    assert hint is None or hint in str(caught.value.hint)


def test_private_is_only_for_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--private"):
        push(artifact(tmp_path / "made"), tmp_path / "shelf", private=True)


def d2c(*args: str | Path) -> tuple[int, dict[str, Any], str]:
    result = CliRunner().invoke(app, [*map(str, args), "--json"], prog_name="d2c", catch_exceptions=False)
    return result.exit_code, json.loads(result.stdout), result.stderr


def test_an_artifact_has_one_size(tmp_path: Path) -> None:
    made, shelf, got = artifact(tmp_path / "made"), tmp_path / "shelf", tmp_path / "got"
    size = describe(made)["bytes"]
    assert size == sum(file["bytes"] for file in read_json(made / "manifest.json")["files"])
    for name, here, there in (("push", made, shelf), ("pull", shelf, got)):
        for more in (("--dry-run",), (), ()):
            assert d2c(name, here, there, *more)[1]["bytes"] == size
        assert d2c(name, here, there)[1]["transfer_bytes"] == 0
    for _ in range(2):
        assert d2c("repack", made, tmp_path / "same")[1]["bytes"] == size


def test_the_commands_tell_scripts_what_happened(tmp_path: Path) -> None:
    made, shelf, got = artifact(tmp_path / "made"), tmp_path / "shelf", tmp_path / "got"
    count = len(contents(made))
    code, document, _ = d2c("push", made, shelf, "--dry-run")
    assert (code, document["files"], document["send"][-1]["file"]) == (0, count, "manifest.json")
    assert not shelf.exists()
    code, document, _ = d2c("push", made, shelf)
    root = document["root"]
    assert (code, document["files"], document["skipped"]) == (0, count, 0)
    code, document, _ = d2c("pull", shelf, got, "--dry-run")
    assert (code, document["reasons"], document["root"]) == (0, ["not there yet"], root)
    assert names(tmp_path) == ["made", "shelf"]
    code, document, _ = d2c("pull", shelf, got, "--root", root)
    assert (code, document["artifact"], document["root"]) == (0, str(got), root)
    assert d2c("pull", shelf, got, "--dry-run")[1]["reasons"] == ["up to date"]
    assert d2c("pull", shelf, got, "--root", "0" * 64)[0] == 3
    assert d2c("pull", shelf, got, "--root", "0")[0] == 2
    assert d2c("pull", tmp_path / "nowhere", got)[0] == 1
    assert d2c("push", made, "s4://bucket")[0] == 2
