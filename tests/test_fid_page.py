"""The page of a measurement, and several side by side: what stands there, and where numbers cannot be compared."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from d2c import fid, fid_page, training
from d2c.errors import D2CError
from d2c.fid import FidConfig
from d2c.fid_page import Measured
from d2c.recipe import recipe
from d2c.sampling import SamplerConfig
from d2c_cli.app import app
from formats.files import read_json, write_json


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> list[Path]:
    """Two measured runs that differ in their seed."""
    folder, found = tmp_path_factory.mktemp("runs"), []
    for seed in (0, 1):
        config = training.TrainingConfig(
            artifact=packed, out=folder / f"seed-{seed}", model="sit-tiny/2", seed=seed, device="cpu",
            recipe=recipe("small", steps=20, batch_size=6),
        )  # fmt: skip
        found.append(training.run(training.plan(config)).path)
        asked = FidConfig(
            judged=found[-1], workspace=packed.parent / "workspace", samples=30, sampler=SamplerConfig(steps=3),
            device="cpu",
        )  # fmt: skip
        fid.run(fid.plan(asked))
    return found


def changed(run: Path, folder: Path, **protocol: object) -> Path:
    """The same measurement with another protocol."""
    document = read_json(run / "fid" / "fid.json")
    document["protocol"] |= protocol
    write_json(folder / "fid.json", document)
    return folder


def test_every_measurement_leaves_its_page(runs: list[Path]) -> None:
    html = (runs[0] / "fid" / "report.html").read_text(encoding="utf-8")
    document = read_json(runs[0] / "fid" / "fid.json")
    assert "seed-0: FD (classifier)" in html
    for row in document["rows"]:
        assert f">{row['name']}<" in html
        assert f">{row['distance']:,.4g}<" in html
    for note in document["notes"]:
        assert note.split(":")[0] in html
    assert html.count("data:image/png;base64,") == 2  # the grid and the closest pairs
    assert document["protocol"]["content_id"] in html
    assert "http" not in re.sub(r"data:[^\"]*", "", html)


def test_several_stand_side_by_side_the_best_first(runs: list[Path]) -> None:
    found = [Measured.open(run) for run in runs]
    html = fid_page.several(found)
    best = min(found, key=lambda measured: measured.generated["distance"])
    assert html.index(best.name) < html.index(next(one.name for one in found if one is not best))
    assert fid_page.incomparable(found) == []
    assert "Not measured alike" not in html


def test_it_says_where_protocols_differ(runs: list[Path], tmp_path: Path) -> None:
    other = changed(runs[1], tmp_path / "other", samples=50_000, training_seed=9)
    told = fid_page.incomparable([Measured.open(runs[0]), Measured.open(other)])
    assert told == ["Not measured alike: samples is 30 or 50000. Distances cannot be compared."]
    assert told[0] in fid_page.several([Measured.open(runs[0]), Measured.open(other)])


def test_names_of_others_cannot_become_markup(runs: list[Path], tmp_path: Path) -> None:
    other = changed(runs[0], tmp_path / "x", model="<script>alert(1)</script>")
    assert "<script>" not in fid_page.one(Measured.open(other))


def test_the_command_prints_a_table_and_writes_the_page(runs: list[Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", *map(str, runs), "--out", str(tmp_path / "all.html"), "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert sorted(row["run"] for row in rows) == ["seed-0", "seed-1"]
    assert rows[0]["distance"] <= rows[1]["distance"]
    assert "2 measurements" in (tmp_path / "all.html").read_text()


def test_what_was_not_measured_says_how_to(tmp_path: Path) -> None:
    with pytest.raises(D2CError, match=r"nothing was measured(.|\n)*d2c fid"):
        Measured.open(tmp_path)
    (tmp_path / "fid.json").write_text("{")
    with pytest.raises(D2CError, match="cannot be read"):
        Measured.open(tmp_path)
