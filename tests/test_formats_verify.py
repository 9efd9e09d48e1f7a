"""Damage and hostility: each is found by the level that promises it, named by place, and harms nobody."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from formats_fixture import make_samples, write_artifact

from formats import FormatError, IntegrityError, VersionError, open_artifact, verify
from formats.files import read_json, write_json
from formats.hashing import sha256_file, xxh3_file
from formats.npy import npy_header, read_npy
from formats.schema import parse_manifest
from formats.shards import Sample

LEVELS = ("quick", "default", "deep")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    return {container: write_artifact(folder / container, container) for container in ("tar", "parquet")}


@pytest.fixture(params=["tar", "parquet"])
def artifact(request: pytest.FixtureRequest, originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals[request.param], tmp_path / "a"))


@pytest.fixture
def tar(originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals["tar"], tmp_path / "a"))


def shards(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("train-*") if file.is_file())


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def reseal(path: Path) -> None:
    """Make hashes and sizes agree with the files: what somebody who wants to deceive would do."""
    manifest = read_json(path / "manifest.json")
    for record in manifest["files"]:
        file = path / record["path"]
        record |= {"bytes": file.stat().st_size, "xxh3_128": xxh3_file(file), "sha256": sha256_file(file)}
    write_json(path / "manifest.json", manifest)
    names = [*(record["path"] for record in manifest["files"]), "manifest.json"]
    (path / "SHA256SUMS").write_text("".join(f"{sha256_file(path / n)}  {n}\n" for n in sorted(names)))


def kinds(path: Path, level: Any = "deep") -> set[str]:
    return {fault.kind for fault in verify(path, level).faults}


@pytest.mark.parametrize("level", LEVELS)
def test_sound_artifact_has_no_faults(artifact: Path, level: Any) -> None:
    report = verify(artifact, level)
    assert (report.ok, report.faults, report.warnings) == (True, [], [])
    assert report.checked["samples"] == 20
    assert report.checked["arrays"] == (40 if level == "deep" else 0)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_every_byte_of_every_hashed_file_is_covered(artifact: Path) -> None:
    rng = random.Random(0)
    unhashed = ("README.md", "croissant.json")
    for file in sorted(file for file in artifact.rglob("*") if file.is_file() and file.name not in unhashed):
        data = file.read_bytes()
        small = file.suffix not in (".tar", ".parquet") or "meta" in file.parts
        for position in [0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(20))]:
            flip(file, position, rng.randrange(8))
            quick = small and file.parent.name != "classes" and "selection" not in file.name
            for level in LEVELS if quick or file.name == "classes.json" else LEVELS[1:]:
                report = verify(artifact, level)
                assert not report.ok, (file, position, level)
                assert report.refetch, (file, position, level)
            file.write_bytes(data)
    assert verify(artifact, "deep").ok


def test_flipped_payload_is_named_by_sample_and_bytes(artifact: Path) -> None:
    row = pq.read_table(artifact / "meta/samples.parquet").to_pylist()[13]
    flip(artifact / row["shard"], row["tokens.offset"] + 3)
    assert verify(artifact, "quick").ok
    (fault,) = verify(artifact).faults
    assert (fault.kind, fault.path) == ("hash", row["shard"])
    (array,) = [fault for fault in verify(artifact, "deep").faults if fault.kind == "array"]
    assert array.sample == row["key"]
    assert array.where == (row["tokens.offset"], row["tokens.offset"] + 15)
    assert verify(artifact, "deep").refetch == [row["shard"]]


def test_all_faults_are_reported_at_once(artifact: Path) -> None:
    rows = pq.read_table(artifact / "meta/samples.parquet").to_pylist()
    for row in rows[3:17:4]:
        flip(artifact / row["shard"], row["latent.offset"])
    (artifact / "meta/selection.json").unlink()
    (artifact / shards(artifact)[0].parent / "extra").write_text("x")
    flip(artifact / "classes/text_embeds.npy", 130)
    report = verify(artifact, "deep")
    assert {f.sample for f in report.faults if f.kind == "array"} == {row["key"] for row in rows[3:17:4]}
    assert {"missing", "unexpected", "class-table", "hash"} <= {fault.kind for fault in report.faults}


def test_flipped_tar_header_is_placed_and_the_walk_goes_on(tar: Path) -> None:
    shard = shards(tar)[0]
    with tarfile.open(shard) as archive:
        first, second = archive.getmember("00000001.latent.npy"), archive.getmember("00000005.cls")
    flip(shard, first.offset + 2)
    flip(shard, second.offset + 130)
    open_artifact(tar).sample("00000001")
    faults = [fault for fault in verify(tar).faults if fault.found == "a damaged header"]
    assert [fault.where for fault in faults] == [(m.offset, m.offset + 512) for m in (first, second)]


def test_truncation_and_trailing_bytes(artifact: Path) -> None:
    shard = shards(artifact)[0]
    data = shard.read_bytes()
    for size in (0, 1, 512, len(data) // 2, len(data) - 1):
        shard.write_bytes(data[:size])
        for level in LEVELS:
            assert "size" in kinds(artifact, level)
        with pytest.raises(IntegrityError, match="size"):
            open_artifact(artifact)
    shard.write_bytes(data + b"\0")
    assert "size" in kinds(artifact, "quick")


@pytest.mark.parametrize(
    "name", ["SHA256SUMS", "manifest.json", "meta/samples.parquet", "classes/classes.json", "shard"]
)
def test_missing_file(artifact: Path, name: str) -> None:
    name = shards(artifact)[1].relative_to(artifact).as_posix() if name == "shard" else name
    (artifact / name).unlink()
    for level in LEVELS:
        assert ("missing", name) in {(fault.kind, fault.path) for fault in verify(artifact, level).faults}
    with pytest.raises(FormatError):
        open_artifact(artifact)


@pytest.mark.parametrize("left", ["SHA256SUMS", "meta", "classes", "the shards"])
def test_what_is_left_of_an_artifact_is_damaged_and_another_folder_is_none(artifact: Path, left: str) -> None:
    left = shards(artifact)[0].parent.name if left == "the shards" else left
    for path in [path for path in artifact.iterdir() if path.name != left]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert kinds(artifact) == {"missing"}
    folder = artifact / left
    if folder.is_dir():
        for file in list(folder.iterdir()):
            file.unlink()
        (folder / "0.png").write_text("x")
    else:
        folder.write_text(f"{'0' * 64}  some.iso\n")
    with pytest.raises(FormatError, match="no finished artifact here"):
        verify(artifact)


def test_a_cut_shard_is_a_few_faults_not_one_for_each_sample_behind_the_cut(artifact: Path) -> None:
    shard = shards(artifact)[0]
    data = shard.read_bytes()
    other = pq.read_table(artifact / "meta/samples.parquet").to_pylist()[13]
    flip(artifact / other["shard"], other["latent.offset"])
    for level in LEVELS:
        for size in (len(data) // 3, len(data) - 1):
            shard.write_bytes(data[:size])
            faults = [fault for fault in verify(artifact, level).faults if fault.path.endswith(shard.name)]
            assert faults[0].kind == "size"
            assert len(faults) <= 3, faults
    assert other["key"] in {fault.sample for fault in verify(artifact, "deep").faults}


def test_only_added_files_are_to_be_removed_not_fetched(artifact: Path) -> None:
    (shards(artifact)[0].parent / ".DS_Store").write_text("x")
    with pytest.raises(IntegrityError, match=r"not part of it(.|\n)*\.DS_Store(.|\n)*remove those files") as caught:
        open_artifact(artifact)
    assert "fetch" not in str(caught.value)
    (artifact / "meta/selection.json").unlink()
    with pytest.raises(IntegrityError, match="damaged"):
        open_artifact(artifact)


def test_extra_file_is_a_fault_in_our_folders_and_a_warning_beside_them(artifact: Path) -> None:
    (artifact / "notes.txt").write_text("x")
    assert verify(artifact, "quick").warnings == ["notes.txt is not part of the artifact"]
    assert verify(artifact, "quick").ok
    extra = shards(artifact)[0].with_name("train-00002-of-00002.tar")
    extra.write_text("x")
    assert kinds(artifact, "quick") == {"unexpected"}
    assert verify(artifact, "quick").refetch == []


def test_swapped_shards(artifact: Path) -> None:
    first, second = shards(artifact)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    assert not verify(artifact).ok
    reseal(artifact)
    assert len([f for f in verify(artifact, "deep").faults if f.kind == "array"]) == 40
    with pytest.raises(IntegrityError):
        open_artifact(artifact).array(0, "latent")


def edit_index(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    file = path / "meta/samples.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    reseal(path)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda rows: rows[3].update({"key": rows[4]["key"]}), "more than once"),
        (lambda rows: rows[3].update({"label": 4}), "no class"),
        (lambda rows: rows[3].update({"shard": "shards/../../etc"}), "does not list"),
        (lambda rows: rows[3].update({"latent.offset": 10**15}), "range of latent"),
        (lambda rows: rows[3].update({"latent.offset": -1}), "range of latent"),
        (lambda rows: rows[3].update({"tokens.nbytes": 10**15}), "another length of tokens"),
        (lambda rows: rows[3].update({"row": 0}), "row number"),
        (lambda rows: rows.pop(), "19 rows"),
    ],
)
def test_index_that_cannot_be_is_found_at_once(artifact: Path, change: Any, found: str) -> None:
    edit_index(artifact, change)
    assert any(found in str(fault) for fault in verify(artifact, "quick").faults)
    with pytest.raises(IntegrityError):
        open_artifact(artifact)


@pytest.mark.parametrize(("column", "level"), [("sample_id", "quick"), ("info", "default")])
def test_a_small_index_that_would_fill_the_memory_is_refused(artifact: Path, column: str, level: Any) -> None:
    bomb = "0" * (8 << 20)
    edit_index(artifact, lambda rows: [row.update({column: bomb}) for row in rows])
    assert (artifact / "meta/samples.parquet").stat().st_size < 1 << 20  # unfolded 160 MiB
    before = pa.total_allocated_bytes()
    found = [str(fault) for fault in verify(artifact, level).faults]
    assert any("rows are too large" in fault for fault in found), found
    assert pa.total_allocated_bytes() - before < 1 << 20
    if column == "sample_id":
        with pytest.raises(IntegrityError):
            open_artifact(artifact)
    else:
        with pytest.raises(FormatError, match="rows are too large"):
            open_artifact(artifact).info(0)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda rows: [rows[3].update({"label": 0}), rows[4].update({"label": 3})], "value"),
        (lambda rows: rows[3].update({"info": "{}"}), "value"),
        (lambda rows: rows[3].update({"latent.offset": rows[4]["latent.offset"]}), "array"),
        (lambda rows: rows[3].update({"sample_id": "0" * 32}), "index"),
        (lambda rows: rows[3].update({"sample_id": "0" * 32}), "content-id"),
    ],
)
def test_index_that_lies_is_found_by_deep(artifact: Path, change: Any, kind: str) -> None:
    edit_index(artifact, change)
    assert kind in kinds(artifact, "deep")


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = read_json(path / "manifest.json")
    change(manifest)
    write_json(path / "manifest.json", manifest)
    sums = (path / "SHA256SUMS").read_text().splitlines()
    kept = [line for line in sums if not line.endswith("  manifest.json")]
    (path / "SHA256SUMS").write_text("\n".join([*kept, f"{sha256_file(path / 'manifest.json')}  manifest.json"]) + "\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("columns"),
        lambda m: m.pop("format"),
        lambda m: m["counts"].update(samples=True),
        lambda m: m["counts"].update(samples=21),
        lambda m: m["counts"].update(classes=5),
        lambda m: m["columns"][0].update(shape=[2, -4]),
        lambda m: m["columns"][0].update(dtype="O"),
        lambda m: m["columns"][0].update(codec="secret"),
        lambda m: m["columns"].append(m["columns"][0]),
        lambda m: m["files"][0].update(path="../../etc/passwd"),
        lambda m: m["files"][0].update(path="/etc/passwd"),
        lambda m: m["files"].pop(),
        lambda m: m["files"].pop(0),
        lambda m: m["files"][0].update(sha256="0" * 64),
        lambda m: m["class_tables"][0].update(shape=[5, 2, 3]),
        lambda m: m.update(files=7),
    ],
)
def test_manifest_that_cannot_be_is_found_at_once(artifact: Path, change: Any) -> None:
    edit_manifest(artifact, change)
    assert not verify(artifact, "quick").ok
    with pytest.raises(IntegrityError):
        open_artifact(artifact)


def test_content_id_is_recomputed(artifact: Path) -> None:
    edit_manifest(artifact, lambda m: m["latent"].update(scale=1.0))
    assert verify(artifact, "quick").ok
    assert kinds(artifact, "default") == {"content-id"}


def test_newer_version_is_no_data_fault_unless_the_manifest_is_damaged(artifact: Path) -> None:
    edit_manifest(artifact, lambda m: m["format"].update(version="2.0"))
    with pytest.raises(VersionError):
        verify(artifact)
    write_json(artifact / "manifest.json", {**read_json(artifact / "manifest.json"), "more": 1})
    assert kinds(artifact, "quick") == {"hash", "manifest"}


def regular(name: str, data: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    return member, data


def special(kind: bytes, name: str = "00000000.x", target: str = "/etc/passwd") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        (regular("../evil.cls"), "points outside"),
        (regular("a/../../evil.cls"), "points outside"),
        (regular("/etc/evil.cls"), "points outside"),
        (regular("..\\evil.cls"), "points outside"),
        (special(tarfile.SYMTYPE), "symbolic link"),
        (special(tarfile.LNKTYPE), "hard link"),
        (special(tarfile.CHRTYPE), "character device"),
        (special(tarfile.FIFOTYPE), "pipe"),
        (special(tarfile.DIRTYPE), "folder"),
        (special(tarfile.GNUTYPE_SPARSE), "sparse"),
        (regular("00000000.pyd", pickle.dumps({})), "pickle"),
        (regular("00000000.pth"), "pickle"),
        (regular("00000000.cls"), "second 00000000.cls"),
        (regular("00000000.txt"), "does not know"),
        (regular("99999999.cls"), "does not know"),
        (regular("é.cls"), "another form"),
        (regular("x" * 60 + "/" + "y" * 60), "another form"),
    ],
)
@pytest.mark.parametrize("place", ["first", "last"])
def test_planted_member_is_found_from_its_header(
    tar: Path, planted: tuple[tarfile.TarInfo, bytes], found: str, place: str
) -> None:
    """The deceiver also repairs every hash and the index: only the rules of the container are left."""
    shard = shards(tar)[0]
    member, data = planted
    header = member.tobuf(tarfile.USTAR_FORMAT)
    block = header + data + bytes(-len(data) % 512)
    before = shard.read_bytes()
    if place == "first":
        shard.write_bytes(block + before)
        moved = {"latent.offset": len(block), "tokens.offset": len(block)}
        edit_index(
            tar, lambda rows: [row.update({k: row[k] + v for k, v in moved.items()}) for row in rows[:10]] and None
        )
    else:
        end = before.rstrip(b"\0")
        cut = -(-len(end) // 512) * 512
        shard.write_bytes(before[:cut] + block + bytes(1024))
        reseal(tar)
    before_files = sorted(tar.parent.rglob("*"))
    report = verify(tar)
    assert any(found in str(fault) for fault in report.faults), report.faults
    assert sorted(tar.parent.rglob("*")) == before_files
    open_artifact(tar).sample(0)


def test_pax_header_is_found(tar: Path) -> None:
    shard = shards(tar)[0]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member, data = regular("00000000.cls")
        member.pax_headers = {"size": "99999999"}
        archive.addfile(member, io.BytesIO(data))
    shard.write_bytes(stream.getvalue())
    assert any("PAX" in str(fault) for fault in verify(tar).faults)


def replace_payload(path: Path, key: str, column: str, header: bytes) -> None:
    """Put another npy header in place of a column's, keep everything else consistent."""
    shard = shards(path)[0]
    with tarfile.open(shard) as archive:
        member = archive.getmember(f"{key}.{column}.npy")
    data = bytearray(shard.read_bytes())
    data[member.offset_data : member.offset_data + len(header)] = header
    shard.write_bytes(data)
    reseal(path)


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        (npy_header("f2", (2, 4, 4, 4)).replace(b"'<f2'", b"'|O8'"), "unsafe"),
        (npy_header("f2", (2, 4, 4, 4)).replace(b"(2, 4, 4, 4)", b"(2, 4, 9, 9)"), "unsafe"),
        (npy_header("f2", (2, 4, 4, 4)).replace(b"4), }       ", b"4999999999)}"), "unsafe"),
        (npy_header("f2", (2, 4, 4, 4)).replace(b"False", b"True "), "unsafe"),
        (npy_header("f2", (2, 4, 4, 4)).replace(b"\x01\x00", b"\x03\x00", 1), "unsafe"),
        (npy_header("f2", (4, 2, 4, 4)), "container"),
        (npy_header("i2", (2, 4, 4, 4)), "container"),
    ],
)
def test_npy_that_lies_is_found_by_deep(tar: Path, header: bytes, kind: str) -> None:
    replace_payload(tar, "00000003", "latent", header)
    (fault,) = verify(tar, "deep").faults
    assert (fault.kind, fault.sample) == (kind, "00000003")
    open_artifact(tar).array(3, "latent")


