"""Measure a run honestly: its distance to the real images, beside what no model is needed for, and a copy check.

The distance is called FID only in the space of the published Inception weights. Rows without a model tell how to read
it. *replay* is the condensed set itself, scored as if it had been generated; *random real* are as many images drawn at
random from the scored source, which lie in the reference as often as those of the condensed set do. *real* is the
floor: real images that the run was not trained on, as many as were generated or a fifth of all there are, whichever is
less, measured against the reference without them. A row's ``reference_n`` and ``in_reference`` say how many real
images it was compared with and how many of these are its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2c import runtime
from d2c.config import execution, identity
from d2c.errors import D2CError, UsageError
from d2c.features import distance_name
from d2c.generator import Generator, balanced_labels, grid, sample_seeds, save_png
from d2c.judge import RealImages, Reference, class_numbers, drawn, open_space, scored_rows
from d2c.labelling import OWN, reopen
from d2c.latents import LatentSpec, to_model
from d2c.progress import Progress, Silent
from d2c.runs import COST, Run
from d2c.sampling import SamplerConfig
from d2c.seen import Images, Seen, Yardstick, copy_check
from d2c.sources import Source, open_source
from d2c.tokens import vision_facts
from d2c.workspace import Workspace
from formats import Artifact, open_artifact
from formats.files import read_json, write_json
from formats.hashing import sha256_file
from formats.schema import LATENT

REPORT, GRID, CLOSEST = "fid.json", "grid.png", "closest.png"
HELD_OUT = 2_000
"""Unselected real images that calibrate the copy check, at most."""
FEWEST = 10
"""Unseen real images below which nothing is calibrated."""
FLOOR = 5
"""One in so many unseen images, at most, is taken out of the reference to be the floor."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class FidConfig:
    """What to measure: ``samples`` images of ``run`` against at most ``reference_images`` real ones."""

    run: Path = execution()
    workspace: Path = execution()
    artifact: Path | None = execution(None)
    """Where the artifact lies now; None: where it was when the run was trained on it."""
    inception: Path | None = execution(None)
    reference: str | None = None
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
    """The real images to measure against."""
    scored: Source
    """The real images that the condensed set was chosen from."""
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
    lies = config.artifact or generator.artifact
    artifact, trained_on = open_artifact(lies), generator.identity["content_id"]
    if artifact.content_id != trained_on:
        raise D2CError(
            "the artifact changed since the run was trained on it",
            where=lies,
            found=artifact.content_id,
            expected=trained_on,
            hint="train on it again, or put the old artifact back",
        )
    workspace = Workspace(config.workspace)
    scored = reopen(workspace)
    scores = workspace.scores.require("d2c score DIR")
    source = scored
    if config.reference:
        # Classes that were made for the scored images mean nothing elsewhere.
        own = scores.summary["source"].get("labels", OWN) == OWN
        source = open_source(config.reference, labels="source" if own else "none")
    weights = config.inception
    asked = {
        **identity(config),
        **generator.digests(),
        # By content; a missing file is an error later, and until then unlike every other.
        "inception": sha256_file(weights) if weights and weights.is_file() else weights and str(weights),
        "scores": scores.digest,
        "scored": scored.digest,
        "source": source.digest,
    }
    done = not config.overwrite and _finished(config.run / "fid", asked)
    return Plan(config, generator, artifact, source, scored, asked, done)


def _finished(folder: Path, asked: dict[str, Any]) -> bool:
    if not (folder / REPORT).exists():
        return False
    report = read_json(folder / REPORT)
    return report["asked"] == asked and all((folder / name).exists() for name in report["files"])


def run(plan: Plan, progress: Progress | None = None) -> Result:
    """Sample, measure and write ``<run>/fid/fid.json``, unless the same measurement is there."""
    progress = progress or Silent()
    folder = plan.config.run / "fid"
    if not plan.done:
        runtime.once(lambda: write_json(folder / REPORT, {"asked": plan.asked, **_measure(plan, folder, progress)}))
    return Result(report=read_json(folder / REPORT), path=folder / REPORT)


