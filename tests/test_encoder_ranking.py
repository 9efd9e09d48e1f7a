"""Ranking encoders without training: iREPA's measures against plain loops, and the ranking of a scored workspace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from d2c import encoder_ranking
from d2c.encoder_ranking import CAVEAT, cds, correlogram, lds, rank, rmsc
from d2c.errors import D2CError
from d2c.scorer_tokens import ScorerTokens
from d2c_cli.app import app

GRID = 4
"""Of the fixture's scorer: 8 px and patches of 2."""


def random_tokens(grid: int, count: int = 3, width: int = 5) -> np.ndarray[Any, Any]:
    return np.random.default_rng(grid).normal(size=(count, grid, grid, width)).astype(np.float32)


def by_distance(image: np.ndarray[Any, Any]) -> dict[int, list[float]]:
    """Cosines of all ordered pairs of one image's tokens, by their Manhattan distance: the definition, written out."""
    cosines: dict[int, list[float]] = {}
    cells = list(np.ndindex(image.shape[:2]))
    for a in cells:
        for b in cells:
            x, y = image[a].astype(float), image[b].astype(float)
            distance = abs(a[0] - b[0]) + abs(a[1] - b[1])
            cosines.setdefault(distance, []).append(float(x @ y / np.sqrt((x @ x) * (y @ y))))
    return cosines


