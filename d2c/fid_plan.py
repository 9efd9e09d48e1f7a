"""What `d2c fid` was asked to measure, opened and checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from d2c import batches, runtime
from d2c.config import execution, identity
from d2c.encoding import weights_stamp
from d2c.errors import D2CError, UsageError
from d2c.features import INCEPTION_SHA256, inception_file, no_inception
from d2c.generator import Generator
from d2c.judge import drawn
from d2c.labelling import OWN, reopen
from d2c.npz import Npz, open_npz
from d2c.pictures import (
    Drawn,
    FromArtifact,
    FromNpz,
    FromSource,
    Pictures,
    class_numbers,
    classes_of,
    decoded,
    is_artifact,
    is_npz,
    open_images,
    opened,
    other_size,
    require_side,
    samples_of,
)
from d2c.runs import RUN
from d2c.sampling import SamplerConfig
from d2c.sources import Source, open_source
from d2c.workspace import Workspace
from formats import Artifact, open_artifact
from formats.files import read_json
from formats.hashing import sha256_file
from formats.schema import ClassRow

REPORT = "fid.json"
TRAIN = 100_000
"""Images that the copy check looks for copies of, at most; of more, so many are drawn at random."""


@dataclass(frozen=True, kw_only=True)
class FidConfig:
    """What to measure: ``samples`` images of a run, or all that a folder, Parquet, tar, .npz or artifact holds.

    At most ``reference_images`` real ones are what they are measured against.
    """

    judged: Path = execution()
    workspace: Path = execution()
    artifact: Path | None = execution(None)
    """Where the artifact of a run lies now; None: where it was when the run was trained on it."""
    train: str | None = execution(None)
    """What the images may have been copied from, where they are not a run's: an artifact or a source."""
    held_out: str | None = execution(None)
    """Real images that nothing was trained on; None: those of the reference that were not trained on."""
    inception: Path | None = execution(None)
    second: str | None = None
    """A second space: a vision encoder as of `d2c.vision.open_vision`, or ``classifier``."""
    reference: str | None = execution(None)
    """Real images, an artifact or an .npz to measure against; None: the scored source."""
    reference_images: int = 50_000
    samples: int = 2_000
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    labels: Literal["balanced", "random"] = "balanced"
    """Classes of the images of a run: equally often, or drawn at random."""
    subsets: int = 3
    seed: int = 0
    export_npz: Path | None = None
    out: Path | None = execution(None)
    codec: str | None = execution(None)
    device: str = execution("auto")
    batch_size: int = execution(64)
    overwrite: bool = execution(False)

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise UsageError("a covariance needs at least two samples", found=self.samples, expected="--samples 2000")

    @property
    def folder(self) -> Path:
        """Where the report goes."""
        if self.out is not None:
            return self.out
        if (self.judged / RUN).is_file():
            return self.judged / "fid"
        return self.judged.with_name(f"{self.judged.name.removesuffix('.npz')}-fid")


@dataclass(frozen=True, eq=False)
class Plan:
    """Opened and checked inputs. ``side``: of all images, in pixels; ``classes``: the numbers of labels, everywhere."""

    config: FidConfig
    device: torch.device
    judged: Pictures
    side: int
    classes: list[ClassRow]
    generator: Generator | None
    artifact: Artifact | None
    train: Pictures | None
    """What may have been copied."""
    scored: Source | None
    """The real images that the condensed set was chosen from, where there is a workspace."""
    source: Source | None
    """The real images to measure against; None where these are not a source."""
    npz: Npz | None
    pictures: Pictures | None
    """Images to measure against that are not a source: of an .npz or an artifact."""
    held_out: Source | None
    inception: Path | None
    """Weights to measure with; None: the workspace's classifier."""
    asked: dict[str, Any]
    done: bool
    drawing: float | None = None
    """Worker-seconds that the images of a run took, where they were drawn before."""

    @property
    def workspace(self) -> Workspace | None:
        return Workspace(self.config.workspace) if self.scored is not None else None