def _measure(plan: Plan, folder: Path, progress: Progress) -> dict[str, Any]:
    config, generator = plan.config, plan.generator
    workspace, size = Workspace(config.workspace), generator.codec.spec.pixels
    space = open_space(workspace, plan.scored, size, config.inception, generator.device, progress)
    real = RealImages(plan.source, size, space, class_numbers(plan.source, generator.classes), progress)
    reference = real.reference(workspace, _rows(plan, "reference", config.reference_images), generator.device)
    yardstick, drawing = Yardstick.of(reference.images), _Drawing(plan, progress)
    start = time.perf_counter()
    generated = Seen.of(drawing.chunks(), space)
    sampling = round(time.perf_counter() - start, 1)
    save_png(grid(drawing.pixels(range(min(100, config.samples))), 10, side=64), folder / GRID)
    train = Seen.of(_artifact_chunks(plan), space)
    assert generated is not None
    assert train is not None
    infos = [plan.artifact.info(row) for row in range(len(plan.artifact))]
    contents = np.array([info["source_xxh3"] for info in infos], dtype="U32")
    rows = [
        yardstick.row("generated", Images(generated.features, generated.labels)),
        yardstick.row("replay", Images(train.features, train.labels, contents)),
        *_random_real(plan, real, reference, yardstick),
    ]
    files, copying = [REPORT, GRID], None
    unseen = _unseen_rows(plan, {info["source_key"] for info in infos})
    floor = _floor(plan, real, unseen, contents, reference, yardstick)
    rows += [floor] if floor else []
    held_out = Seen.of(real.chunks(unseen[:HELD_OUT], set(contents.tolist())), space)
    if held_out and len(held_out.labels) >= FEWEST:
        copying, closest, copied = copy_check(generated, train, held_out)
        rows[0]["copy_rate"] = copying["features"]["rate"]
        pairs = np.stack([drawing.pixels(closest), _artifact_pixels(plan, copied)], axis=1)
        save_png(grid(pairs.reshape(-1, *pairs.shape[2:]), 8, side=64), folder / CLOSEST)
        files.append(CLOSEST)
    return {
        "space": {"name": space.name, "digest": space.digest, "distance": distance_name(space)},
        "protocol": _protocol(plan, len(reference.images)),
        "rows": rows,
        "copying": copying,
        "costs": _costs(plan, sampling),
        "notes": _notes(space.name, real.numbers, floor is not None, copying is not None),
        "files": files,
    }


def _notes(space: str, numbers: Array, floor: bool, copying: bool) -> list[str]:
    notes = []
    if space == "classifier":
        notes.append("Measured in the space of a classifier of this data: not FID, comparable only with its like.")
    if not np.any(numbers >= 0):
        notes.append("No class of the reference is one of the run's: no distance class by class.")
    elif np.any(numbers < 0):
        notes.append(f"{int(np.sum(numbers < 0))} classes of the reference are not the run's: not in class_distance.")
    if not copying:
        notes.append("Too few real images that were not trained on: no copy check.")
    if not floor:
        notes.append("Too few real images that were not trained on, or too few others to measure them by: no floor.")
    return notes


@dataclass(frozen=True)
class _Drawing:
    """The generated images: never all in memory, since any of them can be drawn again from its seed."""

    plan: Plan
    progress: Progress

    def pixels(self, which: Sequence[int]) -> Array:
        """Images number ``which``: u1 [n, S, S, 3]."""
        config, generator = self.plan.config, self.plan.generator
        labels = balanced_labels(config.samples, len(generator.classes))
        seeds = sample_seeds(config.seed, config.samples)
        rows = [int(row) for row in which]
        return generator.pixels(labels[rows], [seeds[row] for row in rows], config.sampler, batch=config.batch_size)

    def chunks(self) -> Iterator[tuple[Array, Array]]:
        """Labels and pixels of all images, in order."""
        config, generator, start = self.plan.config, self.plan.generator, 0
        labels = balanced_labels(config.samples, len(generator.classes))
        seeds = sample_seeds(config.seed, config.samples)
        for pixels in generator.stream(labels, seeds, config.sampler, batch=config.batch_size, progress=self.progress):
            yield labels[start : start + len(pixels)], pixels
            start += len(pixels)


