"""What measures: a feature space (Inception where its weights are given, else a classifier of the user's own data),
and the images that others are measured against, seen in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2c import batches, metrics, runtime
from d2c.classifier import Classifier, train_classifier
from d2c.errors import D2CError
from d2c.features import FeatureSpace, Inception, VisionSpace, activations, open_inception
from d2c.metrics import Moments, Stats
from d2c.npz import Npz
from d2c.pictures import FromSource, Pictures
from d2c.progress import Progress
from d2c.seen import Images
from d2c.sources import Source
from d2c.tokens import save_array
from d2c.vision import open_vision
from d2c.workspace import SCORES, Workspace
from formats.files import read_table
from formats.hashing import xxh3_json

IMAGES = 20_000
"""Images that a classifier is trained on, at most."""
VISION_GRID = 16
"""Side of the token grid of a second space: 224 px for DINOv2, as the paper attaches it."""
Array = np.ndarray[Any, Any]
_KEPT = ("features", "labels", "digests", "rows")
_SPATIAL = ("spatial_mu", "spatial_sigma")


def open_space(
    workspace: Workspace | None,
    source: Source | None,
    size: int,
    inception: Path | None,
    device: torch.device,
    progress: Progress,
) -> FeatureSpace:
    """Inception with the weights ``inception``, else the workspace's classifier, trained if it is missing.

    ``source`` is the scored one (`d2c.labelling.reopen`), whatever is measured against: one classifier serves all runs.

    Raises:
        D2CError: the Inception file is missing, or the data has too few classes or images for a classifier.
    """
    if inception is not None:
        return open_inception(inception, device)
    if workspace is None or source is None:
        raise D2CError("a classifier to measure with needs scored images", hint="run d2c score DIR first")
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


def open_second(
    name: str,
    workspace: Workspace | None,
    source: Source | None,
    size: int,
    device: torch.device,
    progress: Progress,
) -> FeatureSpace:
    """The space of a vision encoder, by its name as of `d2c.vision.open_vision`, or the workspace's ``classifier``.

    Raises:
        D2CError: there is no such encoder, its weights are missing, or there are no scored images for a classifier.
    """
    if name == "classifier":
        return open_space(workspace, source, size, None, device, progress)
    return VisionSpace(open_vision(name, VISION_GRID, device))


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


@dataclass(frozen=True, eq=False)
class Reference:
    """What others are measured against: statistics, and the images that they come from where these are at hand.

    ``rows`` int64 [N]: the images' numbers in ``source``, where they come from one. ``spatial``: for sFID.
    """

    stats: Stats
    spatial: Stats | None
    images: Images | None
    source: Source | None = None
    rows: Array | None = None


def observed(pictures: Pictures, space: FeatureSpace, progress: Progress) -> tuple[Images, Array, Stats | None]:
    """All images of a set in a space, their numbers in it, and the statistics of sFID where the space has them."""
    features = [np.empty((0, space.dim), np.float32)]
    labels, digests, rows = [np.empty(0, np.int64)], [np.empty(0, "U32")], [np.empty(0, np.int64)]
    spatial = Moments()
    with progress.bar("real images", len(pictures), "image") as bar:
        for chunk in pictures.chunks():
            if not len(chunk.labels):
                continue
            found = activations(space, chunk.pixels)
            features.append(found.features.astype(np.float32))
            labels.append(chunk.labels.astype(np.int64))
            digests.append(chunk.digests)
            rows.append(chunk.rows)
            if found.spatial is not None:
                spatial.add(found.spatial)
            bar.advance(len(chunk.labels))
    images = Images(np.concatenate(features), np.concatenate(labels), np.concatenate(digests))
    return images, np.concatenate(rows), spatial.stats() if spatial.seen > 1 else None


def studied(pictures: Pictures, space: FeatureSpace, progress: Progress) -> Reference:
    """A set of images to measure against, read anew."""
    images, _, spatial = observed(pictures, space, progress)
    return Reference(metrics.statistics(images.features), spatial, images)


def given(npz: Npz, pictures: Pictures | None, space: FeatureSpace, progress: Progress) -> Reference | None:
    """What an .npz says in ``space``: its statistics if they are of this space, else those of its images.

    As in ADM's reference batches, statistics may be of many more images than the file holds. None: it says nothing in
    this space.

    Raises:
        D2CError: the statistics are of another space, and there are no images.
    """
    read = studied(pictures, space, progress) if pictures is not None else None
    stats = npz.stats.get("features")
    if stats is None:
        return read
    # ADM's files do not say what they were computed with: the width must do.
    fits = npz.space == space.digest if npz.space else isinstance(space, Inception)
    if fits and len(stats.mu) == space.dim:
        return Reference(stats, npz.stats.get("spatial"), read.images if read else None)
    return read


@dataclass(frozen=True, eq=False)
class RealImages:
    """A source seen in a feature space: ``size`` px, classes renumbered by ``numbers`` (`d2c.pictures.class_numbers`).

    Features are kept in the ``workspace``, where there is one, for the next run that is measured against them.
    """

    source: Source
    size: int
    space: FeatureSpace
    numbers: Array
    progress: Progress
    workspace: Workspace | None = None

    def reference(self, rows: list[int], device: torch.device) -> Reference:
        """The images at ``rows``.

        Raises:
            D2CError: none of them can be read.
        """
        if self.workspace is None:
            images, found, spatial = self._read(rows)
        else:
            images, found, spatial = self._kept(self.workspace, rows, device)
        images = Images(images.features, self.numbers[images.labels], images.digests)
        return Reference(metrics.statistics(images.features), spatial, images, self.source, found)

    def see(self, rows: list[int], known: Reference) -> Images:
        """The readable images among ``rows``; what ``known`` has of them is not computed again."""
        numbers = known.rows.tolist() if known.rows is not None and known.source is self.source else []
        place = {row: at for at, row in enumerate(numbers)}
        new = [row for row in rows if row not in place]
        parts = [known.images.take([place[row] for row in rows if row in place])] if known.images and numbers else []
        if new or not parts:
            images, _, _ = observed(self._pictures(new), self.space, self.progress)
            parts.append(Images(images.features, self.numbers[images.labels], images.digests))
        features, labels, digests = zip(*((one.features, one.labels, one.digests) for one in parts), strict=True)
        return Images(np.concatenate(features), np.concatenate(labels), np.concatenate(digests))

    def _pictures(self, rows: list[int]) -> FromSource:
        return FromSource(self.source, rows, self.size, np.arange(len(self.source.classes), dtype=np.int64))

    def _read(self, rows: list[int]) -> tuple[Images, Array, Stats | None]:
        found = observed(self._pictures(rows), self.space, self.progress)
        if not len(found[0]):
            raise D2CError(
                "no image to measure against could be read",
                where=self.source.location,
                found=f"{len(rows)} files, none readable",
                hint="open a few of them in an image viewer, or name other images with --reference DIR",
            )
        return found

    def _kept(self, workspace: Workspace, rows: list[int], device: torch.device) -> tuple[Images, Array, Stats | None]:
        name = "".join(c if c.isalnum() or c in "-._" else "-" for c in self.space.name)
        stage = workspace.reference(f"{name}-{self.source.digest[:8]}")
        asked = {"size": self.size, "images": len(rows), "rows": xxh3_json(rows)}
        spatial = isinstance(self.space, Inception)
        kept = (*_KEPT, *_SPATIAL) if spatial else _KEPT
        inputs = {"space": self.space.digest, "source": self.source.digest}
        if stage.stale(asked, inputs) or not all((stage.path / f"{name}.npy").exists() for name in kept):
            stage.begin(asked, inputs)
            with stage.spending():
                images, found, stats = self._read(rows)
            columns: list[Array] = [images.features, images.labels, images.digests, found]
            columns += [stats.mu, stats.sigma] if stats else []
            names = kept[: len(columns)]
            for name, column in zip(names, columns, strict=True):
                save_array(stage.path / f"{name}.npy", column)
            stage.finish([f"{name}.npy" for name in names], {}, device=device.type)
        features, labels, digests, found = (np.load(stage.path / f"{n}.npy", allow_pickle=False) for n in _KEPT)
        stats = None
        if spatial and (stage.path / f"{_SPATIAL[0]}.npy").exists():
            mu, sigma = (np.load(stage.path / f"{name}.npy", allow_pickle=False) for name in _SPATIAL)
            stats = Stats(mu, sigma, len(features))
        return Images(features, labels, digests), found, stats
