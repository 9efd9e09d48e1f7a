"""Repacking: what keeps the content id, what changes it, and what is never lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from coded_fixture import agree, cost_of, write_coded
from formats_fixture import contents, make_samples, write_artifact
from killing import run_and_kill
from typer.testing import CliRunner

from d2c.progress import Progress
from d2c_cli.app import app
from formats import FormatError, IntegrityError, VersionError, open_artifact, verify
from formats.files import read_json, write_json
from formats.hashing import sha256_file
from formats.repack import Changes, edited_card, repack
from formats.schema import INT4, INT8, RAW


def test_container_and_shards_keep_content_facts_and_order(tmp_path: Path) -> None:
    before = open_artifact(write_artifact(tmp_path / "a", extra={"from": "a newer writer"}))
    after = repack(tmp_path / "a", tmp_path / "b", Changes(container="parquet", shards=5))
    assert verify(tmp_path / "b", "deep").ok
    assert (after.content_id, after.keys) == (before.content_id, before.keys)
    assert [after.info(i) for i in range(20)] == [before.info(i) for i in range(20)]
    assert len(after.shards) == 5
    assert after.manifest["parents"] == []
    assert after.manifest["extra"] == {"from": "a newer writer"}
    assert after.selection == before.selection


def test_there_and_back_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a")
    repack(path, tmp_path / "b", Changes(container="parquet", shards=1))
    repack(tmp_path / "b", tmp_path / "c", Changes(container="tar", shards=2))
    assert contents(tmp_path / "c") == contents(path)


def test_a_coded_artifact_keeps_its_codes_and_their_fidelity(tmp_path: Path) -> None:
    before = open_artifact(write_coded(tmp_path / "a", INT8))
    after = repack(tmp_path / "a", tmp_path / "b", Changes(container="parquet"))
    assert after.content_id == before.content_id
    assert [c.fidelity for c in after.columns] == [c.fidelity for c in before.columns]


@pytest.mark.parametrize(("first", "second"), [(RAW, INT8), (RAW, INT4), (INT8, INT4)])
def test_another_codec_is_another_content_and_names_its_parent(tmp_path: Path, first: str, second: str) -> None:
    before = open_artifact(write_coded(tmp_path / "a", first))
    after = repack(tmp_path / "a", tmp_path / "b", Changes(tokens=second))
    assert verify(tmp_path / "b", "deep").ok
    assert after.content_id != before.content_id
    parent = after.manifest["parents"][-1]
    assert (parent["content_id"], parent["operation"]) == (before.content_id, "recode")
    column = next(column for column in after.columns if column.name == "tokens")
    expected = cost_of(*(artifact.values("tokens", range(20)) for artifact in (before, after)))
    assert agree(column.fidelity, expected)
    assert column.fidelity is not None
    assert column.fidelity["against"] == first


@pytest.mark.parametrize(("first", "second"), [(INT8, RAW), (INT4, RAW), (INT4, INT8)])
def test_a_finer_codec_would_promise_what_is_gone(tmp_path: Path, first: str, second: str) -> None:
    with pytest.raises(FormatError, match="cannot be had back"):
        repack(write_coded(tmp_path / "a", first), tmp_path / "b", Changes(tokens=second))


def test_another_artifact_is_replaced_only_when_that_is_asked_for(tmp_path: Path) -> None:
    source, other = write_artifact(tmp_path / "a"), write_artifact(tmp_path / "b", samples=make_samples(12))
    before = contents(other)
    with pytest.raises(FormatError, match="--overwrite"):
        repack(source, other, Changes(container="parquet"))
    assert contents(other) == before
    made = repack(source, other, Changes(container="parquet"), overwrite=True)
    stamp = (other / "manifest.json").stat().st_mtime_ns
    assert repack(source, other, Changes(container="parquet")).content_id == made.content_id
    assert (other / "manifest.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("tokens", [None, INT4])
def test_an_artifact_with_other_arrays_is_another_one(tmp_path: Path, tokens: str | None) -> None:
    # Their manifests say the same, but for what follows from the arrays.
    full = write_coded(tmp_path / "full", INT8)
    twin = write_coded(tmp_path / "twin", INT8, measured=slice(0, 10))
    assert open_artifact(full).content_id != open_artifact(twin).content_id
    repack(full, tmp_path / "b", Changes(container="parquet", tokens=tokens))
    before = contents(tmp_path / "b")
    with pytest.raises(FormatError, match="another artifact is here"):
        repack(twin, tmp_path / "b", Changes(container="parquet", tokens=tokens))
    assert contents(tmp_path / "b") == before


def test_a_licence_file_comes_along_and_an_edited_card_is_told(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a")
    (path / "LICENSE").write_text("CC0")
    assert edited_card(open_artifact(path)) is None
    with (path / "README.md").open("a") as card:
        card.write("EDITED")
    assert edited_card(open_artifact(path)) == path / "README.md"
    said = CliRunner().invoke(app, ["repack", str(path), str(tmp_path / "b"), "--container", "parquet"])
    assert (tmp_path / "b" / "LICENSE").read_text() == "CC0"
    assert f"{path / 'README.md'} is not as generated" in said.stderr
    again = CliRunner().invoke(app, ["repack", str(path), str(tmp_path / "b"), "--container", "parquet"])
    assert (again.exit_code, "repack: up to date" in again.stderr) == (0, True)
    assert "not as generated" not in again.stderr


def test_a_licence_file_that_came_along_is_not_in_the_way(tmp_path: Path) -> None:
    path, out = write_coded(tmp_path / "a", INT8), tmp_path / "b"
    (path / "LICENSE").write_text("CC0")
    repack(path, out, Changes(container="parquet"))
    repack(path, out, Changes(container="tar"), overwrite=True)
    assert open_artifact(out).manifest["container"]["kind"] == "tar"
    before = contents(out)
    with pytest.raises(RuntimeError, match="stopped"):
        repack(path, out, Changes(tokens=INT4), stop, overwrite=True)
    (path / "LICENSE").write_text("another")
    with pytest.raises(FormatError, match="LICENSE"):
        repack(path, out, Changes(tokens=INT4), overwrite=True)
    assert contents(out) == before


def stop(_: int) -> None:
    raise RuntimeError("stopped")


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    source = write_artifact(tmp_path / "a")
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for container in ("parquet", "tar"):
        repack(source, tmp_path / "out", Changes(container=container), overwrite=True)  # type: ignore[arg-type]
        assert (tmp_path / "out").is_symlink()
        assert verify(tmp_path / "disk").ok


def test_licence_notes_change_nothing_else(tmp_path: Path) -> None:
    before = open_artifact(write_artifact(tmp_path / "a"))
    after = repack(tmp_path / "a", tmp_path / "b", Changes(licence={"spdx": "MIT"}))
    assert after.manifest["licence"] == {**before.manifest["licence"], "spdx": "MIT"}
    assert after.content_id == before.content_id
    same = {name for name, data in contents(tmp_path / "a").items() if contents(tmp_path / "b").get(name) == data}
    assert set(contents(tmp_path / "b")) - same == {"README.md", "SHA256SUMS", "croissant.json", "manifest.json"}


@pytest.mark.parametrize("codec", [RAW, INT8])
def test_a_recipe_gets_a_licence_note_and_keeps_all_else(tmp_path: Path, codec: str) -> None:
    path = write_coded(tmp_path / "a", codec, container="recipe")
    before = open_artifact(path)
    repack(path, tmp_path / "b", Changes(licence={"spdx": "MIT"}))
    after = repack(path, tmp_path / "b", Changes(licence={"spdx": "MIT"}))
    assert verify(tmp_path / "b", "deep").ok
    assert after.content_id == before.content_id
    assert after.manifest["licence"] == {**before.manifest["licence"], "spdx": "MIT"}
    old, new = contents(path), contents(tmp_path / "b")
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    assert changed == {"README.md", "SHA256SUMS", "croissant.json", "manifest.json"}


def test_a_damaged_source_is_never_copied(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a")
    row = open_artifact(path).index.slice(13, 1).to_pylist()[0]
    shard = path / row["shard"]
    data = bytearray(shard.read_bytes())
    data[row["latent.offset"]] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match="latent of sample 00000013"):
        repack(path, tmp_path / "b", Changes(container="parquet"))
    assert not (tmp_path / "b").exists()


def test_what_cannot_be_repacked_is_refused(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a")
    for inside in (path, path / "shards" / "sub"):
        with pytest.raises(FormatError, match="into itself"):
            repack(path, inside, Changes())
    with pytest.raises(FormatError, match="--recipe-only"):
        repack(path, tmp_path / "b", Changes(container="recipe"))
    with pytest.raises(FormatError, match="no tokens"):
        repack(path, tmp_path / "b", Changes(tokens=INT8))
    recipe = write_artifact(tmp_path / "recipe", "recipe")
    for changes in (Changes(container="tar"), Changes(shards=2), Changes(tokens=INT8)):
        with pytest.raises(FormatError, match=r"no change but of the licence note[\s\S]*d2c rebuild"):
            repack(recipe, tmp_path / "b", changes)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FormatError, match="something else"):
        repack(path, tmp_path / "mine", Changes())
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def pieces(paths: tuple[Path, Path], progress: Progress) -> None:
    with progress.bar("repack", 20, "sample") as bar:
        repack(*paths, Changes(tokens=INT4, shards=10), bar.advance)


def test_killed_and_run_again_it_writes_the_same_bytes(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "a", INT8)
    run_and_kill(pieces, (path, tmp_path / "b"), "repack", after=3)
    assert not (tmp_path / "b").exists()
    repack(path, tmp_path / "b", Changes(tokens=INT4, shards=10))
    repack(path, tmp_path / "c", Changes(tokens=INT4, shards=10))
    assert contents(tmp_path / "b") == contents(tmp_path / "c")


def test_a_newer_minor_version_is_not_rewritten(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a")
    raw: dict[str, Any] = read_json(path / "manifest.json")
    raw["format"]["version"] = "1.7"
    write_json(path / "manifest.json", raw)
    lines = [line for line in (path / "SHA256SUMS").read_text().splitlines() if "manifest.json" not in line]
    (path / "SHA256SUMS").write_text("\n".join([*lines, f"{sha256_file(path / 'manifest.json')}  manifest.json", ""]))
    assert verify(path).ok
    with pytest.raises(VersionError, match="newer release"):
        repack(path, tmp_path / "b", Changes(container="parquet"))