def test_object_array_is_never_unpickled(tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save(tar / "classes/text_embeds.npy", np.array([Bomb()] * 4, dtype=object), allow_pickle=True)
    for attempt in (
        lambda: read_npy(tar / "classes/text_embeds.npy"),
        lambda: open_artifact(tar).table("text_embeds"),
    ):
        with pytest.raises(FormatError):
            attempt()
    reseal(tar)
    assert "unsafe" in kinds(tar)
    with pytest.raises(FormatError):
        open_artifact(tar).table("text_embeds")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_standard_deviation_of_zero_is_found_by_deep(tmp_path: Path, container: str) -> None:
    samples = make_samples(3)
    samples[1].arrays["latent"][1, 0, 0, 0] = 0
    path = write_artifact(tmp_path / "a", container, 1, samples)
    (fault,) = verify(path, "deep").faults
    assert (fault.kind, fault.sample) == ("value", "00000001")


def test_parquet_rewritten_by_another_tool_is_found_by_deep(originals: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(originals["parquet"], tmp_path / "a"))
    shard = shards(path)[0]
    table = pq.read_table(shard)
    pq.write_table(table, shard, compression="zstd")
    with shard.open("ab") as stream:
        stream.write(bytes(1 << 16))
    reseal(path)
    assert "container" in kinds(path, "deep")
    pq.write_table(table.drop_columns("json"), shard)
    assert "container" in kinds(path, "deep")


def test_wrong_level_and_missing_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="level"):
        verify(tmp_path, "deepest")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(FormatError, match="no such folder"):
        verify(tmp_path / "none")
    with pytest.raises(FormatError, match="no finished artifact here"):
        verify(tmp_path)


