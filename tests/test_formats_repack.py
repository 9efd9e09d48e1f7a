"""Repacking: what keeps the content id, what changes it, and what is never lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coded_fixture import write_coded
from formats_fixture import contents, write_artifact
from killing import run_and_kill

from d2c.progress import Progress
from formats import FormatError, IntegrityError, codecs, open_artifact, verify
from formats.files import read_json, write_json
from formats.hashing import sha256_file
from formats.repack import Changes, repack
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


@pytest.mark.parametrize(("first", "second"), [(RAW, INT8), (RAW, INT4), (INT8, INT4), (INT8, RAW), (INT4, RAW)])
def test_another_codec_is_another_content_and_names_its_parent(tmp_path: Path, first: str, second: str) -> None:
    before = open_artifact(write_coded(tmp_path / "a", first))
    after = repack(tmp_path / "a", tmp_path / "b", Changes(tokens=second))
    assert verify(tmp_path / "b", "deep").ok
    assert after.content_id != before.content_id
    parent = after.manifest["parents"][-1]
    assert (parent["content_id"], parent["operation"]) == (before.content_id, "recode")
    column = next(column for column in after.columns if column.name == "tokens")
    old, new = (artifact.values("tokens", range(20)) for artifact in (before, after))
    found = codecs.fidelity(codecs.cosines(old, new.astype("f4")))
    assert column.fidelity == (None if second == RAW else found)
    assert found["min"] > 0.97  # type: ignore[operator]


def test_licence_notes_change_nothing_else(tmp_path: Path) -> None:
    before = open_artifact(write_artifact(tmp_path / "a"))
    after = repack(tmp_path / "a", tmp_path / "b", Changes(licence={"spdx": "MIT"}))
    assert after.manifest["licence"] == {**before.manifest["licence"], "spdx": "MIT"}
    assert after.content_id == before.content_id
    same = {name for name, data in contents(tmp_path / "a").items() if contents(tmp_path / "b").get(name) == data}
    assert set(contents(tmp_path / "b")) - same == {"README.md", "SHA256SUMS", "croissant.json", "manifest.json"}


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
    with pytest.raises(FormatError, match="into itself"):
        repack(path, path, Changes())
    with pytest.raises(FormatError, match="no tokens"):
        repack(path, tmp_path / "b", Changes(tokens=INT8))
    with pytest.raises(FormatError, match="d2c rebuild"):
        repack(write_artifact(tmp_path / "recipe", "recipe"), tmp_path / "b", Changes(container="tar"))
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


def test_unknown_optional_fields_of_a_minor_version_survive(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a")
    raw: dict[str, Any] = read_json(path / "manifest.json")
    raw["format"]["version"] = "1.7"
    raw["later"] = {"field": 1}
    write_json(path / "manifest.json", raw)
    lines = [line for line in (path / "SHA256SUMS").read_text().splitlines() if "manifest.json" not in line]
    (path / "SHA256SUMS").write_text("\n".join([*lines, f"{sha256_file(path / 'manifest.json')}  manifest.json", ""]))
    after = repack(path, tmp_path / "b", Changes(container="parquet"))
    assert after.manifest["later"] == {"field": 1}
    np.testing.assert_array_equal(after.labels, open_artifact(path).labels)
