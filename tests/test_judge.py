"""What measures, and what it is shown: labels and seeds of what is drawn, the grid, and too little data for a judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from d2c import judge
from d2c.errors import D2CError
from d2c.generator import balanced_labels, grid, sample_seeds
from d2c.labelling import reopen
from d2c.pictures import class_numbers
from d2c.progress import Silent
from d2c.sources import open_source
from d2c.workspace import Workspace
from formats.schema import ClassRow


def test_labels_are_balanced_and_seeds_nest() -> None:
    assert np.bincount(balanced_labels(10, 3)).tolist() == [4, 3, 3]
    assert sample_seeds(0, 5) == sample_seeds(0, 9)[:5]
    assert not set(sample_seeds(0, 50)) & set(sample_seeds(1, 50))


def test_the_grid_keeps_the_order_row_by_row() -> None:
    pixels = np.stack([np.full((2, 2, 3), value, np.uint8) for value in (10, 20, 30)])
    sheet = np.asarray(grid(pixels, 2))
    assert [int(sheet[y, x, 0]) for y, x in ((3, 3), (3, 7), (7, 3))] == [10, 20, 30]


@pytest.mark.parametrize("images", [0, 10])
def test_too_few_images_for_a_classifier_is_a_clear_error(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    monkeypatch.setattr(judge, "IMAGES", images)
    here = Workspace(workspace)
    with pytest.raises(D2CError, match=rf"{images} images in(.|\n)*--inception"):
        judge.open_space(here, reopen(here), 8, None, torch.device("cpu"), Silent())


def test_a_draw_is_random_sorted_and_repeatable() -> None:
    rows = judge.drawn(1000, 100, "reference")
    assert rows == judge.drawn(1000, 100, "reference") == sorted(set(rows))
    assert rows != judge.drawn(1000, 100, "unseen")
    assert len(rows) == 100
    assert max(rows) > 900
    assert judge.drawn(5, 100, "reference") == [0, 1, 2, 3, 4]


def test_a_class_has_the_number_that_the_run_gave_it(image_folder: Path) -> None:
    classes = [ClassRow(id=n, name=s, source_id=s, prompt="", count=1) for n, s in ((0, "sea lion"), (1, "cat"))]
    assert class_numbers(open_source(image_folder).classes, classes).tolist() == [1, -1, 0]
