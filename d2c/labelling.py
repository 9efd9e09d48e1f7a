"""The classes of a source: its own, none, or clusters of its images; and a scored source, opened as it was scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2c import runtime
from d2c.clusters import PLAIN, cluster, cluster_names, wanted
from d2c.errors import D2CError, UsageError
from d2c.progress import Progress, Silent
from d2c.sources import Labels, Source, open_source, relabel
from d2c.sources.places import url_scheme
from d2c.workspace import SCORES, Workspace
from formats.errors import FormatError
from formats.files import read_table, write_table

OWN = "source"
"""Labels that come with the images."""
_TABLE = "clusters.parquet"


def open_labelled(
    location: str, labels: str, workspace: Workspace, *, seed: int, threads: int = 4, progress: Progress | None = None
) -> Source:
    """The source with its own labels (``source``), one class (``none``), or k-means clusters (``clusters:K``).

    Clusters are found once and kept in the workspace.

    Raises:
        UsageError: ``labels`` is none of these, or there are fewer images than clusters.
        D2CError: the source cannot be opened.
    """
    k = wanted(labels)
    if k is None:
        if labels not in get_args(Labels):
            raise UsageError("classes cannot come from there", found=labels, expected="source, none or clusters:K")
        return open_source(location, progress, labels=cast(Labels, labels))
    base = open_source(location, progress, labels="none")
    stage, asked, inputs = workspace.clusters, _asked(k, seed), {"source": base.digest}

    if k > len(base):
        raise UsageError("there are fewer images than clusters", found=len(base), expected=f"at least {k}")

    def find() -> None:
        with stage.locked():
            stage.begin(asked, inputs)
            with stage.spending():
                numbers = cluster(base, k, seed=seed, threads=threads, progress=progress or Silent())
            write_table(stage.path / _TABLE, pa.table({"key": base.keys, "cluster": numbers}))
            stage.finish([_TABLE], {"clusters": int(numbers.max()) + 1}, device="cpu")

    runtime.once(lambda: find() if stage.stale(asked, inputs) else None)
    numbers = read_table(stage.output(_TABLE), columns=["cluster"])["cluster"].to_numpy()
    return relabel(base, numbers, cluster_names(numbers))


def clustering_due(location: str, labels: str, workspace: Workspace, seed: int) -> list[str]:
    """Why `open_labelled` would first read all images and find clusters; empty where it would not."""
    k = wanted(labels)
    if k is None:
        return []
    return workspace.clusters.stale(_asked(k, seed), {"source": open_source(location, labels="none").digest})


def reopen(workspace: Workspace) -> Source:
    """The scored source, where it lies now, with the classes that it was scored with.

    Raises:
        D2CError: nothing was scored yet, or the images are no longer where they were.
    """
    summary = workspace.scores.require("d2c score DIR").summary
    location, labels = summary["source"]["path"], summary["source"].get("labels", OWN)
    with images_there(workspace):
        if labels == OWN:
            return open_source(location)
        source = open_source(location, labels="none")
    scores = read_table(workspace.scores.output(SCORES), columns=["key", "label"])
    names = [row["name"] for row in workspace.classes()]
    return assign(source, scores["key"], scores["label"].to_numpy(), names)


@contextmanager
def images_there(workspace: Workspace) -> Iterator[None]:
    """For blocks that open the scored source.

    Raises:
        D2CError: it is no longer where it was; the message names the command that takes note of another place.
    """
    try:
        yield
    except FormatError as error:
        location = workspace.scores.require("d2c score DIR").summary["source"]["path"]
        if url_scheme(location) is not None or Path(location).exists():
            raise
        place = quote(str(workspace.path))
        raise D2CError(
            "the scored images are no longer where they were",
            where=location,
            found=error.found,
            hint=f"score them where they are now, with the options of before: d2c score NEW_PLACE --workspace {place}; "
            "files that are the same keep their scores",
        ) from error


def assign(source: Source, keys: pa.ChunkedArray, labels: np.ndarray[Any, Any], names: Sequence[str]) -> Source:
    """``source`` with the classes ``names``: ``labels`` [N] of the images ``keys`` [N]; all others are of class 0."""
    places = pc.index_in(keys, value_set=pa.array(source.keys)).to_numpy(zero_copy_only=False)
    known = ~np.isnan(places)
    numbers = np.zeros(len(source), dtype=np.int32)
    numbers[places[known].astype(np.int64)] = labels[known]
    return relabel(source, numbers, names)


def _asked(k: int, seed: int) -> dict[str, Any]:
    return {"k": k, "seed": seed, "features": PLAIN.name}
