"""What scoring is asked for, checked against the source and the scorer before anything is done."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from d2c import deduplication, runtime
from d2c.config import execution, identity
from d2c.deduplication import Deduplication, Duplicates
from d2c.difficulty import Difficulty, Settings, check_shapes
from d2c.duplicates import Keep
from d2c.errors import UsageError
from d2c.labelling import OWN, open_labelled
from d2c.latents import LatentSpec, open_codec
from d2c.parts import Part, split
from d2c.picks import class_indices
from d2c.scorers import Denoiser, load_denoiser
from d2c.sources import Source, open_source
from d2c.throughput import pays
from d2c.workspace import Stage, Workspace
from formats.files import read_table
from formats.hashing import xxh3_array, xxh3_json, xxh3_lines

LATE = ("duplicates", "keep", "held_out")
"""What counts only after all images are scored: other choices there cost no second scoring."""


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """What to score and with what.

    ``evals`` is denoiser evaluations per image. ``stratified`` takes one timestep from each of ``evals`` equal strata
    and the same noise for every image, so that the draws cancel in the ranking; ``paper`` draws both anew for every
    image (Algorithm 2 as written).
    """

    source: str = execution()
    workspace: Path = execution()
    scorer: str = execution()
    objective: str | None = None
    class_map: Path | None = execution(None)
    """Which class of the source is which of the scorer's (`d2c.classmap`): what it says counts, not where it lies."""
    codec: str = "rgb"
    size: int = 256
    estimator: Literal["stratified", "paper"] = "stratified"
    evals: int = 8
    batch_size: int = 64
    labels: str = OWN
    """Where classes come from: ``source``, ``none`` (one class), or ``clusters:K``."""
    part: int = 1024
    """Images in a part, rounded up to whole batches: the most work that a kill can cost."""
    precision: str = "auto"
    compile: bool = True
    """On a GPU, and where there is enough to do, compile the model first. Compiled sums round differently."""
    seed: int = 0
    device: str = execution("auto")
    gpus: int = execution(1)
    threads: int = execution(4)
    share: tuple[int, int] | None = execution(None)
    """(i, n): do the i-th of n shares of the parts and merge nothing, as a task of a job array does."""
    duplicates: Duplicates = "report"
    keep: Keep = "first"
    """Which of some duplicates stays, where they are dropped."""
    held_out: str | None = execution(None)
    """Another source, such as validation images: those of its images that are in the source too are leaks."""
    retry_bad: bool = execution(False)
    """Try again what could not be read, and score only the parts in which that was."""
    max_bad: float | None = execution(None)
    """Images that may be unreadable: a share below 1, or a number."""
    overwrite: bool = execution(False)

    def __post_init__(self) -> None:
        deduplication.check(self.duplicates, self.keep)
        if self.share is not None and not 1 <= self.share[0] <= self.share[1]:
            raise UsageError(
                "there is no such share of the parts", found="/".join(map(str, self.share)), expected="1/N to N/N"
            )
        if self.estimator not in ("stratified", "paper"):
            raise UsageError("unknown estimator", found=self.estimator, expected="stratified or paper")
        if self.evals < 2:
            raise UsageError(
                "a score needs at least two evaluations, to know its own error", found=self.evals, expected="--evals 8"
            )

    @property
    def dedup(self) -> Deduplication:
        """What becomes of duplicates."""
        return Deduplication(self.duplicates, self.keep, self.size, self.threads, self.labels)

    @property
    def settings(self) -> Settings:
        """What decides the losses."""
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})