def _rows(plan: Plan, purpose: str, limit: int) -> list[int]:
    """At most ``limit`` of the images to measure against, drawn at random; without a reference, of those scored."""
    if plan.config.reference:
        return drawn(len(plan.source), limit, purpose)
    return scored_rows(Workspace(plan.config.workspace), plan.source, limit, purpose)


def _random_real(plan: Plan, real: RealImages, reference: Reference, yardstick: Yardstick) -> list[dict[str, Any]]:
    """Rows of random images of the scored source, as many as the condensed set has."""
    workspace, config = Workspace(plan.config.workspace), plan.config
    scored = replace(real, source=plan.scored, numbers=class_numbers(plan.scored, plan.generator.classes))
    found = []
    for subset in range(1, config.subsets + 1):
        chosen = scored_rows(workspace, scored.source, len(plan.artifact), "random real", config.seed, subset)
        images = scored.see(chosen, reference)
        if len(images) > 1:
            found.append(yardstick.row(f"random real {subset}", images))
    return found


def _unseen_rows(plan: Plan, keys: set[str]) -> list[int]:
    """Images to measure against, in random order, that the run was not trained on as far as their ``keys`` say."""
    rows = _rows(plan, "unseen", len(plan.source))
    if not plan.config.reference:
        rows = [row for row in rows if plan.source.keys[row] not in keys]
    return [rows[i] for i in runtime.rng("unseen", plan.config.seed).permutation(len(rows))]


def _floor(
    plan: Plan, real: RealImages, unseen: list[int], contents: Array, reference: Reference, yardstick: Yardstick
) -> dict[str, Any] | None:
    """The row of unseen real images, against the reference without them and without their copies."""
    images = real.see(unseen[: min(plan.config.samples, len(unseen) // FLOOR)], reference)
    # A copy of a training image under another name was seen.
    images = images.take(~np.isin(images.digests, contents))
    own = np.isin(reference.images.digests, images.digests)
    if len(images) < 2 or np.sum(~own) < FEWEST:
        return None
    return (Yardstick.of(reference.images.take(~own)) if own.any() else yardstick).row("real", images)


def _artifact_pixels(plan: Plan, rows: Sequence[int]) -> Array:
    """Training images as the model knows them: stored latents, decoded."""
    raw = torch.from_numpy(plan.artifact.stack(LATENT, np.asarray(rows))).to(plan.generator.device)
    return plan.generator.codec.decode(to_model(raw, LatentSpec.from_dict(plan.artifact.manifest["latent"])))


def _artifact_chunks(plan: Plan) -> Iterator[tuple[Array, Array]]:
    labels, step = np.asarray(plan.artifact.labels, dtype=np.int64), plan.config.batch_size
    for start in range(0, len(labels), step):
        rows = range(start, min(start + step, len(labels)))
        yield labels[start : rows.stop], _artifact_pixels(plan, rows)


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
    """Seconds of one worker, by stage, as measured; None where there was none, or nothing says how long it took."""
    workspace = Workspace(plan.config.workspace)
    scores = workspace.scores.require("d2c score DIR")
    scorer = Path(workspace.recall(scores.summary["scorer"]["spec"]))
    return {
        "unit": "seconds of one worker",
        "device": plan.generator.device.type,
        "train_scorer": Run(scorer).seconds() if (scorer / COST).is_file() else None,
        "score": scores.cost["seconds"],
        "attach": _attachment_seconds(workspace, plan.artifact),
        "train": Run(plan.config.run).seconds(),
        "sample": sampling,
    }


def _attachment_seconds(workspace: Workspace, artifact: Artifact) -> float | None:
    """Seconds that this artifact's text and vision took, found by what their records say; None without records."""
    text, vision = artifact.manifest["encoders"]["text"], artifact.manifest["encoders"]["vision"]
    seconds = []
    for path in sorted((workspace.path / "attachments").glob("*/*/stage.json")):
        record, of = read_json(path), path.parent.parent.name
        if of == "text":
            mine = text is not None and record["summary"] == text
        else:
            chosen = workspace.selection(of).record()
            selected = chosen is not None and chosen.config.items() <= artifact.manifest["selection"].items()
            mine = selected and vision is not None and vision_facts(record["config"], record["summary"]) == vision
        if mine:
            seconds.append(float(record["cost"]["seconds"]))
    return round(sum(seconds), 1) if seconds else None