def test_random_garbage_never_raises(artifact: Path) -> None:
    rng = random.Random(1)
    for file in sorted(file for file in artifact.rglob("*") if file.is_file()):
        data = file.read_bytes()
        for size in (0, 3, 700, len(data)):
            file.write_bytes(rng.randbytes(size))
            report = verify(artifact, "deep")
            assert report.ok == (file.name in ("README.md", "croissant.json"))
        file.write_bytes(data)


def test_twins_count_twice_in_the_content_id(tmp_path: Path) -> None:
    one = make_samples(1)[0]
    twin = Sample("twin", one.label, one.arrays, one.info)
    single = open_artifact(write_artifact(tmp_path / "a", samples=[one])).content_id
    double = open_artifact(write_artifact(tmp_path / "b", samples=[one, twin])).content_id
    assert single != double


def test_bytes_hidden_between_and_behind_members_are_found(tar: Path) -> None:
    shard = shards(tar)[0]
    before = shard.read_bytes()
    with tarfile.open(shard) as archive:
        label = archive.getmember("00000002.cls")
        end = archive.getmembers()[-1]
    behind = end.offset_data + -(-end.size // 512) * 512 + 1024
    for position, found in ((label.offset_data + 100, "padding"), (behind, "behind the end")):
        flip(shard, position)
        reseal(tar)
        assert any(found in str(fault) for fault in verify(tar).faults)
        shard.write_bytes(before)


@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_offset_of_a_twin_is_found_by_deep(tmp_path: Path, container: str) -> None:
    """The bytes pointed at have the right hash, but they are another sample's."""
    one = make_samples(1)[0]
    twin = Sample("twin", one.label, one.arrays, one.info)
    path = write_artifact(tmp_path / "a", container, 1, [one, twin])
    edit_index(path, lambda rows: rows[0].update({"latent.offset": rows[1]["latent.offset"]}))
    (fault,) = verify(path, "deep").faults
    assert (fault.kind, fault.sample) == ("index", one.key)


def test_sha256_is_checked_by_deep(artifact: Path) -> None:
    shard = shards(artifact)[0].relative_to(artifact).as_posix()
    digest = sha256_file(artifact / shard)
    sums = (artifact / "SHA256SUMS").read_text()
    (artifact / "SHA256SUMS").write_text(sums.replace(digest, "0" * 64))
    edit_manifest(artifact, lambda m: [f.update(sha256="0" * 64) for f in m["files"] if f["path"] == shard])
    assert verify(artifact).ok
    (fault,) = verify(artifact, "deep").faults
    assert (fault.kind, fault.path) == ("hash", shard)


def test_true_is_no_number(artifact: Path) -> None:
    manifest = read_json(artifact / "manifest.json")
    manifest["counts"]["samples"] = True
    with pytest.raises(FormatError, match=r"counts\.samples"):
        parse_manifest(manifest, "manifest.json")
