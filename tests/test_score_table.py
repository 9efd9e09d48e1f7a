"""The table of scores: named scores of the same evaluations, and what a merge keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from d2c.errors import D2CError
from d2c.score_table import PART_SCHEMA, merge, weighted
from d2c.transport import Eps, Objective, Velocity
from formats.files import write_table

TIMES = np.array([[0.1, 0.3, 0.5, 0.9]])


def test_bands_are_means_over_their_evaluations() -> None:
    losses = np.array([[1.0, 3.0, 5.0, 7.0], [2.0, 2.0, 8.0, 0.0]])
    found = weighted(losses, TIMES, Velocity())
    assert found["score_low_noise"].tolist() == [2.0, 2.0]
    assert found["score_mid_noise"].tolist() == [5.0, 8.0]
    assert found["score_high_noise"].tolist() == [7.0, 0.0]


def test_images_with_times_of_their_own_have_bands_of_their_own() -> None:
    times = np.array([[0.1, 0.2], [0.9, 1.0]])
    found = weighted(np.array([[1.0, 3.0], [5.0, 7.0]]), times, Velocity())
    np.testing.assert_array_equal(found["score_low_noise"], [2.0, np.nan])
    np.testing.assert_array_equal(found["score_high_noise"], [np.nan, 6.0])


@pytest.mark.parametrize(("objective", "reading"), [(Velocity(), "eps"), (Eps(), "velocity")])
def test_another_reading_is_the_error_of_the_same_prediction_read_so(objective: Objective, reading: str) -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise, prediction = (torch.randn(1, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    losses, expected = [], []
    for time in TIMES[0]:
        t = torch.tensor([time])
        z = objective.corrupt(latents, noise, t)
        losses.append(float((prediction - objective.target(latents, noise, t)).square().mean()))
        truth = {"eps": noise, "velocity": noise - latents}[reading]
        expected.append(float((getattr(objective.convert(prediction, z, t), reading) - truth).square().mean()))
    found = weighted(np.array([losses]), TIMES, objective)[f"score_{reading}"]
    np.testing.assert_allclose(found, [np.mean(expected)], rtol=1e-6)


def write_part(path: Path, rows: list[dict[str, object]]) -> Path:
    write_table(path, pa.Table.from_pylist(rows, schema=PART_SCHEMA))
    return path


def row(key: str, losses: list[float], times: list[float] | None = None) -> dict[str, object]:
    facts = {"xxh3": f"{len(key):032x}", "bytes": 7, "width": 3, "height": 4}
    return {"key": key, "label": 0, "losses": losses, "times": times, **facts}


def test_a_merge_sorts_by_key_and_sets_bad_rows_aside(tmp_path: Path) -> None:
    first = write_part(tmp_path / "0", [row("b", [1, 3, 2, 2]), {"key": "bad", "reason": "empty"}])
    second = write_part(tmp_path / "1", [row("a", [4, 4, 4, 8])])
    merged = merge([first, second], tmp_path, TIMES[0], Velocity())
    assert merged.scores["key"].to_pylist() == ["a", "b"]
    assert merged.scores["score"].to_pylist() == [5.0, 2.0]
    assert merged.scores["evals"].to_pylist() == [4, 4]
    assert merged.scores["losses"].to_pylist()[1] == [1, 3, 2, 2]
    assert merged.bad.to_pylist() == [{"key": "bad", "reason": "empty"}]
    other = merge([second, first], tmp_path, TIMES[0], Velocity())
    assert other.scores.equals(merged.scores)
    assert other.fingerprint == merged.fingerprint


def test_an_empty_band_is_null_in_the_table(tmp_path: Path) -> None:
    part = write_part(tmp_path / "0", [row("a", [1, 3], [0.1, 0.2]), row("b", [1, 3], [0.1, 0.9])])
    merged = merge([part], tmp_path, None, Velocity())
    assert merged.scores["score_high_noise"].to_pylist() == [None, 3.0]


def test_no_readable_image_is_an_error_that_names_one(tmp_path: Path) -> None:
    part = write_part(tmp_path / "0", [{"key": "x.png", "reason": "the file is empty"}])
    with pytest.raises(D2CError, match=r"x\.png: the file is empty"):
        merge([part], tmp_path, TIMES[0], Velocity())
