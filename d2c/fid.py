"""Measure a run honestly: its distance to the real images, beside what no model is needed for, and a copy check.

The distance is called FID only in the space of the published Inception weights. Rows without a model tell how to read
it: *replay* is the condensed set itself scored as if it had been generated; *random real* are random real images, as
many as the condensed set has; *real* is the floor, unseen real images, as many as were generated.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from d2c import batches, metrics, runtime
from d2c.config import execution, identity
from d2c.errors import D2CError, UsageError
from d2c.features import FeatureSpace, distance_name
from d2c.generator import Generator, balanced_labels, grid, sample_seeds, save_png
from d2c.judge import open_space, scored_rows
from d2c.latents import LatentSpec, to_model
from d2c.loading import all_raw
from d2c.progress import Progress, Silent
from d2c.runs import Run
from d2c.sampling import SamplerConfig
from d2c.sources import Source, open_source
from d2c.tokens import save_array
from d2c.workspace import Workspace
from formats import Artifact, open_artifact
from formats.files import read_json, write_json

REPORT, GRID, CLOSEST = "fid.json", "grid.png", "closest.png"
HELD_OUT = 2_000
"""Unselected real images that calibrate the copy check, at most."""
FEWEST = 10
"""Unseen real images below which nothing is calibrated."""
MANIFOLD = 10_000
"""Real images in precision, recall and coverage, at most (ADM's reference has as many)."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class FidConfig:
    """What to measure: ``samples`` images of ``run`` against at most ``reference_images`` real ones."""

    run: Path = execution()
    workspace: Path = execution()
    inception: Path | None = None
    reference: Path | None = None
    """Real images to measure against; None: the scored source."""
    reference_images: int = 50_000
    samples: int = 2_000
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    subsets: int = 3
    seed: int = 0
    codec: str | None = execution(None)
    device: str = execution("auto")
    batch_size: int = execution(64)
    overwrite: bool = execution(False)

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise UsageError("a covariance needs at least two samples", found=self.samples, expected="--samples 2000")


@dataclass(frozen=True)
class Plan:
    """Opened and checked inputs."""

    config: FidConfig
    generator: Generator
    artifact: Artifact
    source: Source
    asked: dict[str, Any]
    done: bool


@dataclass(frozen=True)
class Result:
    """``report``: space, protocol, rows, copying, costs and notes, as written to ``path``."""

    report: dict[str, Any]
    path: Path


@dataclass(frozen=True)
class _Real:
    """Real images: features [N, d], labels [N], keys."""

    features: Array
    labels: Array


def plan(config: FidConfig) -> Plan:
    """Open the run, the artifact it was trained on, and the real images.

    Raises:
        D2CError: one of them is missing, or the artifact is not the one that the run was trained on.
    """
    generator = Generator.open(config.run, runtime.resolve_device(config.device), config.codec)
    artifact = open_artifact(generator.artifact)
    trained_on = generator.identity["content_id"]
    if artifact.content_id != trained_on:
        raise D2CError(
            "the artifact changed since the run was trained on it",
            where=generator.artifact,
            found=artifact.content_id,
            expected=trained_on,
            hint="train on it again, or put the old artifact back",
        )
    scores = Workspace(config.workspace).scores.require("d2c score DIR")
    source = open_source(config.reference or Path(scores.summary["source"]["path"]))
    asked = {
        **identity(config),
        "weights_xxh3": generator.denoiser.origin["weights_xxh3"],
        "scores": scores.digest,
        "source": source.digest,
    }
    report = config.run / "fid" / REPORT
    done = not config.overwrite and report.exists() and read_json(report)["asked"] == asked
    return Plan(config, generator, artifact, source, asked, done)


def run(plan: Plan, progress: Progress | None = None) -> Result:
    """Sample, measure and write ``<run>/fid/fid.json``, unless the same measurement is there."""
    progress = progress or Silent()
    folder = plan.config.run / "fid"
    if not plan.done:
        report = _measure(plan, folder, progress)
        write_json(folder / REPORT, {"asked": plan.asked, **report})
    return Result(report=read_json(folder / REPORT), path=folder / REPORT)


def _measure(plan: Plan, folder: Path, progress: Progress) -> dict[str, Any]:
    config, generator, source = plan.config, plan.generator, plan.source
    workspace, size = Workspace(config.workspace), generator.codec.spec.pixels
    space = open_space(workspace, source, size, config.inception, generator.device, progress)
    reference, notes = _reference(plan, space, size, progress)
    start = time.perf_counter()
    labels = balanced_labels(config.samples, len(generator.classes))
    seeds = sample_seeds(config.seed, config.samples)
    samples = generator.pixels(labels, seeds, config.sampler, batch=config.batch_size, progress=progress)
    sampling = round(time.perf_counter() - start, 1)
    save_png(grid(samples[:100], 10, side=64), folder / GRID)
    train = _artifact_pixels(plan)
    train_labels = np.asarray(plan.artifact.labels, dtype=np.int64)
    generated = _Real(space(samples), labels)
    rows = [_row("generated", generated, reference), _row("replay", _Real(space(train), train_labels), reference)]
    for subset in range(config.subsets):
        chosen = runtime.rng("random real", config.seed, subset).permutation(len(reference.features))[: len(train)]
        part = _Real(reference.features[chosen], reference.labels[chosen])
        rows.append(_row(f"random real {subset + 1}", part, reference))
    copying = None
    unseen = _unseen(plan, size)
    if unseen is None:
        notes.append("Every source image was trained on: no copy check and no floor, for want of unseen real images.")
    else:
        unseen_labels, unseen_pixels = unseen
        floor = slice(0, config.samples)
        rows.append(_row("real", _Real(space(unseen_pixels[floor]), unseen_labels[floor]), reference))
        copying = _copying(space, samples, train, unseen_pixels, folder)
        rows[0]["copy_rate"] = copying["features"]["rate"]
    return {
        "space": {"name": space.name, "digest": space.digest, "distance": distance_name(space)},
        "protocol": _protocol(plan, len(reference.features)),
        "rows": rows,
        "copying": copying,
        "costs": _costs(plan, sampling),
        "notes": notes,
    }


def _reference(plan: Plan, space: FeatureSpace, size: int, progress: Progress) -> tuple[_Real, list[str]]:
    """Features of the real images, kept in the workspace for the next run that is measured against them."""
    config, workspace = plan.config, Workspace(plan.config.workspace)
    rows = (
        list(range(min(len(plan.source), config.reference_images)))
        if config.reference
        else scored_rows(workspace, plan.source, config.reference_images, "reference")
    )
    stage = workspace.reference(f"{space.name}-{plan.source.digest[:8]}")
    asked = {"size": size, "images": len(rows)}
    inputs = {"space": space.digest, "source": plan.source.digest}
    if stage.stale(asked, inputs):
        stage.begin(asked, inputs)
        features, labels = [], []
        with stage.spending(), progress.bar("real images", len(rows), "image") as bar:
            for batch in batches.load(plan.source, rows, size, batch=256):
                features.append(space(batch.pixels).astype(np.float32))
                labels.append(plan.source.labels[batch.indices].astype(np.int64))
                bar.advance(len(batch))
        save_array(stage.path / "features.npy", np.concatenate(features))
        save_array(stage.path / "labels.npy", np.concatenate(labels))
        stage.finish(["features.npy", "labels.npy"], {}, device=plan.generator.device.type)
    notes = []
    if space.name == "classifier":
        notes.append("Measured in the space of a classifier of this data: not FID, comparable only with its like.")
    found, of = (np.load(stage.path / f"{name}.npy", allow_pickle=False) for name in ("features", "labels"))
    return _Real(found, of), notes


def _row(name: str, images: _Real, reference: _Real) -> dict[str, Any]:
    distance = metrics.frechet_distance(metrics.statistics(images.features), metrics.statistics(reference.features))
    by_class = metrics.class_frechet(reference.features, reference.labels, images.features, images.labels)
    real = reference.features[runtime.rng("manifold").permutation(len(reference.features))[:MANIFOLD]]
    near = metrics.precision_recall(real, images.features) if len(images.features) > 3 and len(real) > 3 else None
    return {
        "name": name,
        "n": len(images.features),
        "distance": round(distance.value, 4),
        "rank_deficient": distance.rank_deficient,
        "class_distance": round(by_class.value, 4),
        "class_covariance": by_class.covariance,
        "precision": round(near.precision, 4) if near else None,
        "recall": round(near.recall, 4) if near else None,
        "copy_rate": None,
    }


def _copying(space: FeatureSpace, samples: Array, train: Array, unseen: Array, folder: Path) -> dict[str, Any]:
    """Copy rates in pixels and in features, both orientations, calibrated on real images that were not selected."""
    found = {}
    for name, view in (("pixels", _flat), ("features", space)):
        check = metrics.copy_rate(
            view(samples),
            view(train),
            view(unseen),
            flipped_generated=view(_mirrored(samples)),
            flipped_held_out=view(_mirrored(unseen)),
        )
        found[name] = {
            "rate": round(check.rate, 4),
            "held_out_rate": round(check.held_out_rate, 4),
            "flagged": check.flagged,
        }
        if name == "pixels":
            closest = check.closest(32)
            pairs = np.stack([samples[closest], train[check.index[closest]]], axis=1)
            save_png(grid(pairs.reshape(-1, *samples.shape[1:]), 8, side=64), folder / CLOSEST)
    return {**found, "calibrated_on": len(unseen), "flagged": any(space["flagged"] for space in found.values())}


def _flat(pixels: Array) -> Array:
    """Pixels as vectors, area-averaged to at most 32 px a side: [N, S, S, 3] -> float32 [N, s * s * 3]."""
    side = pixels.shape[1]
    block = max(1, side // 32)
    cut = pixels[:, : side // block * block, : side // block * block].astype(np.float32)
    means = cut.reshape(len(pixels), side // block, block, side // block, block, 3).mean(axis=(2, 4))
    flat: Array = means.reshape(len(pixels), -1)
    return flat


def _mirrored(pixels: Array) -> Array:
    return np.ascontiguousarray(pixels[:, :, ::-1])


def _artifact_pixels(plan: Plan) -> Array:
    """The condensed set as the model knows it: stored latents, decoded."""
    import torch

    spec = LatentSpec.from_dict(plan.artifact.manifest["latent"])
    return np.concatenate(
        [
            plan.generator.codec.decode(to_model(torch.from_numpy(raw).to(plan.generator.device), spec))
            for raw in _raw_batches(plan)
        ]
    )


def _raw_batches(plan: Plan) -> Iterator[Array]:
    for start in range(0, len(plan.artifact), plan.config.batch_size):
        yield all_raw(plan.artifact, start, start + plan.config.batch_size)


def _unseen(plan: Plan, size: int) -> tuple[Array, Array] | None:
    """Labels and pixels, in random order, of real images that the run was not trained on, by content."""
    infos = [plan.artifact.info(row) for row in range(len(plan.artifact))]
    keys, contents = {info["source_key"] for info in infos}, {info["source_xxh3"] for info in infos}
    rows = list(range(len(plan.source)))
    if not plan.config.reference:
        scored = scored_rows(Workspace(plan.config.workspace), plan.source, len(plan.source), "unseen")
        rows = [row for row in scored if plan.source.keys[row] not in keys]
    drawn = runtime.rng("unseen", plan.config.seed).permutation(len(rows))[:HELD_OUT]
    labels, pixels = [], []
    for batch in batches.load(plan.source, [rows[i] for i in drawn], size, batch=64):
        # A copy of a training image under another name was seen.
        new = np.array([digest not in contents for digest in batch.digests], dtype=bool)
        labels.append(plan.source.labels[batch.indices[new]].astype(np.int64))
        pixels.append(batch.pixels[new])
    count = sum(len(part) for part in labels)
    return (np.concatenate(labels), np.concatenate(pixels)) if count >= FEWEST else None


def _protocol(plan: Plan, reference: int) -> dict[str, Any]:
    config, training = plan.config, plan.generator.identity
    return {
        "samples": config.samples,
        "reference_images": reference,
        "sampler": asdict(config.sampler),
        "labels": "balanced",
        "seed": config.seed,
        "rounding": "nearest",
        "model": training["model"],
        "recipe": training["recipe"]["name"],
        "steps": training["recipe"]["steps"],
        "batch_size": training["recipe"]["batch_size"],
        "passes_per_image": round(
            training["recipe"]["steps"] * training["recipe"]["batch_size"] / len(plan.artifact), 1
        ),
        "ema_decay": training["recipe"]["ema_decay"],
        "training_seed": training["seed"],
        "content_id": plan.artifact.content_id,
        "images": len(plan.artifact),
    }


def _costs(plan: Plan, sampling: float) -> dict[str, Any]:
    """Seconds of one worker, by stage, as measured."""
    workspace, artifact = Workspace(plan.config.workspace), plan.artifact
    scores = workspace.scores.require("d2c score DIR")
    vision = artifact.manifest["encoders"]["vision"]
    return {
        "unit": "seconds of one worker",
        "device": plan.generator.device.type,
        "train_scorer": Run(Path(scores.summary["scorer"]["spec"])).seconds(),
        "score": scores.cost["seconds"],
        "attach": None if vision is None else _attachment_seconds(workspace, artifact),
        "train": Run(plan.config.run).seconds(),
        "sample": sampling,
    }


def _attachment_seconds(workspace: Workspace, artifact: Artifact) -> float:
    """Seconds that this artifact's text and vision took, found by what their records say."""
    attached = {**artifact.manifest["encoders"]["vision"]}
    attached.pop("column")
    text = artifact.manifest["encoders"]["text"]
    records = [read_json(path) for path in (workspace.path / "attachments").glob("*/*/stage.json")]
    return round(float(sum(r["cost"]["seconds"] for r in records if r["summary"] in (attached, text))), 1)
