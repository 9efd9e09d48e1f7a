"""What a measurement says beside its numbers: the protocol, what paid, and what cannot be said."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from d2c import ledger
from d2c.fid_plan import Plan
from d2c.judge import Reference
from d2c.pictures import class_numbers, is_part
from d2c.runs import Run

NEAR = 0.1
"""Closeness of real unseen images, the 1 % nearest to a training image, under which the copy check sees little."""


def reference_facts(plan: Plan, reference: Reference) -> dict[str, Any]:
    """What the images were measured against, and what of it was at hand."""
    if plan.source is not None:
        facts = {"kind": plan.source.kind, "name": plan.source.name, "digest": plan.source.digest}
    elif plan.pictures is not None:
        facts = plan.pictures.facts()
    else:
        facts = {"kind": "npz", "name": str(plan.config.reference), "digest": plan.asked["reference"]}
    images = len(reference.images) if reference.images else 0
    return {**facts, "images": images, "statistics_of": reference.stats.n or None}


def protocol(plan: Plan, count: int, reference: Reference) -> dict[str, Any]:
    """All that decides the numbers."""
    config = plan.config
    found: dict[str, Any] = {
        "judged": plan.judged.facts(),
        "samples": count,
        "side": plan.side,
        "reference_images": len(reference.images) if reference.images else 0,
        "seed": config.seed,
    }
    if plan.generator is None:
        return found
    assert plan.artifact is not None
    training, run = plan.generator.identity, Run(plan.generator.path)
    # Fewer than asked for where --patience stopped it.
    steps, batch = run.finished_steps(), training["recipe"]["batch_size"]
    return {
        **found,
        "sampler": asdict(config.sampler.resolved(plan.generator.denoiser.objective.name)),
        "labels": config.labels,
        "rounding": "nearest",
        "decoder": asdict(plan.generator.codec.spec),
        "model": training["model"],
        "recipe": training["recipe"]["name"],
        "steps": steps,
        "batch_size": batch,
        "passes_per_image": round(steps * batch / len(plan.artifact), 1),
        "ema_decay": training["recipe"]["ema_decay"],
        "training_seed": training["seed"],
        "content_id": plan.artifact.content_id,
        "images": len(plan.artifact),
        **plan.generator.digests(),
    }


def payback(plan: Plan, spent: dict[str, Any]) -> dict[str, Any] | None:
    """From which training on condensing pays; None where it is not about a run on a scored source."""
    if plan.generator is None or plan.artifact is None or plan.workspace is None:
        return None
    scored = int(plan.workspace.scores.require("d2c score DIR").summary["images"])
    return ledger.payback(spent, scored, len(plan.artifact))


def notes(plan: Plan, report: dict[str, Any], reference: Reference, *, floor: bool) -> list[str]:
    """Sentences that keep the numbers from being misread."""
    found, row, dim = [], report["rows"][0], len(reference.stats.mu)
    if report["space"]["name"] == "classifier":
        found.append("Measured in the space of a classifier of this data: not FID, comparable only with its like.")
    if plan.generator and "classes" in plan.generator.digests():
        classes = plan.generator.digests()["classes"]
        found.append(f"The run was shown images of {classes} classes: only these were drawn.")
    if row["rank_deficient"]:
        fewest = min(row["n"], row["reference_n"] or row["n"])
        found.append(
            f"{fewest:,} images are too few for a covariance of {dim:,} features, which needs {dim + 1:,}: the "
            "distance is biased, and comparable only with those of as many images."
        )
    if reference.images is None:
        found.append(
            "The reference holds statistics and no images: no precision, recall, density, coverage, kernel distance "
            "and no distance class by class."
        )
    else:
        unknown = class_numbers(plan.source.classes, plan.classes) < 0 if plan.source else np.zeros(0, bool)
        if not np.any(reference.images.labels >= 0):
            found.append("No class of the reference is one of the run's: no distance class by class.")
        elif unknown.any():
            found.append(f"{int(unknown.sum())} classes of the reference are not the run's: not in class_distance.")
    if reference.spatial is None and report["space"]["name"].startswith("inception"):
        found.append("The reference has no statistics for sFID (mu_s and sigma_s).")
    if plan.config.second and not report["second"]:
        found.append("The reference has no images: no distance in a second space.")
    found += _about_copying(plan, report)
    if not floor:
        found.append("Too few real images that were not trained on, or too few others to measure them by: no floor.")
    if report["rulers"]["same"]:
        pairs = ", ".join(" and ".join(pair) for pair in report["rulers"]["same"])
        found.append(f"Same feature space: {pairs}. Such a number improves without better images.")
    return found


def _about_copying(plan: Plan, report: dict[str, Any]) -> list[str]:
    if plan.train is None:
        return ["Nobody said what the images may have been copied from (--train): no copy check."]
    if not report["copying"]:
        return ["Too few real images that were not trained on: no copy check. --held-out names others."]
    found = []
    if is_part(plan.train):
        seen = f"{len(plan.train):,} random training images only"
        found.append(f"Copies were looked for in {seen}: the copy rate is at least this.")
    blunt = [name for name in ("pixels", "features") if report["copying"][name]["threshold"] < NEAR]
    if blunt:
        found.append(
            f"Real unseen images come very near to training images ({' and '.join(blunt)}), as near duplicates in the "
            "data do: only copies that are nearer still count, and noisier ones are missed."
        )
    return found
