"""What `inspect` says: of an artifact, of a sample, of two artifacts."""

from __future__ import annotations

from pathlib import Path

import pytest
from coded_fixture import write_coded
from formats_fixture import make_samples, write_artifact

from formats import FormatError
from formats.describe import describe, describe_sample
from formats.difference import difference
from formats.schema import INT4, INT8
from formats.shards import Sample


def test_fidelity_and_bytes_stand_in_the_description(tmp_path: Path) -> None:
    facts = describe(write_coded(tmp_path / "a", INT8))
    assert facts["fidelity"]["tokens"]["mean"] > 0.999
    assert {column["name"]: column["codec"] for column in facts["columns"]}["tokens"] == INT8


@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_a_sample_is_shown_with_its_facts_place_and_values(tmp_path: Path, container: str) -> None:
    path = write_artifact(tmp_path / "a", container)
    facts = describe_sample(path, "00000007")
    sample = make_samples()[7]
    assert (facts["label"], facts["class"]) == (sample.label, f"class {sample.label}")
    assert facts["facts"]["source_key"] == sample.info["source_key"]
    latent = facts["arrays"][0]
    assert (latent["minimum"], latent["maximum"]) == (sample.arrays["latent"].min(), sample.arrays["latent"].max())
    data = (path / latent["shard"]).read_bytes()
    assert data[latent["offset"] :].startswith(sample.arrays["latent"].tobytes())


def test_a_sample_of_a_recipe_is_shown_by_its_hashes(tmp_path: Path) -> None:
    whole = describe_sample(write_artifact(tmp_path / "a"), "00000007")
    recipe = describe_sample(write_artifact(tmp_path / "r", "recipe"), "00000007")
    assert recipe["sample_id"] == whole["sample_id"]
    assert [array["xxh3"] for array in recipe["arrays"]] == [array["xxh3"] for array in whole["arrays"]]


def test_an_unknown_key_is_answered_with_known_ones(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="00000000, 00000001"):
        describe_sample(write_artifact(tmp_path / "a"), "7")


def test_a_difference_names_what_came_went_and_changed(tmp_path: Path) -> None:
    samples = make_samples()
    other = [*samples[1:], Sample("extra", 0, samples[0].arrays, {**samples[0].info, "source_key": "0/new.jpg"})]
    other[4] = Sample(other[4].key, other[4].label, samples[9].arrays, other[4].info)
    old = write_artifact(tmp_path / "old", samples=samples)
    new = write_artifact(tmp_path / "new", "parquet", samples=other, licence={"spdx": "MIT"})
    found = difference(old, new)
    assert not found["same_content"]
    assert found["samples"] == {
        "in_both": 19,
        "added": 1,
        "removed": 1,
        "changed": 1,
        "changed_by_column": {"latent": 1, "tokens": 1},
    }
    assert found["added"] == ["0/new.jpg"]
    assert found["removed"] == [samples[0].info["source_key"]]
    assert found["changed"] == [{"sample": samples[5].info["source_key"], "differs_in": ["latent", "tokens"]}]
    assert {"field": "licence.spdx", "old": "CC0-1.0", "new": "MIT"} in found["manifest"]


def test_another_container_is_no_difference_of_content(tmp_path: Path) -> None:
    found = difference(write_artifact(tmp_path / "a"), write_artifact(tmp_path / "b", "parquet", 3))
    assert found["same_content"]
    assert found["samples"]["changed"] == 0
    assert [line["field"] for line in found["manifest"]] == ["container.kind"]


def test_another_codec_differs_in_the_tokens_alone(tmp_path: Path) -> None:
    found = difference(write_coded(tmp_path / "a", INT8), write_coded(tmp_path / "b", INT4))
    assert set(found["samples"]["changed_by_column"]) == {"tokens", "tokens_scale"}
    assert "columns.tokens.codec" in {line["field"] for line in found["manifest"]}
