"""How two selections of the same images differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2c.errors import D2CError
from d2c.own_table import read_keys
from d2c.workspace import SCORES, SELECTION, Workspace
from formats.files import read_table

Array: TypeAlias = np.ndarray[Any, Any]
CLASSES = 10
"""Classes that are listed, those that differ most."""


def compare(workspace: Workspace, first: str, second: str) -> dict[str, Any]:
    """How the selection ``second`` differs from ``first``: names, or files with a column ``key``, such as other picks.

    Raises:
        D2CError: one is not there, or has images that were not scored.
    """
    scores = workspace.scores.require("d2c score DIR")
    table = read_table(workspace.scores.output(SCORES), columns=["key", "label", "score"])
    names = [row["name"] for row in scores.summary["classes"]]
    rows = [_rows(workspace, table["key"].combine_chunks(), one) for one in (first, second)]
    return {
        "first": first,
        "second": second,
        **difference(table["label"].to_numpy(), table["score"].to_numpy(), names, rows[0], rows[1]),
    }


def _rows(workspace: Workspace, keys: pa.Array, selection: str) -> Array:
    path = Path(selection)
    if path.suffix == ".parquet":
        chosen = read_keys(path)
    else:
        workspace.selected(selection)
        chosen = read_table(workspace.selection(selection).output(SELECTION), columns=["key"])["key"]
    found = pc.index_in(chosen, value_set=keys)
    if found.null_count or not len(found):
        raise D2CError(
            "this selection is not of the scored images",
            where=selection,
            found=f"{found.null_count} of {len(found)} images without a score",
            hint="compare selections of one workspace",
        )
    return np.unique(found.to_numpy().astype(np.int64))


def difference(labels: Array, scores: Array, names: list[str], first: Array, second: Array) -> dict[str, Any]:
    """Overlap and shift of two sets of rows of N scored images: ``labels`` [N], ``scores`` [N], ``names`` [C].

    ``common_by_chance`` is what two random selections with the same images of each class would share. Shifts of the
    score are in standard deviations of all images; ``ks`` is the Kolmogorov-Smirnov statistic, its p as if no image
    were in both.
    """
    from scipy.stats import ks_2samp

    sizes = np.bincount(labels, minlength=len(names))
    both = np.intersect1d(first, second)
    counts = [np.bincount(labels[rows], minlength=len(names)) for rows in (first, second, both)]
    # Hypergeometric, class by class.
    chance = counts[0] * counts[1] / np.maximum(sizes, 1)
    spread_of_it = chance * (sizes - counts[0]) * (sizes - counts[1]) / np.maximum(sizes * (sizes - 1), 1)
    shares = counts[1] / len(second) - counts[0] / len(first)
    unlike = 1 - counts[2] / np.maximum(counts[0] + counts[1] - counts[2], 1)
    order = np.lexsort((np.arange(len(names)), -unlike, -np.abs(shares)))
    order = order[(counts[0] + counts[1])[order] > 0][:CLASSES]
    spread = float(scores.std()) or 1.0
    test = ks_2samp(scores[first], scores[second], method="asymp")
    means = [float(scores[rows].mean()) for rows in (first, second)]
    return {
        "images": {"first": len(first), "second": len(second), "common": len(both)},
        "common_by_chance": {"mean": float(chance.sum()), "sd": float(np.sqrt(spread_of_it.sum()))},
        "jaccard": len(both) / len(np.union1d(first, second)),
        "score": {
            "mean_first": means[0],
            "mean_second": means[1],
            "shift_sd": (means[1] - means[0]) / spread,
            "ks": float(test.statistic),
            "ks_p": float(test.pvalue),
        },
        "class_shift": float(np.abs(shares).sum() / 2),
        "classes": [
            {
                "class": names[label],
                "first": int(counts[0][label]),
                "second": int(counts[1][label]),
                "common": int(counts[2][label]),
                "shift_sd": _shift(labels, scores, first, second, int(label)),
            }
            for label in order
        ],
    }


def _shift(labels: Array, scores: Array, first: Array, second: Array, label: int) -> float | None:
    """Of the mean score inside one class, in standard deviations of the class."""
    own = [scores[rows[labels[rows] == label]] for rows in (first, second)]
    spread = float(scores[labels == label].std())
    return float(own[1].mean() - own[0].mean()) / spread if len(own[0]) and len(own[1]) and spread else None
