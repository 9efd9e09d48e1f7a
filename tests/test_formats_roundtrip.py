"""Written and read back: same values, same bytes, same ids; errors for what does not fit."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from formats_fixture import COLUMNS, FIELDS, contents, finish, make_samples, write_artifact, writer
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import FormatError, IntegrityError, VersionError, open_artifact, verify
from formats.describe import describe
from formats.files import read_json, write_json
from formats.hashing import canonical_json, sha256_file, xxh3, xxh3_array
from formats.schema import DTYPES, Column, parse_manifest
from formats.shards import Sample, write_shard

CONTAINERS = ("tar", "parquet")


@st.composite
def columns_and_samples(draw: st.DrawFn) -> tuple[list[Column], list[Sample]]:
    shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
    names = draw(st.lists(st.from_regex(r"[a-z0-9_]{1,8}", fullmatch=True), min_size=1, max_size=3, unique=True))
    columns = [Column(f"c{name}", draw(st.sampled_from(DTYPES)), draw(shapes)) for name in names]
    count = draw(st.integers(1, 9))
    keys = st.from_regex(r"[0-9a-z_-]{1,20}", fullmatch=True)
    facts = st.one_of(st.text(max_size=5), st.integers(), st.floats(allow_nan=False, allow_infinity=False))
    samples = []
    for key in draw(st.lists(keys, min_size=count, max_size=count, unique=True)):
        arrays = {}
        for column in columns:
            bits = np.frombuffer(draw(st.binary(min_size=column.nbytes, max_size=column.nbytes)), column.numpy)
            arrays[column.name] = np.nan_to_num(bits, posinf=0, neginf=0).reshape(column.shape)
        samples.append(Sample(key, draw(st.integers(0, 3)), arrays, {"fact": draw(facts)}))
    return columns, samples


@settings(max_examples=25, deadline=None)
@given(columns_and_samples(), st.sampled_from(CONTAINERS), st.integers(1, 3))
def test_what_is_written_is_read(made: tuple[list[Column], list[Sample]], container: str, shards: int) -> None:
    columns, samples = made
    with tempfile.TemporaryDirectory() as folder:
        path = write_artifact(Path(folder) / "a", container, shards, samples, columns)
        artifact = open_artifact(path)
        assert artifact.keys == [sample.key for sample in samples]
        for i, sample in enumerate(samples):
            for read in (artifact.sample(i), artifact.sample(sample.key)):
                assert (read.key, read.label, read.info) == (sample.key, sample.label, sample.info)
                for column in columns:
                    assert read.arrays[column.name].dtype == column.numpy
                    assert read.arrays[column.name].tobytes() == sample.arrays[column.name].tobytes()
        assert verify(path, "deep").faults == []


@pytest.mark.parametrize("container", CONTAINERS)
def test_equal_input_gives_equal_bytes(tmp_path: Path, container: str) -> None:
    first, second = (write_artifact(tmp_path / name, container) for name in "ab")
    assert contents(first) == contents(second)


def test_content_id_knows_neither_container_nor_shards_nor_order(tmp_path: Path) -> None:
    samples = make_samples()
    ids = {
        open_artifact(write_artifact(tmp_path / f"{container}{shards}", container, shards, part, licence={})).content_id
        for container, shards, part in [("tar", 1, samples), ("parquet", 1, samples), ("tar", 5, samples[::-1])]
    }
    renamed = [Sample(f"x{i}", s.label, s.arrays, {"other": i}) for i, s in enumerate(samples)]
    ids.add(open_artifact(write_artifact(tmp_path / "renamed", samples=renamed)).content_id)
    assert len(ids) == 1
    other = [*samples[:-1], Sample("x", 0, samples[-1].arrays, samples[-1].info)]
    ids.add(open_artifact(write_artifact(tmp_path / "label", samples=other)).content_id)
    ids.add(open_artifact(write_artifact(tmp_path / "latent", latent={**FIELDS["latent"], "scale": 1.0})).content_id)
    assert len(ids) == 3


def test_ids_and_bytes_of_format_1_0_never_change(tmp_path: Path) -> None:
    artifact = open_artifact(write_artifact(tmp_path / "a"))
    assert artifact.content_id == "d2c1-xxh3-128:961a58eb129237742d24b1a2b7508384"
    assert (
        sha256_file(tmp_path / "a/shards/train-00000-of-00002.tar")
        == "975ad7df798b9abfd7ce44a694c7bfae66e53fd60b7a945eb8e0f8be9a322aae"
    )
    line = f"d2c-sample-1\0label 1\nlatent f2 2x4x4x4 {artifact.digests(1)['latent']}\ntokens u1 3x5 "
    assert artifact.index["sample_id"][1].as_py() == xxh3(f"{line}{artifact.digests(1)['tokens']}\n".encode())


@pytest.mark.parametrize("container", CONTAINERS)
def test_index_points_at_the_bytes_of_the_arrays(tmp_path: Path, container: str) -> None:
    # Enough samples of enough bytes for several row groups and pages.
    columns = (Column("latent", "f2", (2, 4, 64, 64)), Column("tokens", "u1", (3,)))
    samples = make_samples(150, columns)
    path = tmp_path / "shards" / f"s.{container}"
    rows = write_shard(path, container, columns, samples)
    data = path.read_bytes()
    for row, sample in zip(rows, samples, strict=True):
        for column in columns:
            start = row[f"{column.name}.offset"]
            assert data[start : start + row[f"{column.name}.nbytes"]] == sample.arrays[column.name].tobytes()
            assert row[f"{column.name}.xxh3"] == xxh3_array(sample.arrays[column.name])
    if container == "tar":
        assert all(row["latent.offset"] % 64 == 0 for row in rows)


@pytest.mark.parametrize("container", CONTAINERS)
def test_stack_copies_any_rows_in_any_order(tmp_path: Path, container: str) -> None:
    artifact = open_artifact(write_artifact(tmp_path / "a", container))
    rows = np.array([7, 0, 7, -1])
    stacked = artifact.stack("latent", rows)
    assert stacked.flags.writeable
    assert stacked.flags.aligned
    for row, array in zip(rows, stacked, strict=True):
        np.testing.assert_array_equal(array, artifact.sample(int(row)).arrays["latent"])
    out = np.empty_like(stacked)
    assert artifact.stack("latent", rows, out) is out
    np.testing.assert_array_equal(out, stacked)
    with pytest.raises(IndexError):
        artifact.stack("latent", [20])
    with pytest.raises(FormatError, match="out"):
        artifact.stack("latent", [1], out)


def test_accessors(tmp_path: Path) -> None:
    artifact = open_artifact(write_artifact(tmp_path / "a", packed_from="abc"))
    assert len(artifact) == 20
    assert artifact.labels.dtype == np.int32
    assert artifact.labels.tolist() == [i % 4 for i in range(20)]
    assert [row.prompt for row in artifact.classes] == [f"a photo of {i}" for i in range(4)]
    assert artifact.info(3) == {"source_key": "3/ö 3.jpg", "score": 3 / 7, "selection_rank": 3}
    assert artifact.manifest["packed_from"] == "abc"
    assert artifact.table("text_embeds").shape == (4, 2, 3)
    assert artifact.selection[2] == {"key": "2", "rank": 2}
    assert not artifact.array(0, "latent").flags.writeable
    with pytest.raises(KeyError):
        artifact.sample("none")
    with pytest.raises(IndexError):
        artifact.array(20, "latent")
    for missing in (lambda: artifact.table("x"), lambda: artifact.array(0, "x")):
        with pytest.raises(FormatError, match="there is no such"):
            missing()


def test_describe_is_json_and_counts(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a")
    facts = describe(path)
    assert canonical_json(facts)
    assert facts["counts"] == {"samples": 20, "classes": 4, "per_class_min": 5, "per_class_max": 5}
    assert facts["memory"]["resident_bytes"] == 20 * (2 * 4 * 4 * 4 * 2 + 15)
    assert facts["root"] == sha256_file(path / "SHA256SUMS")
    assert [row["count"] for row in facts["classes"]] == [5, 5, 5, 5]


def test_corrupt_array_stops_the_reader_at_first_touch(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a")
    artifact = open_artifact(path)
    start = artifact.index["latent.offset"][4].as_py()
    shard = path / artifact.index["shard"][4].as_py()
    data = bytearray(shard.read_bytes())
    data[start + 5] ^= 1
    shard.write_bytes(data)
    artifact = open_artifact(path)
    artifact.array(4, "tokens")
    for read in (lambda: artifact.array(4, "latent"), lambda: artifact.stack("latent", [3, 4])):
        with pytest.raises(IntegrityError, match="latent of sample 00000004") as caught:
            read()
        assert f"bytes {start}-" in str(caught.value)
    assert open_artifact(path, verify=False).array(4, "latent").shape == (2, 4, 4, 4)


def test_changed_class_table_is_refused(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a")
    table = path / "classes/text_embeds.npy"
    data = bytearray(table.read_bytes())
    data[-1] ^= 1
    table.write_bytes(data)
    with pytest.raises(IntegrityError, match="class table"):
        open_artifact(path).table("text_embeds")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"arrays": {}}, "other arrays"),
        ({"arrays": {"latent": np.zeros((2, 4, 4, 4), "f4")}}, "not as declared"),
        ({"arrays": {"latent": np.full((2, 4, 4, 4), np.nan, "f2")}}, "NaN"),
        ({"key": "a.b"}, "key"),
        ({"key": "../a"}, "key"),
        ({"label": -1}, "label"),
        ({"info": {"score": float("nan")}}, "JSON"),
        ({"info": {"name": "\udcff"}}, "JSON"),
    ],
)
def test_sample_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], match: str) -> None:
    good = make_samples(1)[0]
    parts = {"key": good.key, "label": good.label, "arrays": good.arrays, "info": good.info}
    if change.get("arrays"):
        change = {"arrays": {**good.arrays, **change["arrays"]}}  # type: ignore[dict-item]  # always a dict here
    with pytest.raises(FormatError, match=match):
        write_shard(tmp_path / "x.tar", "tar", COLUMNS, [Sample(**{**parts, **change})])  # type: ignore[arg-type]  # wrong on purpose
    assert list(tmp_path.iterdir()) == []


def test_key_twice_is_refused_within_and_across_shards(tmp_path: Path) -> None:
    samples = make_samples(4)
    with writer(tmp_path / "a") as made:
        with pytest.raises(FormatError, match="same key"):
            made.write(0, [samples[0], samples[0]])
        made.write(0, samples)
        made.write(1, samples[:1])
        with pytest.raises(FormatError, match="same key"):
            finish(made)


@pytest.mark.parametrize("name", ["", "Latent", "a.b", "label", "json", "../x", "a" * 33])
def test_column_names_are_plain(name: str) -> None:
    with pytest.raises(FormatError, match="name"):
        Column(name, "f2", (1,))


@pytest.mark.parametrize("version", ["2.0", "10.4"])
def test_newer_major_is_refused_and_named(tmp_path: Path, version: str) -> None:
    raw = read_json(write_artifact(tmp_path / "a") / "manifest.json")
    raw["format"]["version"] = version
    with pytest.raises(VersionError) as caught:
        parse_manifest(raw, "manifest.json")
    assert version in str(caught.value)
    assert "1.x" in str(caught.value)


def test_newer_minor_with_unknown_fields_is_read(tmp_path: Path) -> None:
    raw = read_json(write_artifact(tmp_path / "a") / "manifest.json")
    raw["format"] |= {"version": "1.7", "optional_features": ["sparkle"]}
    raw["columns"][0]["sparkle"] = raw["sparkle"] = 1
    assert parse_manifest(raw, "x").raw["sparkle"] == 1


def test_unknown_required_feature_is_refused_and_named(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a")
    raw = read_json(path / "manifest.json")
    raw["format"]["required_features"] = ["codec:i8-secret9"]
    write_json(path / "manifest.json", raw)
    sums = path / "SHA256SUMS"
    lines = [line for line in sums.read_text().splitlines() if "manifest.json" not in line]
    sums.write_text("\n".join([*lines, f"{sha256_file(path / 'manifest.json')}  manifest.json", ""]))
    for read in (open_artifact, verify):
        with pytest.raises(VersionError, match="codec:i8-secret9"):
            read(path)


def test_missing_folder_and_unfinished_artifact_are_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such folder"):
        open_artifact(tmp_path / "none")
    with writer(tmp_path / "a") as made:
        made.write(0, make_samples(2))
    with pytest.raises(FormatError, match="an unfinished one beside it"):
        open_artifact(tmp_path / "a")


def test_import_leaves_torch_unloaded() -> None:
    code = "import sys, formats, formats.writer, formats.describe; print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
