"""A recipe: an artifact without its arrays."""

from __future__ import annotations

from pathlib import Path

import pytest
from formats_fixture import make_samples, write_artifact

from formats import FormatError, open_artifact, verify
from formats.describe import describe


def test_a_recipe_has_the_ids_of_the_artifact_and_none_of_its_arrays(tmp_path: Path) -> None:
    whole = open_artifact(write_artifact(tmp_path / "whole"))
    path = write_artifact(tmp_path / "recipe", "recipe")
    recipe = open_artifact(path)
    assert recipe.content_id == whole.content_id
    assert recipe.index["sample_id"].to_pylist() == whole.index["sample_id"].to_pylist()
    assert [recipe.digests(i) for i in range(20)] == [whole.digests(i) for i in range(20)]
    assert [recipe.info(i) for i in range(20)] == [whole.info(i) for i in range(20)]
    payload = make_samples()[7].arrays["latent"].tobytes()
    files = [file for file in path.rglob("*") if file.is_file()]
    assert not any(payload in file.read_bytes() for file in files)
    assert not (path / "shards").exists()


def test_reading_arrays_of_a_recipe_says_how_to_rebuild_them(tmp_path: Path) -> None:
    recipe = open_artifact(write_artifact(tmp_path / "recipe", "recipe"))
    for read in (lambda: recipe.array(0, "latent"), lambda: recipe.stack("latent", [1]), lambda: recipe.sample(2)):
        with pytest.raises(FormatError, match="d2c rebuild"):
            read()


@pytest.mark.parametrize("level", ["quick", "default", "deep"])
def test_a_recipe_is_verified_and_described(tmp_path: Path, level: str) -> None:
    path = write_artifact(tmp_path / "recipe", "recipe")
    assert verify(path, level).ok  # type: ignore[arg-type]
    assert describe(path)["shards"] == 0
    (path / "meta/selection.json").write_text("{}")
    assert not verify(path, level).ok  # type: ignore[arg-type]
