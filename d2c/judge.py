"""The feature space that measures: Inception where its weights are given, else a classifier of the user's own data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2c import batches, runtime
from d2c.features import Classifier, FeatureSpace, open_inception, train_classifier
from d2c.progress import Progress
from d2c.sources import Source
from d2c.workspace import SCORES, Workspace
from formats.files import read_table

IMAGES = 20_000
"""Images that a classifier is trained on, at most."""


def open_space(
    workspace: Workspace, source: Source, size: int, inception: Path | None, device: torch.device, progress: Progress
) -> FeatureSpace:
    """Inception with the weights ``inception``, else the workspace's classifier, trained if it is missing.

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
        progress.say("fid: training a classifier on the source, to measure with (--inception FILE gives FID itself)")
        with stage.spending(), runtime.one_thread(device):
            labels, pixels = read_images(source, scored_rows(workspace, source, IMAGES, "judge"), size)
            judge = train_classifier(pixels, labels, device=device, progress=progress)
            judge.save(stage.path)
        facts = {"accuracy": judge.info.accuracy, "images": judge.info.images, "digest": judge.digest}
        stage.finish(["classifier.safetensors", "classifier.json"], facts, device=device.type)
    return Classifier.load(stage.path, device)


def scored_rows(workspace: Workspace, source: Source, limit: int, purpose: str) -> list[int]:
    """Indices into the source of at most ``limit`` scored images, drawn at random by ``purpose``; sorted."""
    keys = read_table(workspace.scores.path / SCORES, columns=["key"])["key"].to_pylist()
    if len(keys) > limit:
        keys = [keys[i] for i in np.sort(runtime.rng(purpose, "rows").permutation(len(keys))[:limit])]
    place = {key: index for index, key in enumerate(source.keys)}
    return [place[key] for key in keys if key in place]


def read_images(
    source: Source, rows: list[int], size: int
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.uint8]]]:
    """Labels int64 [N] and pixels u1 [N, size, size, 3] of the readable images among ``rows``."""
    labels, pixels = [], []
    for batch in batches.load(source, rows, size, batch=64):
        labels.append(source.labels[batch.indices].astype(np.int64))
        pixels.append(batch.pixels)
    return np.concatenate(labels), np.concatenate(pixels)
