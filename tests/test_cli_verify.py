"""What `d2c verify` returns to a script: 0 sound, 3 damaged, 4 newer than this release, 1 not there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from d2c_cli.app import app
from formats.files import read_json, write_json
from formats.hashing import sha256_file


def verify(*args: str | Path) -> tuple[int, dict[str, Any], str]:
    result = CliRunner().invoke(app, ["verify", *map(str, args), "--json"], prog_name="d2c", catch_exceptions=False)
    return result.exit_code, json.loads(result.stdout), result.stderr


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "shards"))


@pytest.mark.parametrize("level", ["quick", "default", "deep"])
def test_a_sound_artifact_is_0(shards: Path, level: str) -> None:
    code, document, _ = verify(shards, *([] if level == "default" else [f"--{level}"]))
    assert (code, document["ok"], document["faults"], document["level"]) == (0, True, [], level)


def test_quick_and_deep_at_once_is_2(shards: Path) -> None:
    assert verify(shards, "--quick", "--deep")[0] == 2


def test_a_flipped_bit_is_3_where_the_level_looks_at_bytes(shards: Path) -> None:
    shard = next((shards / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    assert verify(shards, "--quick")[0] == 0
    code, document, _ = verify(shards)
    assert (code, document["ok"]) == (3, False)
    assert document["faults"][0]["path"] == f"shards/{shard.name}"


def test_a_folder_that_is_no_artifact_is_1_and_is_not_searched(
    image_folder: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def walked(*_: object) -> None:
        raise AssertionError("the whole folder was searched")

    for folder in (image_folder, packed.parent / "workspace", packed.parent):
        with monkeypatch.context() as patched:
            patched.setattr(os, "walk", walked)
            patched.setattr(Path, "rglob", walked)
            code, document, message = verify(folder)
        assert (code, document["ok"]) == (1, False)
        assert "there is no finished artifact here" in message


def test_an_artifact_without_its_manifest_is_3(shards: Path) -> None:
    (shards / "manifest.json").unlink()
    code, document, _ = verify(shards)
    assert (code, document["faults"][0]["kind"], document["refetch"]) == (3, "missing", ["manifest.json"])


def test_a_newer_artifact_is_4(shards: Path) -> None:
    manifest, sums = shards / "manifest.json", shards / "SHA256SUMS"
    before = sha256_file(manifest)
    content = read_json(manifest)
    write_json(manifest, {**content, "format": {**content["format"], "version": "2.0"}})
    sums.write_text(sums.read_text().replace(before, sha256_file(manifest)))
    code, document, message = verify(shards)
    assert (code, document["ok"], document["error"]["kind"]) == (4, False, "VersionError")
    assert "2.0" in message


def test_no_artifact_is_1(tmp_path: Path) -> None:
    code, document, message = verify(tmp_path / "nowhere")
    assert (code, document["ok"]) == (1, False)
    assert "there is no artifact here" in message


@pytest.mark.parametrize(
    ("left", "command"),
    [("here.partial", "d2c pack"), ("here.partial-pull", "d2c pull"), (".tmp-4711-here.replaced", "d2c pack")],
)
@pytest.mark.parametrize("exists", [False, True])
def test_what_was_interrupted_is_finished_not_made_anew(tmp_path: Path, left: str, command: str, exists: bool) -> None:
    (tmp_path / left).mkdir()
    (tmp_path / "elsewhere.partial").mkdir()
    if exists:
        (tmp_path / "here").mkdir()
    for words in (("inspect",), ("train", "--model", "sit-tiny/2")):
        result = CliRunner().invoke(app, [*words, str(tmp_path / "here")], prog_name="d2c")
        assert (result.exit_code, f"an unfinished one beside it: {left}" in result.stderr) == (1, True)
        assert f"run the command that was interrupted ({command}" in result.stderr
        assert "make it with" not in result.stderr


def test_a_bad_option_value_is_a_document_under_json(shards: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["repack", str(shards), str(tmp_path / "b"), "--tokens", "int9", "--json"])
    assert result.exit_code == 2
    document = json.loads(result.stdout)
    assert (document["ok"], document["error"]["kind"]) == (False, "UsageError")
    assert "int9" in document["error"]["what"]


def test_names_from_elsewhere_cannot_steer_the_terminal(shards: Path) -> None:
    manifest, sums = shards / "manifest.json", shards / "SHA256SUMS"
    before = sha256_file(manifest)
    content = read_json(manifest)
    write_json(manifest, {**content, "format": {**content["format"], "version": "2.0\u001b[31m"}})
    sums.write_text(sums.read_text().replace(before, sha256_file(manifest)))
    result = CliRunner().invoke(app, ["inspect", str(shards)], prog_name="d2c")
    assert result.exit_code != 0
    assert "\u001b" not in result.stderr
