"""Attach: what is asked for is remembered, and nothing is mixed or half written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import pack_request

from d2c import attachment, pipeline, selection
from d2c.errors import D2CError, UsageError
from d2c.scorer_tokens import ScorerTokens
from d2c.selection import SelectionConfig
from formats import open_artifact
from formats.files import read_json, write_json


@pytest.fixture
def chosen(workspace: Path) -> Path:
    """A workspace with a selection of 12 images."""
    selection.run(selection.plan(SelectionConfig(workspace=workspace, per_class=4)))
    return workspace


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def attach(workspace: Path, **options: Any) -> attachment.Result:
    request = pack_request(workspace, workspace.parent / "shards", **options)
    return pipeline.attach(request, pipeline.current_selection(workspace))[0]


def test_the_prompt_is_ones_own_and_remembered(chosen: Path) -> None:
    attach(chosen, prompt="a blurry {class} on a mat")
    pipeline.pack(pack_request(chosen, chosen.parent / "shards"))
    artifact = open_artifact(chosen.parent / "shards")
    assert [row.prompt for row in artifact.classes][2] == "a blurry sea lion on a mat"
    assert artifact.manifest["encoders"]["text"]["prompt_template"] == "a blurry {class} on a mat"
    with pytest.raises(D2CError, match="no place for the class"):
        attach(chosen, prompt="a photo")
    with pytest.raises(D2CError, match="no place for the class"):
        attach(chosen, prompt="")


def test_tokens_of_other_weights_are_not_mixed_with_those_that_are_there(
    chosen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A kill comes when two of three parts are done, and the hub then has newer weights.
    monkeypatch.setattr(attachment, "PART", 5)
    with monkeypatch.context() as killed:
        killed.setattr(attachment, "_finish_vision", interrupt)
        with pytest.raises(KeyboardInterrupt):
            attach(chosen)
    (record,) = chosen.glob(f"attachments/*/*/{attachment.ENCODER}")
    sorted((record.parent / "parts").glob("*.npy"))[-1].unlink()
    info = read_json(record)
    write_json(record, {**info, "weights_xxh3": "0" * 32})
    with pytest.raises(D2CError, match=r"weights changed since(.|\n)*--overwrite"):
        attach(chosen)
    attach(chosen, overwrite=True)
    assert read_json(record) == info


def test_tokens_that_are_no_numbers_leave_no_part_behind(chosen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ScorerTokens._on_grid
    monkeypatch.setattr(ScorerTokens, "_on_grid", lambda self, tokens: whole(self, tokens) * np.nan)
    with pytest.raises(D2CError, match="NaN"):
        attach(chosen)
    assert not list(chosen.glob("attachments/*/*/parts/*.npy"))


def test_a_grid_that_no_model_has_is_said_when_training_not_before(chosen: Path) -> None:
    with pytest.raises(UsageError, match="cannot be seen in these views"):
        attach(chosen, views=("hflip", "orig"))
    attach(chosen, grid=3)  # resampled, and recorded
    pipeline.pack(pack_request(chosen, chosen.parent / "shards"))
    vision = open_artifact(chosen.parent / "shards").manifest["encoders"]["vision"]
    assert vision["grid"] == 3
    assert "bilinear, from 4 x 4" in vision["resize"]
