"""Duplicates and leaks as `score` deals with them: listed, dropped where asked, and never a reason to score again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from d2c import scoring, selection
from d2c.deduplication import DUPLICATES, LEAKS
from d2c.errors import UsageError
from d2c.scoring import ScoringConfig
from d2c.selection import SelectionConfig
from d2c.workspace import SCORES
from formats.files import read_table

SIDE = 8


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classes of `scorer`; a cat and a dog are there twice in their class, another dog is also a cat."""
    root = tmp_path_factory.mktemp("data") / "twins"
    for number, name in enumerate(("cat", "dog", "sea lion")):
        (root / name).mkdir(parents=True)
        for i in range(6):
            picture(100 * number + i).save(root / name / f"{i}.png")
    shutil.copy(root / "cat" / "2.png", root / "cat" / "copy.png")
    ImageOps.mirror(picture(103)).save(root / "dog" / "mirrored.png")
    shutil.copy(root / "dog" / "5.png", root / "cat" / "a-dog.png")
    return root


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures without labels, one of which is in `twins`."""
    root = tmp_path_factory.mktemp("data") / "val"
    root.mkdir()
    picture(4).save(root / "seen.png")
    picture(999).save(root / "new.png")
    return root


def score(source: Path, workspace: Path, scorer: Path, **options: Any) -> scoring.Result:
    config = ScoringConfig(
        source=str(source), workspace=workspace, scorer=str(scorer), codec="rgb", size=SIDE, evals=2, device="cpu",
        **options,
    )  # fmt: skip
    return scoring.run(scoring.plan(config))


def test_duplicates_are_listed_and_kept_unless_asked(tmp_path: Path, twins: Path, scorer: Path) -> None:
    result = score(twins, tmp_path, scorer)
    listed = read_table(result.path / DUPLICATES).to_pylist()
    assert {(row["key"], row["kind"], row["kept"]) for row in listed} == {
        ("cat/2.png", "exact", True),
        ("cat/copy.png", "exact", False),
        ("dog/3.png", "mirrored", True),
        ("dog/mirrored.png", "mirrored", False),
        ("cat/a-dog.png", "exact", True),
        ("dog/5.png", "exact", True),
    }
    facts = result.record.summary["duplicates"]
    assert (facts["groups"], facts["removed"], facts["conflicts"]) == (3, 2, 1)
    assert result.record.summary["images"] == read_table(result.path / SCORES).num_rows == 21


def test_dropped_duplicates_are_no_candidates_and_nothing_is_scored_again(
    tmp_path: Path, twins: Path, scorer: Path
) -> None:
    first = score(twins, tmp_path, scorer)
    times = {file: file.stat().st_mtime_ns for file in (first.path / "parts").iterdir()}
    before = read_table(first.path / SCORES)
    result = score(twins, tmp_path, scorer, duplicates="drop", keep="largest")
    assert {file: file.stat().st_mtime_ns for file in (first.path / "parts").iterdir()} == times
    after = read_table(result.path / SCORES)
    gone = set(before["key"].to_pylist()) - set(after["key"].to_pylist())
    assert gone == {"cat/copy.png", "dog/mirrored.png"}
    assert {row["name"]: row["count"] for row in result.record.summary["classes"]} == {
        "cat": 7, "dog": 6, "sea lion": 6,
    }  # fmt: skip
    picks = selection.run(selection.plan(SelectionConfig(workspace=tmp_path, per_class=8)))
    assert not gone & set(picks.table["key"].to_pylist())
    assert score(twins, tmp_path, scorer).record.summary["images"] == 21


def test_images_of_a_held_out_source_are_leaks(tmp_path: Path, twins: Path, held_out: Path, scorer: Path) -> None:
    result = score(twins, tmp_path, scorer, held_out=str(held_out), duplicates="off")
    assert read_table(result.path / LEAKS).to_pylist() == [
        {"key": "cat/4.png", "held_out_key": "seen.png", "kind": "exact", "distance": 0.0}
    ]
    assert result.record.summary["leaks"] == 1
    assert result.record.summary["duplicates"] is None
    assert read_table(result.path / DUPLICATES).num_rows == 0


def test_another_held_out_source_is_looked_at_anew(tmp_path: Path, twins: Path, held_out: Path, scorer: Path) -> None:
    assert score(twins, tmp_path, scorer).record.summary["leaks"] is None
    assert score(twins, tmp_path, scorer, held_out=str(held_out)).record.summary["leaks"] == 1
    assert score(twins, tmp_path, scorer, held_out=str(twins / "dog")).record.summary["leaks"] == 8


@pytest.mark.parametrize(("option", "value"), [("duplicates", "merge"), ("keep", "best")])
def test_unknown_choices_are_refused(option: str, value: str, twins: Path, scorer: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="duplicates"):
        score(twins, tmp_path, scorer, **{option: value})