@pytest.mark.parametrize("grid", [3, 4, 5, 7])
def test_measures_are_their_definitions(grid: int) -> None:
    tokens = random_tokens(grid)
    for row, image in enumerate(tokens):
        cosines = by_distance(image)
        near = [c for d, values in cosines.items() if 0 < d < max(2, grid / 2) for c in values]
        far = [c for d, values in cosines.items() if d >= max(2, grid / 2) for c in values]
        assert lds(tokens)[row] == pytest.approx(np.mean(near) - np.mean(far), abs=1e-6)
        reach = range(1, max(2, grid // 2) + 1)
        line = np.polyfit(reach, [np.mean(cosines[d]) for d in reach], 1)
        assert cds(tokens)[row] == pytest.approx(-line[0], abs=1e-6)
        unit = image.reshape(grid * grid, -1) / np.linalg.norm(image.reshape(grid * grid, -1), axis=1, keepdims=True)
        assert rmsc(tokens)[row] == pytest.approx(np.sqrt(np.trace(np.cov(unit.T, bias=True))), abs=1e-6)


def test_a_correlogram_counts_every_pair_once_each_way() -> None:
    _, pairs = correlogram(random_tokens(5))
    assert pairs.sum() == 25 * 24
    assert pairs[0] == 2 * (2 * 5 * 4)  # neighbours across and down, both ways
    assert pairs[-1] == 4  # two diagonals, both ways


def test_structure_raises_the_measures_and_losing_the_places_lowers_them() -> None:
    across, down = np.meshgrid(np.linspace(0, 3, 8), np.linspace(0, 3, 8))
    smooth = np.stack([np.cos(across), np.sin(across), np.cos(down), np.sin(down)], axis=-1)[None].astype(np.float32)
    order = np.random.default_rng(0).permutation(64)
    shuffled = smooth.reshape(1, 64, 4)[:, order].reshape(smooth.shape)
    assert lds(smooth) > lds(shuffled) + 0.2
    assert cds(smooth) > cds(shuffled) + 0.02
    assert rmsc(smooth) == pytest.approx(rmsc(shuffled))  # it knows no places, only spread
    flat = smooth + 10  # one large component in every token, as a global one would be
    for measure in (lds, cds, rmsc):
        assert 0 < measure(flat) < measure(smooth) / 4
        np.testing.assert_allclose(measure(smooth * 7), measure(smooth), rtol=1e-4)


def test_tokens_without_structure_or_length_measure_nothing() -> None:
    for tokens in (np.ones((2, 4, 4, 3), np.float32), np.zeros((2, 4, 4, 3), np.float32)):
        for measure in (lds, cds, rmsc):
            np.testing.assert_allclose(measure(tokens), 0, atol=1e-6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "tiny.safetensors"
    save_file(timm.create_model("test_vit", img_size=64).state_dict(), path)
    return f"timm:test_vit:{path}"


def ranked(workspace: Path, encoders: list[str], **options: Any) -> encoder_ranking.Ranking:
    return rank(workspace, encoders, grid=GRID, device="cpu", **{"images": 40, "batch_size": 16, **options})


def test_encoders_are_ranked_by_lds_and_one_that_fails_says_why(workspace: Path, tiny: str) -> None:
    absent = "timm:test_vit:/nowhere/absent.safetensors"
    ranking = ranked(workspace, [absent, "scorer", "nonsense", tiny, "scorer:1"])
    good, failed = ranking.rows[:3], ranking.rows[3:]
    assert {row.encoder for row in good} == {"scorer", tiny, "scorer:1"}
    assert [row.measures["lds"][0] for row in good] == sorted((r.measures["lds"][0] for r in good), reverse=True)
    assert {row.encoder: row.dim for row in good}[tiny] == 64
    for row in good:
        assert set(row.measures) == {"lds", "cds", "rmsc"}
        assert row.grid == GRID
        assert row.seconds_per_1000 is not None
        assert row.seconds_per_1000 > 0
        assert row.error is None
    assert [row.encoder for row in failed] == [absent, "nonsense"]
    assert "no such weights file" in str(failed[0].error)
    assert "no vision encoder" in str(failed[1].error)
    assert (ranking.images, ranking.caveat) == (40, CAVEAT)


def test_figures_are_those_of_all_tokens_at_once_whatever_the_batch(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray[Any, Any]] = []
    classes: list[int] = []
    encode = ScorerTokens.encode

    def spy(self: ScorerTokens, pixels: Any, labels: Any) -> Any:
        seen.append(encode(self, pixels, labels))
        classes.extend(labels)
        return seen[-1]

    monkeypatch.setattr(ScorerTokens, "encode", spy)
    row = ranked(workspace, ["scorer"], batch_size=7).rows[0]
    assert [len(tokens) for tokens in seen] == [7] * 5 + [5]
    values = lds(np.concatenate(seen).astype(np.float32).reshape(40, GRID, GRID, -1))
    assert row.measures["lds"][0] == pytest.approx(values.mean())
    assert row.measures["lds"][1] == pytest.approx(values.std(ddof=1) / 40**0.5)
    classes.clear()
    ranked(workspace, ["scorer"], images=95)
    assert np.bincount(classes).tolist() == [40, 30, 25]  # the scorer is told each image's own class
    again = ranked(workspace, ["scorer"], batch_size=40).rows[0]
    assert again.measures["cds"] == pytest.approx(row.measures["cds"], abs=1e-4)


def test_the_seed_draws_the_images(workspace: Path) -> None:
    def figures(**options: Any) -> Any:
        return ranked(workspace, ["scorer"], **options).rows[0].measures

    assert figures(images=20) == figures(images=20)
    assert figures(images=20) != figures(images=20, seed=1)
    assert ranked(workspace, ["scorer"], images=2000).images == 95  # all there are


def test_a_device_that_is_too_small_for_one_encoder_does_not_end_the_ranking(
    workspace: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(ScorerTokens, "encode", full)
    rows = ranked(workspace, ["scorer", tiny]).rows
    assert rows[0].encoder == tiny
    assert "out of memory" in str(rows[1].error)


def test_what_no_encoder_could_help_ends_it(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(D2CError, match="2 or more"):
        rank(workspace, ["scorer"], grid=1)
    with pytest.raises(D2CError, match="no finished scores"):
        ranked(tmp_path / "empty", ["scorer"])
    read = encoder_ranking.read_table

    def another(path: Path, **options: Any) -> pa.Table:
        table = read(path, **options)
        return table.set_column(2, "xxh3", pa.array(["0" * 32] * len(table)))

    monkeypatch.setattr(encoder_ranking, "read_table", another)
    with pytest.raises(D2CError, match="changed since it was scored"):
        ranked(workspace, ["scorer"])


def test_the_command_ranks_and_says_what_it_is_worth(workspace: Path) -> None:
    where = ["--workspace", str(workspace), "--device", "cpu", "--json"]
    found = CliRunner().invoke(app, ["attach", "--rank-encoders", "scorer,nonsense", "--rank-images", "20", *where])
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert [row["encoder"] for row in told["rows"]] == ["scorer"]
    assert [row["encoder"] for row in told["failed"]] == ["nonsense"]
    assert "not prove" in told["caveat"]
    refused = CliRunner().invoke(app, ["attach", "--rank-encoders", "scorer", "--text", "hashed"])
    assert (refused.exit_code, "attaches nothing" in refused.stderr) == (2, True)
