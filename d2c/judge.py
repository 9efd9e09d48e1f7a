"""What measures: a feature space (Inception where its weights are given, else a classifier of the user's own data),
and real images seen in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2c import batches, runtime
from d2c.errors import D2CError
from d2c.classifier import Classifier, train_classifier
from d2c.features import FeatureSpace, open_inception
from d2c.progress import Progress
from d2c.seen import Images
from d2c.sources import Source
from d2c.tokens import save_array
from d2c.workspace import SCORES, Workspace
from formats.files import read_table
from formats.hashing import xxh3_json
from formats.schema import ClassRow

IMAGES = 20_000
"""Images that a classifier is trained on, at most."""
Array = np.ndarray[Any, Any]
_KEPT = ("features", "labels", "digests", "rows")


def open_space(
    workspace: Workspace, source: Source, size: int, inception: Path | None, device: torch.device, progress: Progress
) -> FeatureSpace:
    """Inception with the weights ``inception``, else the workspace's classifier, trained if it is missing.

    ``source`` is the scored one (`d2c.labelling.reopen`), whatever is measured against: one classifier serves all runs.

    Raises:
        D2CError: the Inception file is missing, or the data has too few classes or images for a classifier.
    """
    if inception is not None:
        return open_inception(inception, device)
    stage = workspace.judge
    scores = workspace.scores.require("d2c score DIR")
    config, inputs = {"size": size, "images": IMAGES, "seed": 0}, {"scores": scores.digest}
    if stage.stale(config, inputs):
        stage.begin(config, inputs)
        progress.say("training a classifier on the source, to measure with (--inception FILE gives FID itself)")
        with stage.spending(), runtime.one_thread(device):
            labels, pixels = read_images(source, scored_rows(workspace, source, IMAGES, "judge"), size)
            judge = train_classifier(pixels, labels, device=device, progress=progress)
            judge.save(stage.path)
        facts = {"accuracy": judge.info.accuracy, "images": judge.info.images, "digest": judge.digest}
        stage.finish(["classifier.safetensors", "classifier.json"], facts, device=device.type)
    return Classifier.load(stage.path, device)


def drawn(count: int, limit: int, *purpose: object) -> list[int]:
    """At most ``limit`` of the numbers below ``count``, drawn at random by ``purpose``; sorted."""
    rows = np.arange(count) if count <= limit else np.sort(runtime.rng(*purpose, "rows").permutation(count)[:limit])
    return [int(row) for row in rows]


def scored_rows(workspace: Workspace, source: Source, limit: int, *purpose: object) -> list[int]:
    """Indices into the scored source of at most ``limit`` scored images, drawn at random by ``purpose``; sorted."""
    keys = read_table(workspace.scores.path / SCORES, columns=["key"])["key"].to_pylist()
    keys = [keys[row] for row in drawn(len(keys), limit, *purpose)]
    place = {key: index for index, key in enumerate(source.keys)}
    return [place[key] for key in keys if key in place]


def read_images(
    source: Source, rows: list[int], size: int
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.uint8]]]:
    """Labels int64 [N] and pixels u1 [N, size, size, 3] of the readable images among ``rows``."""
    labels, pixels = [np.empty(0, np.int64)], [np.empty((0, size, size, 3), np.uint8)]
    for batch in batches.load(source, rows, size, batch=64):
        labels.append(source.labels[batch.indices].astype(np.int64))
        pixels.append(batch.pixels)
    return np.concatenate(labels), np.concatenate(pixels)


def class_numbers(source: Source, classes: Sequence[ClassRow]) -> Array:
    """The run's number of each class of the source, by what the data calls it: int64 [C], -1 where it has none."""
    known = {row.source_id: row.id for row in classes}
    return np.array([known.get(found.source_id, -1) for found in source.classes], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class RealImages:
    """A source seen in a feature space: ``size`` px, classes renumbered by ``numbers`` (`class_numbers`)."""

    source: Source
    size: int
    space: FeatureSpace
    numbers: Array
    progress: Progress

    def reference(self, workspace: Workspace, rows: list[int], device: torch.device) -> Reference:
        """The images at ``rows``, kept in the workspace for the next run that is measured against them.

        Raises:
            D2CError: none of them can be read.
        """
        stage = workspace.reference(f"{self.space.name}-{self.source.digest[:8]}")
        asked = {"size": self.size, "images": len(rows), "rows": xxh3_json(rows)}
        inputs = {"space": self.space.digest, "source": self.source.digest}
        if stage.stale(asked, inputs):
            stage.begin(asked, inputs)
            with stage.spending():
                columns = self._read(rows)
            if not len(columns[0]):
                raise D2CError(
                    "no image to measure against could be read",
                    where=self.source.location,
                    found=f"{len(rows)} files, none readable",
                    hint="open a few of them in an image viewer, or name other images with --reference DIR",
                )
            for name, column in zip(_KEPT, columns, strict=True):
                save_array(stage.path / f"{name}.npy", column)
            stage.finish([f"{name}.npy" for name in _KEPT], {}, device=device.type)
        features, labels, digests, found = (np.load(stage.path / f"{n}.npy", allow_pickle=False) for n in _KEPT)
        return Reference(Images(features, self.numbers[labels], digests), self.source, found)

    def see(self, rows: list[int], known: Reference) -> Images:
        """The readable images among ``rows``; what ``known`` has of them is not computed again."""
        place = {row: at for at, row in enumerate(known.rows.tolist())} if known.source is self.source else {}
        old = known.images.take([place[row] for row in rows if row in place])
        new = [row for row in rows if row not in place]
        if not new:
            return old
        features, labels, digests, _ = self._read(new)
        return Images(
            np.concatenate([old.features, features]),
            np.concatenate([old.labels, self.numbers[labels]]),
            np.concatenate([old.digests, digests]),
        )

    def chunks(self, rows: list[int], without: set[str]) -> Iterator[tuple[Array, Array]]:
        """Labels and pixels u1 [n, S, S, 3] of the images at ``rows`` whose content is not among ``without``."""
        for batch in batches.load(self.source, rows, self.size, batch=64):
            new = np.array([digest not in without for digest in batch.digests], dtype=bool)
            yield self.numbers[self.source.labels[batch.indices[new]]], batch.pixels[new]

    def _read(self, rows: list[int]) -> tuple[Array, Array, Array, Array]:
        """Features f4 [N, d], the source's own labels [N], digests [N] and row numbers [N] of what can be read."""
        features, digests = [np.empty((0, self.space.dim), np.float32)], []
        found = [np.empty(0, np.int64)]
        with self.progress.bar("real images", len(rows), "image") as bar:
            for batch in batches.load(self.source, rows, self.size, batch=256):
                if len(batch):
                    features.append(self.space(batch.pixels).astype(np.float32))
                    digests += batch.digests
                    found.append(batch.indices)
                bar.advance(len(batch) + len(batch.bad))
        indices = np.concatenate(found)
        return (
            np.concatenate(features),
            self.source.labels[indices].astype(np.int64),
            np.array(digests, dtype="U32"),
            indices,
        )


@dataclass(frozen=True, eq=False)
class Reference:
    """Real images to measure against: ``rows`` int64 [N] of ``source``."""

    images: Images
    source: Source
    rows: Array