def plan(config: FidConfig) -> Plan:
    """Open what is judged, what it is compared with, and what it may have been copied from.

    Raises:
        UsageError: options that contradict each other or the run.
        D2CError: one of them is missing or of another size, or the artifact is not the one that the run was trained on.
    """
    device = runtime.resolve_device(config.device)
    generator = Generator.open(config.judged, device, config.codec) if (config.judged / RUN).is_file() else None
    if generator and config.train:
        raise UsageError(
            "a run knows what it was trained on", found=f"--train {config.train}", hint="--artifact says where it moved"
        )
    if config.artifact and not generator:
        raise UsageError("--artifact is for runs", hint=f"say what may have been copied with --train {config.artifact}")
    sampler = generator.guided(config.sampler) if generator else config.sampler.guided(None)
    config, workspace = replace(config, sampler=sampler), Workspace(config.workspace)
    scores = workspace.scores.record()
    scored = reopen(workspace) if scores else None
    artifact = _artifact(config, generator)
    # Classes that were made for the scored images mean nothing elsewhere.
    own = scores is None or scores.summary["source"].get("labels", OWN) == OWN
    source, npz = _reference(config, scored, own)
    classes = _classes(generator, artifact, scored, source)
    judged = _judged(config, generator, classes, device)
    pictures = _pictures(config, npz, judged.side, classes, device)
    if source is not None and config.reference:
        require_side(source, judged.side)
    held_out = open_images(config.held_out) if config.held_out else None
    if held_out is not None:
        require_side(held_out, judged.side)
    train = _train(config, generator, artifact, judged.side, classes, device)
    weights = inception_file(config.inception)
    use = weights if config.inception or weights.is_file() else None
    if use is None and scored is None:
        raise no_inception(weights)
    digest = sha256_file(use) if use and use.is_file() else None
    if use and digest and not config.inception and not digest.startswith(INCEPTION_SHA256):
        raise D2CError(
            "the Inception weights in torch's cache are not the published ones",
            where=use,
            found=f"sha256 {digest[:8]}...",
            expected=f"{INCEPTION_SHA256}...",
            hint="delete the file and download it again, or name other weights with --inception FILE",
        )
    asked = {
        **identity(config),
        **(generator.digests() if generator else {"judged": judged.digest}),
        # By content; a missing file is an error later, and until then unlike every other.
        "inception": digest or (use and str(use)),
        "second_weights": weights_stamp(config.second),
        "scores": scores.digest if scores else None,
        "scored": scored.digest if scored else None,
        "source": source.digest if source else None,
        "reference": None if source else pictures.digest if pictures else _stats_digest(config),
        "train": train.digest if train else None,
        "held_out": held_out.digest if held_out else None,
    }
    done = not config.overwrite and _finished(config, asked)
    return Plan(
        config=config,
        device=device,
        judged=judged,
        side=judged.side,
        classes=classes,
        generator=generator,
        artifact=artifact,
        train=train,
        scored=scored,
        source=source,
        npz=npz,
        pictures=pictures,
        held_out=held_out,
        inception=use,
        asked=asked,
        done=done,
    )


def _finished(config: FidConfig, asked: Mapping[str, Any]) -> bool:
    folder = config.folder
    if not (folder / REPORT).exists() or (config.export_npz and not config.export_npz.exists()):
        return False
    report = read_json(folder / REPORT)
    return report["asked"] == asked and all((folder / name).exists() for name in report["files"])


def _artifact(config: FidConfig, generator: Generator | None) -> Artifact | None:
    if generator is None:
        return open_artifact(config.train) if config.train and is_artifact(config.train) else None
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
    return artifact


def _reference(config: FidConfig, scored: Source | None, own: bool) -> tuple[Source | None, Npz | None]:
    """A source or an .npz to measure against; neither for an artifact."""
    if config.reference is None:
        if scored is None:
            raise D2CError(
                "there is nothing to measure against",
                where=config.workspace,
                found="no scored images there",
                hint="name real images, or statistics of them, with --reference",
            )
        return scored, None
    if is_npz(config.reference):
        return None, open_npz(Path(config.reference))
    if is_artifact(config.reference):
        return None, None
    return open_images(config.reference) if own else open_source(config.reference, labels="none"), None


def _pictures(
    config: FidConfig, npz: Npz | None, side: int, classes: list[ClassRow], device: torch.device
) -> Pictures | None:
    """The images of a reference that is no source."""
    if npz is not None:
        if npz.shape is not None and npz.shape[1] != side:
            raise other_size(config.reference, npz.shape[1], side)
        return samples_of(Path(str(config.reference)), len(classes)) if npz.shape else None
    if config.reference and is_artifact(config.reference):
        return opened(config.reference, side, classes, config.codec, device)
    return None


def _stats_digest(config: FidConfig) -> str | None:
    return sha256_file(Path(config.reference)) if config.reference and is_npz(config.reference) else None


def _classes(
    generator: Generator | None, artifact: Artifact | None, scored: Source | None, source: Source | None
) -> list[ClassRow]:
    if generator is not None:
        return generator.classes
    if artifact is not None:
        return list(artifact.classes)
    known = scored or source
    return classes_of(known) if known else []


def _judged(
    config: FidConfig, generator: Generator | None, classes: list[ClassRow], device: torch.device
) -> Drawn | FromSource | FromNpz | FromArtifact:
    if generator is not None:
        return Drawn(generator, config.samples, config.sampler, config.seed, config.batch_size, config.labels)
    location = str(config.judged)
    if is_npz(location):
        return samples_of(config.judged, len(classes))
    if is_artifact(location):
        return decoded(open_artifact(location), classes, config.codec, device)
    source = open_images(location)
    probed = batches.probe(source)
    if not probed.same_square:
        raise D2CError(
            "images to judge must be squares of one size",
            where=location,
            found=f"sides from {probed.median_side} to {probed.max_side} px",
            hint="write them as a model gives them, uncropped",
        )
    return FromSource(source, range(len(source)), probed.max_side, class_numbers(source.classes, classes))


def _train(
    config: FidConfig,
    generator: Generator | None,
    artifact: Artifact | None,
    side: int,
    classes: list[ClassRow],
    device: torch.device,
) -> Pictures | None:
    if artifact is not None:
        found = decoded(artifact, classes, config.codec, device)
        if found.side != side:
            raise other_size(artifact.path, found.side, side)
        return _at_most(found)
    if config.train is None:
        return None
    return _at_most(opened(config.train, side, classes, config.codec, device))


def _at_most(pictures: Pictures) -> Pictures:
    """A random `TRAIN` of a source's or an artifact's images, where there are more."""
    if len(pictures) <= TRAIN or not isinstance(pictures, FromSource | FromArtifact):
        return pictures
    return replace(pictures, rows=drawn(len(pictures), TRAIN, "train"))
