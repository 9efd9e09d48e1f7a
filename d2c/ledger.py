"""What a measured run cost, from which number of trainings on that pays, and which of its parts share one ruler."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from d2c.runs import COST, Run
from d2c.tokens import vision_facts
from d2c.workspace import Record, Workspace
from formats import Artifact
from formats.files import read_json

ASSUMPTION = (
    "Training on everything is assumed to take as many passes over each image as this run took, at this run's seconds "
    "a step and batch size; condensing costs what scoring, choosing and attaching took, and the scorer where it was "
    "trained for this. Packing is not counted; sampling and measuring are alike for both."
)
FAMILIES = ("inception", "dinov2", "dinov3", "siglip", "clip", "mae", "scorer", "classifier")


def costs(workspace: Workspace | None, artifact: Artifact | None, run: Path | None, sampling: float) -> dict[str, Any]:
    """Seconds of one worker, by stage, as measured; None where there was none, or nothing says how long it took."""
    scores = workspace.scores.record() if workspace else None
    found: dict[str, Any] = dict.fromkeys(("train_scorer", "score", "select", "attach", "train"))
    if workspace and scores:
        scorer = Path(workspace.recall(scores.summary["scorer"]["spec"]))
        found["train_scorer"] = Run(scorer).seconds() if (scorer / COST).is_file() else None
        found["score"] = scores.cost["seconds"]
        found["select"] = selection_seconds(workspace, artifact) if artifact else None
        found["attach"] = attachment_seconds(workspace, artifact) if artifact else None
    if run:
        found["train"] = Run(run).seconds()
    return {"unit": "seconds of one worker", **found, "sample": sampling if run else None}


def payback(spent: dict[str, Any], images: int, condensed: int) -> dict[str, Any] | None:
    """From how many trainings on condensing pays, of ``condensed`` out of ``images``; None where a cost is unknown.

    ``trainings`` is None where training on the condensed set saves nothing.
    """
    if spent["score"] is None or not spent["train"] or not condensed:
        return None
    once = float(sum(spent[stage] or 0.0 for stage in ("train_scorer", "score", "select", "attach")))
    saved = float(spent["train"]) * (images / condensed - 1)
    return {
        "condensing_seconds": round(once, 1),
        "saved_seconds_a_training": round(saved, 1),
        "trainings": max(1, math.ceil(once / saved)) if saved > 0 else None,
        "assumption": ASSUMPTION,
    }


def selection_seconds(workspace: Workspace, artifact: Artifact) -> float | None:
    """Seconds of the rule that chose this artifact, and of what it looked at beside the scores; None without records.

    Features of the user's own cost what reading them took.
    """
    for path in sorted((workspace.path / "selection").glob("*/stage.json")):
        record = workspace.selection(path.parent.name).record()
        if record is None or not _chose(record, artifact):
            continue
        name = record.config.get("features")
        stages = (workspace.features(name), workspace.confidence(name)) if name else ()
        before = [found.cost["seconds"] for stage in stages if (found := stage.record()) is not None]
        return round(float(record.cost["seconds"] + sum(before)), 1)
    return None


def _chose(record: Record, artifact: Artifact) -> bool:
    """Whether a selection's record is the artifact's own; features go by what they are, not by where they lie."""
    asked = {**record.config, "features": record.summary.get("features")}
    return asked == {name: artifact.manifest["selection"].get(name) for name in asked}


def attachment_seconds(workspace: Workspace, artifact: Artifact) -> float | None:
    """Seconds that this artifact's text and vision took, found by what their records say; None without records."""
    text, vision = artifact.manifest["encoders"]["text"], artifact.manifest["encoders"]["vision"]
    seconds = []
    for path in sorted((workspace.path / "attachments").glob("*/*/stage.json")):
        record, of = read_json(path), path.parent.parent.name
        if of == "text":
            mine = text is not None and record["summary"] == text
        else:
            chosen = workspace.selection(of).record()
            selected = chosen is not None and _chose(chosen, artifact)
            mine = selected and vision is not None and vision_facts(record["config"], record["summary"]) == vision
        if mine:
            seconds.append(float(record["cost"]["seconds"]))
    return round(sum(seconds), 1) if seconds else None


def rulers(artifact: Artifact | None, metric: str, second: str | None) -> dict[str, Any]:
    """Which feature spaces chose the images, aligned the model and judged it; ``same``: pairs that share one.

    A selector or an aligner that shares the judge's space pulls the number down without better images.
    """
    selection = artifact.manifest["selection"] if artifact else {}
    vision = artifact.manifest["encoders"]["vision"] if artifact else None
    features = (selection or {}).get("features")
    used = {
        "selector": features["encoder"] if features else None,
        "aligner": vision["name"] if vision else None,
        "metric": metric,
        "second": second,
    }
    names = [name for name in used if used[name]]
    pairs = [(a, b) for at, a in enumerate(names) for b in names[at + 1 :]]
    same = [[a, b] for a, b in pairs if family(str(used[a])) == family(str(used[b]))]
    return {**used, "same": same}


def family(name: str) -> str:
    """The network behind an encoder's or a space's name, whatever its size and file."""
    return next((known for known in FAMILIES if known in name.lower()), name.lower())