@dataclass(frozen=True)
class Plan:
    """What `run` will do, from opened and checked inputs."""

    config: ScoringConfig
    stage: Stage
    reasons: list[str]
    source: Source
    scorer: Denoiser
    codec: LatentSpec
    inputs: dict[str, str]
    classes: np.ndarray[Any, np.dtype[np.int64]]
    """The scorer's index of each class of the source."""
    held_out: Source | None

    @cached_property
    def parts(self) -> list[Part]:
        """Runs of whole batches of images that follow each other in the source's storage.

        A part's name follows from its images' keys, labels and files, so that a changed file costs its part alone.
        """
        batch = self.config.batch_size
        folder = self.stage.path / "parts" / self.digest
        source, order = self.source, self.source.storage_order()
        parts = split(len(source), batch * -(-self.config.part // batch), folder, "")

        def lines(part: Part) -> Iterator[str]:
            for index in order[part.items.start : part.items.stop].tolist():
                yield f"{source.keys[index]}\t{source.labels[index]}\t{source.stamp(index)}"

        return [
            replace(part, path=part.path.with_name(f"{part.path.name}-{xxh3_lines(lines(part))[:12]}.parquet"))
            for part in parts
        ]

    @property
    def digest(self) -> str:
        """Of all that decides the parts but their images. They lie in a folder of this name, so that parts of different
        settings, which stragglers of an earlier job may still write, never meet in one table.
        """
        return parts_digest(identity(self.config), self.inputs, self.stage.version)

    def parts_with_bad(self) -> list[Part]:
        """Finished parts that hold an image which could not be read."""
        done = [part for part in self.parts if part.done]
        return [part for part in done if read_table(part.path, ["reason"])["reason"].null_count < len(part.items)]

    @property
    def evaluations(self) -> int:
        """Denoiser evaluations in all."""
        return len(self.source) * self.config.evals


def parts_digest(config: Mapping[str, Any], inputs: Mapping[str, str], version: int) -> str:
    """Of the options and inputs that parts depend on."""
    # Which images there are is told by the parts' own names.
    apart = (*LATE, "source")
    kept = [{name: value for name, value in asked.items() if name not in apart} for asked in (config, inputs)]
    return xxh3_json([*kept, version])[:16]


def open_scored(config: ScoringConfig) -> Source:
    """The source with the classes that the config asks for."""
    workspace = Workspace(config.workspace)
    return open_labelled(config.source, config.labels, workspace, seed=config.seed, threads=config.threads)


def plan(config: ScoringConfig, source: Source | None = None) -> Plan:
    """Open the source and the scorer and compare them.

    Raises:
        D2CError: a path is missing, the scorer is not readable, or its classes are not the source's.
    """
    source = source or open_scored(config)
    held_out = open_source(config.held_out, labels="none") if config.held_out else None
    # The plan only asks what the scorer is; the workers load it where they run.
    denoiser = load_denoiser(config.scorer, device=torch.device("cpu"), objective=config.objective)
    classes = class_indices(source, denoiser, config.class_map)
    codec = open_codec(config.codec, config.size, torch.device("cpu")).spec
    check_shapes(denoiser, codec)
    stage = Workspace(config.workspace).scores
    weights = str(denoiser.origin["weights_xxh3"])
    inputs = {
        "source": source.digest,
        "scorer": weights,
        "codec": codec.weights_xxh3,
        "classes": xxh3_array(classes),
        "held_out": held_out.digest if held_out else "",
    }
    config = _resolved(config, stage, inputs, len(source))
    reasons = ["--overwrite"] if config.overwrite else stage.stale(identity(config), inputs)
    made = Plan(config, stage, reasons, source, denoiser, codec, inputs, classes, held_out)
    if reasons == ["not run yet"] and any(part.done for part in made.parts):
        return replace(made, reasons=["an interrupted run is resumed"])
    if not reasons and config.retry_bad and (again := made.parts_with_bad()):
        return replace(made, reasons=[f"{len(again)} parts with unreadable images are tried again"])
    return made


def _resolved(config: ScoringConfig, stage: Stage, inputs: dict[str, str], images: int) -> ScoringConfig:
    """The config with nothing left to the device; what was finished on another device is taken as it is."""
    # Resolved here: parts of one table must not mix precisions because it was resumed on another device.
    device = runtime.resolve_device(config.device)
    resolved = replace(
        config,
        precision=runtime.resolve_precision(config.precision, device),
        compile=config.compile and pays(device, images * config.evals),
    )
    record = stage.record()
    if record is None or config.precision != "auto" or not config.compile:
        return resolved
    there = replace(
        config, precision=record.config.get("precision", "auto"), compile=bool(record.config.get("compile"))
    )
    return resolved if stage.stale(identity(there), inputs) else there


def estimate_seconds(plan: Plan) -> float:
    """Seconds of one worker for the whole source, from one timed batch after one that warms up."""
    device = runtime.resolve_device(plan.config.device)
    config = replace(plan.config, device=str(device))
    scorer = Difficulty.open(config.settings, plan.source)
    indices = plan.source.storage_order()[: config.batch_size].tolist()
    seconds = 0.0
    with runtime.one_thread(device):
        for _ in range(2):
            start = time.perf_counter()
            for _ in scorer.tables(indices):
                pass
            seconds = time.perf_counter() - start
    return seconds / len(indices) * len(plan.source)
