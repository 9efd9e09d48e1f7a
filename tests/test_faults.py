"""Whatever happens to an artifact, or is done to it: never silent, never a crash, nothing run, nothing written.

A sample of what docs/benchmarks/integrity.py does in full.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from pathlib import Path

import pytest
from faults import Copy, Injection, Laboratory, build, snapshot, watched
from faults_documents import index_faults, json_faults, parquet_faults
from faults_flips import flips, regions
from faults_hostile import SELECTION, Canary, file_faults, npy_faults, tar_faults

from formats.files import read_json


@pytest.fixture(scope="module", params=["tar", "parquet"])
def laboratory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    original = build(tmp_path_factory.mktemp("sound"), request.param)
    return Laboratory(original, tmp_path_factory.mktemp("laboratory"), every_level=False)


@pytest.fixture
def tar(laboratory: Laboratory) -> bool:
    return (laboratory.original / "shards").exists()


@pytest.fixture
def original(laboratory: Laboratory, tmp_path: Path) -> Copy:
    return Copy(laboratory.original, tmp_path / "original")


@pytest.fixture(autouse=True)
def _inside(laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What writes to relative paths writes where the laboratory looks."""
    monkeypatch.chdir(laboratory.folder)


def problems(laboratory: Laboratory, injections: Iterable[Injection]) -> list[str]:
    before = snapshot(laboratory.original)
    outcomes = [laboratory.judge(injection) for injection in injections]
    assert outcomes
    assert snapshot(laboratory.original) == before
    return [f"{o.injection.region}: {o.injection.name}: {problem}" for o in outcomes for problem in o.problems]


def sealed(injections: Iterable[Injection]) -> list[Injection]:
    """Those whose hashes were repaired: the others are found by any hash, as flipped bits are."""
    return [injection for injection in injections if injection.sealed]


@pytest.mark.parametrize("repaired", [False, True])
def test_flipped_bits(laboratory: Laboratory, repaired: bool) -> None:
    assert problems(laboratory, flips(laboratory.original, 5 if repaired else 16, sealed=repaired)) == []


def test_every_byte_belongs_to_one_region(laboratory: Laboratory) -> None:
    counted = sum(len(places) for parts in regions(laboratory.original).values() for _, places in parts)
    assert counted == sum(path.stat().st_size for path in laboratory.original.rglob("*") if path.is_file())


def test_files_cut_gone_added_or_replaced(laboratory: Laboratory, original: Copy) -> None:
    assert problems(laboratory, file_faults(original)) == []


def test_shards_that_are_hostile(laboratory: Laboratory, original: Copy, tar: bool) -> None:
    every = tar_faults(original, every=4) if tar else parquet_faults(original)
    assert problems(laboratory, sealed(every)) == []


def test_arrays_that_are_hostile(laboratory: Laboratory, original: Copy, tar: bool) -> None:
    if tar:
        assert problems(laboratory, sealed(npy_faults(original))) == []


def test_an_index_that_is_hostile(laboratory: Laboratory, original: Copy, tar: bool) -> None:
    every = list(index_faults(original))
    doubled = [injection for injection in every if injection.region == "duplicate keys"]
    assert problems(laboratory, [*doubled, *every[0 if tar else 1 :: 2]]) == []


def test_documents_that_are_hostile(laboratory: Laboratory, original: Copy, tar: bool) -> None:
    assert problems(laboratory, json_faults(original, 25, seed=int(tar))) == []


def test_the_laboratory_notices(laboratory: Laboratory) -> None:
    """What a judge must see: data that differ without a trace, and code that runs."""

    def pick_others(copy: Copy) -> None:
        copy.write(SELECTION, json.dumps({"picks": []}).encode())
        copy.seal()

    assert problems(laboratory, [Injection("x", "other picks", pick_others, sealed=True)]) == ["x: other picks: silent"]
    assert problems(laboratory, [Injection("x", "nothing", lambda copy: None)]) == []
    named = Injection("x", "wrong name", lambda copy: copy.write(SELECTION, b"{}"), ("classes/classes.json",))
    assert problems(laboratory, [named]) == ["x: wrong name: silent"]
    with watched() as events:
        read_json(laboratory.original / "manifest.json")
        assert events == []
        pickle.loads(pickle.dumps(Canary()))
        Path("written").write_text("x")
        exec("1")
    Path("canary").unlink()
    Path("written").unlink()
    assert {event.split(" ")[0] for event in events} >= {"pickle.find_class", "open", "exec"}
