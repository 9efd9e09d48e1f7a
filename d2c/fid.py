"""Measure a run honestly: its distance to the real images, beside what no model is needed for, and a copy check.

The distance is called FID only in the space of the published Inception weights. Rows without a model tell how to read
it: *replay* is the condensed set itself scored as if it had been generated; *random real* are random real images, as
many as the condensed set has; *real* is the floor, unseen real images, as many as were generated.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2c import batches, metrics, runtime
from d2c.config import execution, identity
from d2c.errors import D2CError, UsageError
from d2c.features import FeatureSpace, distance_name
from d2c.generator import Generator, balanced_labels, grid, sample_seeds, save_png
from d2c.judge import open_space, scored_rows
from d2c.latents import LatentSpec, to_model
from d2c.progress import Progress, Silent
from d2c.runs import Run
from d2c.sampling import SamplerConfig
from d2c.seen import Real, Seen, mirrored_flat
from d2c.sources import Source, open_source
from d2c.tokens import save_array
from d2c.workspace import Workspace
from formats import Artifact, open_artifact
from formats.files import read_json, write_json
from formats.schema import LATENT

REPORT, GRID, CLOSEST = "fid.json", "grid.png", "closest.png"
HELD_OUT = 2_000
"""Unselected real images that calibrate the copy check, at most."""
PAIRS = 32
"""Generated images shown beside the training image closest to them."""
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
        runtime.once(lambda: write_json(folder / REPORT, {"asked": plan.asked, **_measure(plan, folder, progress)}))
    return Result(report=read_json(folder / REPORT), path=folder / REPORT)


def _measure(plan: Plan, folder: Path, progress: Progress) -> dict[str, Any]:
    config, generator, source = plan.config, plan.generator, plan.source
    workspace, size = Workspace(config.workspace), generator.codec.spec.pixels
    space = open_space(workspace, source, size, config.inception, generator.device, progress)
    reference, notes = _reference(plan, space, size, progress)
    drawing = _Drawing(plan, progress)
    start = time.perf_counter()
    generated = Seen.of(drawing.chunks(), space)
    sampling = round(time.perf_counter() - start, 1)
    save_png(grid(drawing.pixels(range(min(100, config.samples))), 10, side=64), folder / GRID)
    train = Seen.of(_artifact_chunks(plan), space)
    rows = [_row("generated", generated.real, reference), _row("replay", train.real, reference)]
    for subset in range(config.subsets):
        chosen = runtime.rng("random real", config.seed, subset).permutation(len(reference.features))
        chosen = chosen[: len(train.labels)]
        part = Real(reference.features[chosen], reference.labels[chosen])
        rows.append(_row(f"random real {subset + 1}", part, reference))
    copying = None
    unseen = _unseen(plan, size, space)
    if unseen is None:
        notes.append("Every source image was trained on: no copy check and no floor, for want of unseen real images.")
    else:
        floor = slice(0, config.samples)
        rows.append(_row("real", Real(unseen.features[floor], unseen.labels[floor]), reference))
        copying, closest, copied = _copying(generated, train, unseen)
        rows[0]["copy_rate"] = copying["features"]["rate"]
        pairs = np.stack([drawing.pixels(closest), _artifact_pixels(plan, copied)], axis=1)
        save_png(grid(pairs.reshape(-1, *pairs.shape[2:]), 8, side=64), folder / CLOSEST)
    return {
        "space": {"name": space.name, "digest": space.digest, "distance": distance_name(space)},
        "protocol": _protocol(plan, len(reference.features)),
        "rows": rows,
        "copying": copying,
        "costs": _costs(plan, sampling),
        "notes": notes,
    }


@dataclass(frozen=True)
class _Drawing:
    """The generated images: never all in memory, since any of them can be drawn again from its seed."""

    plan: Plan
    progress: Progress

    def pixels(self, which: Sequence[int], progress: Progress | None = None) -> Array:
        """Images number ``which``: u1 [n, S, S, 3]."""
        config, generator = self.plan.config, self.plan.generator
        labels = balanced_labels(config.samples, len(generator.classes))
        seeds = sample_seeds(config.seed, config.samples)
        rows = [int(row) for row in which]
        chosen = [seeds[row] for row in rows]
        return generator.pixels(labels[rows], chosen, config.sampler, batch=config.batch_size, progress=progress)

    def chunks(self) -> Iterator[tuple[Array, Array]]:
        """Labels and pixels of all images, in order."""
        count, step = self.plan.config.samples, self.plan.config.batch_size
        labels = balanced_labels(count, len(self.plan.generator.classes))
        with self.progress.bar("sample", count, "image") as bar:
            for start in range(0, count, step):
                rows = range(start, min(start + step, count))
                yield labels[start : rows.stop], self.pixels(rows)
                bar.advance(len(rows))


def _reference(plan: Plan, space: FeatureSpace, size: int, progress: Progress) -> tuple[Real, list[str]]:
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
    return Real(found, of), notes


def _row(name: str, images: Real, reference: Real) -> dict[str, Any]:
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


def _copying(generated: Seen, train: Seen, unseen: Seen) -> tuple[dict[str, Any], list[int], list[int]]:
    """Copy rates in pixels and in features, both orientations; and the closest pairs in pixels (generated, trained)."""
    features = metrics.copy_rate(
        generated.features,
        train.features,
        unseen.features,
        flipped_generated=generated.mirrored,
        flipped_held_out=unseen.mirrored,
    )
    pixels = metrics.copy_rate(
        generated.flat,
        train.flat,
        unseen.flat,
        flipped_generated=mirrored_flat(generated.flat),
        flipped_held_out=mirrored_flat(unseen.flat),
    )
    found = {
        name: {"rate": round(check.rate, 4), "held_out_rate": round(check.held_out_rate, 4), "flagged": check.flagged}
        for name, check in (("pixels", pixels), ("features", features))
    }
    closest = pixels.closest(PAIRS)
    facts = {**found, "calibrated_on": len(unseen.labels), "flagged": pixels.flagged or features.flagged}
    return facts, closest.tolist(), pixels.index[closest].tolist()


def _artifact_pixels(plan: Plan, rows: Sequence[int]) -> Array:
    """Training images as the model knows them: stored latents, decoded."""
    raw = torch.from_numpy(plan.artifact.stack(LATENT, np.asarray(rows))).to(plan.generator.device)
    return plan.generator.codec.decode(to_model(raw, LatentSpec.from_dict(plan.artifact.manifest["latent"])))


def _artifact_chunks(plan: Plan) -> Iterator[tuple[Array, Array]]:
    labels, step = np.asarray(plan.artifact.labels, dtype=np.int64), plan.config.batch_size
    for start in range(0, len(labels), step):
        rows = range(start, min(start + step, len(labels)))
        yield labels[start : rows.stop], _artifact_pixels(plan, rows)


def _unseen(plan: Plan, size: int, space: FeatureSpace) -> Seen | None:
    """Real images, in random order, that the run was not trained on, by content."""
    infos = [plan.artifact.info(row) for row in range(len(plan.artifact))]
    keys, contents = {info["source_key"] for info in infos}, {info["source_xxh3"] for info in infos}
    rows = list(range(len(plan.source)))
    if not plan.config.reference:
        scored = scored_rows(Workspace(plan.config.workspace), plan.source, len(plan.source), "unseen")
        rows = [row for row in scored if plan.source.keys[row] not in keys]
    drawn = runtime.rng("unseen", plan.config.seed).permutation(len(rows))[:HELD_OUT]
    wanted = [rows[i] for i in drawn]
    if len(wanted) < FEWEST:
        return None
    seen = Seen.of(_new_chunks(plan.source, wanted, size, contents), space)
    return seen if len(seen.labels) >= FEWEST else None


def _new_chunks(source: Source, rows: list[int], size: int, contents: set[str]) -> Iterator[tuple[Array, Array]]:
    for batch in batches.load(source, rows, size, batch=64):
        # A copy of a training image under another name was seen.
        new = np.array([digest not in contents for digest in batch.digests], dtype=bool)
        yield source.labels[batch.indices[new]].astype(np.int64), batch.pixels[new]


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
        "train_scorer": Run(Path(workspace.recall(scores.summary["scorer"]["spec"]))).seconds(),
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
