"""Confidence: how sure a classifier of the features is of each scored image's class, for the method `ot`.

A stage of its own, between the features and the selections: every selection weighs the same cross-entropies.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2c import discriminant, runtime
from d2c.config import execution
from d2c.discriminant import Judged
from d2c.encoding import is_scorer
from d2c.labelling import OWN
from d2c.progress import Progress, Silent
from d2c.tokens import save_array
from d2c.workspace import CROSS_ENTROPIES, FEATURES, SCORES, Record, Stage, Workspace
from formats.files import read_table
from formats.hashing import xxh3_lines


@dataclass(frozen=True, kw_only=True)
class ConfidenceConfig:
    """The classifier is fitted to ``features``, a folder of finished ones in the workspace (`d2c.embedding`)."""

    workspace: Path = execution()
    features: str
    overwrite: bool = execution(False)


@dataclass(frozen=True)
class Plan:
    """What `run` will do."""

    config: ConfidenceConfig
    stage: Stage
    reasons: list[str]
    inputs: dict[str, str]
    images: int


def plan(config: ConfidenceConfig) -> Plan:
    """Say whether the cross-entropies are there already.

    Raises:
        D2CError: there are no scores or features yet.
    """
    workspace = Workspace(config.workspace)
    scores = workspace.scores.require("d2c score DIR")
    table = read_table(workspace.scores.output(SCORES), columns=["key", "label"])
    labelled = zip(*(column.to_pylist() for column in table.columns), strict=True)
    inputs = {
        "features": workspace.features(config.features).require("d2c select --features ENCODER").digest,
        # Not the scores themselves: a second scoring with other settings changes no class.
        "labels": xxh3_lines(f"{key}\t{label}" for key, label in labelled),
    }
    stage = workspace.confidence(config.features)
    reasons = ["--overwrite"] if config.overwrite else stage.stale({}, inputs)
    return Plan(config, stage, reasons, inputs, int(scores.summary["images"]))


def run(plan: Plan, progress: Progress | None = None) -> Record:
    """Fit, judge every image, and keep what was found; by one process, whatever shares the classes afterwards.

    Raises:
        D2CError: features are not finite.
    """
    progress = progress or Silent()
    if plan.reasons:
        runtime.once(lambda: _run(plan, progress))
    record = plan.stage.require("d2c select --method ot")
    for note in record.summary["notes"]:
        progress.warn(note)
    return record


def _run(plan: Plan, progress: Progress) -> None:
    workspace, stage = Workspace(plan.config.workspace), plan.stage
    with stage.locked():
        stage.begin({}, plan.inputs)
        with stage.spending():
            labels = read_table(workspace.scores.output(SCORES), columns=["label"])["label"].to_numpy()
            path = workspace.features(plan.config.features).output(FEATURES)
            features = np.load(path, mmap_mode="r", allow_pickle=False)
            judged = discriminant.judge(features, labels, progress)
            save_array(stage.path / CROSS_ENTROPIES, judged.cross_entropies)
        summary: dict[str, Any] = {
            "accuracy": judged.accuracy,
            "chance": 1 / judged.classes,
            "classes": judged.classes,
            "fitted_images": judged.fitted,
            "temperature": judged.temperature,
            "mean_cross_entropy": float(judged.cross_entropies.mean()),
            "notes": _notes(judged, workspace, plan.config.features),
        }
        stage.finish([CROSS_ENTROPIES], summary, device="cpu")


def _notes(judged: Judged, workspace: Workspace, features: str) -> list[str]:
    """What a person must know who takes the cross-entropies for confidence."""
    if judged.classes < 2:
        return ["there is one class, of which any classifier is sure: confidence is left out"]
    notes, images = [], len(judged.cross_entropies)
    if judged.accuracy is None:
        notes.append("every class has one image: no classifier can be tried, and confidence means nothing")
    elif judged.accuracy < 1 / judged.classes + 3 * np.sqrt(1 / judged.classes / images):
        notes.append("the classifier is right no more often than by chance: confidence means nothing")
    # The scorer's tokens depend on the class that it is told to denoise for.
    if is_scorer(workspace.features(features).require("d2c select --features ENCODER").config["encoder"]):
        notes.append(
            "the scorer is told each image's class, and its features give it away: a classifier's confidence in them "
            "says little (--features dinov2 has more to say, --confidence 0 leaves it out)"
        )
    labels = workspace.scores.require("d2c score DIR").summary["source"].get("labels", OWN)
    if labels != OWN:
        notes.append(f"the classes are {labels}, found in the images: confidence is how clear an image's cluster is")
    return notes


def load(workspace: Workspace, features: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Finished cross-entropies f8 [N], in key order of the scores."""
    path = workspace.confidence(features).output(CROSS_ENTROPIES)
    found: np.ndarray[Any, np.dtype[np.float64]] = np.load(path, allow_pickle=False)
    return found
