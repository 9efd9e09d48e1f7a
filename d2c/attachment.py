"""Attach: text embeddings once per class, vision tokens once per picked image (paper, section 3.3).

Each encoder has its own folder in the workspace, so attaching another one leaves the rest; only picks are encoded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2c import picks as picked
from d2c import runtime, text_table
from d2c.config import execution
from d2c.encoders import EncoderInfo
from d2c.encoding import is_scorer, open_for_scores, public_name, slug, weights_stamp
from d2c.errors import D2CError, UsageError
from d2c.parts import Part, ToDo, require_all, split, work
from d2c.progress import Bar, Progress, Silent
from d2c.runtime import Ranks
from d2c.text import Synonyms, open_text, prompts
from d2c.tokens import PART, VIEWS, save_array, seen
from d2c.workspace import Stage, Workspace
from formats.files import read_json, remove_tree, write_json
from formats.hashing import xxh3, xxh3_file
from formats.schema import View

TEXT_TEMPLATE = "a photo of a {class}"
"""The paper's prompt (section 3.3)."""
ENCODER = "encoder.json"


@dataclass(frozen=True, kw_only=True)
class AttachmentConfig:
    """What to attach to the selection ``selection``: ``text`` and ``vision`` name encoders, None attaches nothing.

    ``text`` may be a table of the user's own (`d2c.text_table`), which needs no ``template`` and no ``synonyms``.
    ``grid`` is the side of the token grid that the vision tokens must lie on (16 for a /2 model on 32 x 32 latents).
    """

    workspace: Path = execution()
    selection: str
    text: str | None = "hashed"
    template: str = TEXT_TEMPLATE
    synonyms: Synonyms = "first"
    vision: str | None = "scorer"
    views: tuple[View, ...] = ("orig",)
    """Which views of an image are shown to the vision encoder: its mirror image too, or not."""
    grid: int
    batch_size: int = 64
    precision: str = "auto"
    seed: int = 0
    device: str = execution("auto")
    gpus: int = execution(1)
    threads: int = execution(4)

    overwrite: bool = execution(False)

    def __post_init__(self) -> None:
        if self.views not in VIEWS:
            raise UsageError(
                "an image cannot be seen in these views",
                found=",".join(self.views),
                expected=" or ".join(",".join(some) for some in VIEWS),
            )

    def text_identity(self) -> dict[str, Any]:
        """What decides the text embeddings."""
        if text_table.is_table(self.text):
            return {"text": self.text}
        return {"text": self.text, "template": self.template, "synonyms": self.synonyms}

    def vision_identity(self) -> dict[str, Any]:
        """What decides the vision tokens."""
        asked = {
            "vision": self.vision,
            "views": list(self.views),
            "grid": self.grid,
            "batch_size": self.batch_size,
            "precision": self.precision,
        }
        # Only the scorer is shown noisy images.
        return {**asked, "seed": self.seed} if is_scorer(self.vision) else asked


@dataclass(frozen=True)
class Result:
    """Names of the finished attachments in the workspace, to pack with, and what views of an image they are of."""

    text: str | None
    vision: str | None
    views: tuple[View, ...]


@dataclass(frozen=True)
class Plan:
    """What `run` will do; a stage is None where nothing of its kind is asked for."""

    config: AttachmentConfig
    text: Stage | None
    vision: Stage | None
    text_reasons: list[str]
    vision_reasons: list[str]
    inputs: dict[str, dict[str, str]]
    images: int

    @property
    def result(self) -> Result:
        """What `run` will have done."""
        text, vision = (stage.path.name if stage else None for stage in (self.text, self.vision))
        return Result(text=text, vision=vision, views=self.config.views)


@dataclass(frozen=True)
class _Job:
    config: AttachmentConfig
    stage: Stage
    parts: list[Part]
    todo: ToDo
    progress: Progress


def plan(config: AttachmentConfig) -> Plan:
    """Find the selection and name the attachments.

    Raises:
        D2CError: there are no scores or no such selection yet.
    """
    workspace = Workspace(config.workspace)
    scores = workspace.scores.require("d2c score DIR")
    chosen = workspace.selected(config.selection)
    names = xxh3(repr([(c["id"], c["name"]) for c in scores.summary["classes"]]).encode())
    inputs = {
        "text": {"classes": names, "weights": _text_stamp(config.text)},
        "vision": {"selection": chosen.digest, "scores": scores.digest, "weights": weights_stamp(config.vision)},
    }
    device, images = runtime.resolve_device(config.device), int(chosen.summary["images"])
    found = [
        _planned(replace(config, precision=precision), inputs, images)
        for precision in runtime.precisions(config.precision, device)
    ]
    return next((one for one in found if not one.vision_reasons), found[0])


def _planned(config: AttachmentConfig, inputs: dict[str, dict[str, str]], images: int) -> Plan:
    workspace = Workspace(config.workspace)
    text = workspace.text(slug(config.text, config.text_identity())) if config.text else None
    vision = (
        workspace.vision(config.selection, slug(config.vision, config.vision_identity())) if config.vision else None
    )
    return Plan(
        config=config,
        text=text,
        vision=vision,
        text_reasons=_reasons(config, text, config.text_identity(), inputs["text"]),
        vision_reasons=_reasons(config, vision, config.vision_identity(), inputs["vision"]),
        inputs=inputs,
        images=images,
    )


def run(plan: Plan, progress: Progress | None = None) -> Result:
    """Encode what is missing or stale."""
    if plan.text and plan.text_reasons:
        runtime.once(lambda: _attach_text(plan, plan.text))
    if plan.vision and plan.vision_reasons:
        _attach_vision(plan, plan.vision, progress or Silent())
    return plan.result


def _reasons(config: AttachmentConfig, stage: Stage | None, asked: dict[str, Any], inputs: dict[str, str]) -> list[str]:
    if stage is None:
        return []
    return ["--overwrite"] if config.overwrite else stage.stale(asked, inputs)


def _text_stamp(text: str | None) -> str:
    """As `weights_stamp`; of a table, its bytes."""
    path = Path(text or "").expanduser()
    return xxh3_file(path) if text_table.is_table(text) and path.is_file() else weights_stamp(text)


def _attach_vision(plan: Plan, stage: Stage, progress: Progress) -> None:
    config, device = plan.config, runtime.resolve_device(plan.config.device)
    lock = runtime.once(stage.lock)
    try:
        runtime.once(lambda: remove_tree(stage.path) if config.overwrite else None)
        runtime.once(lambda: stage.begin(config.vision_identity(), plan.inputs["vision"]))
        parts = split(plan.images, PART, stage.path / "parts", ".npy")
        job = _Job(config, stage, parts, ToDo.of(parts), progress)
        workers = min(config.gpus, max(1, len(job.todo.parts)))
        runtime.launch(_encode_parts, job, workers=workers, device=device)
        runtime.once(lambda: _finish_vision(job, device))
    finally:
        if lock:
            lock.release()


def _attach_text(plan: Plan, stage: Stage | None) -> None:
    config = plan.config
    assert stage is not None
    assert config.text is not None
    classes = Workspace(config.workspace).classes()
    device = runtime.resolve_device(config.device)
    with stage.locked():
        stage.begin(config.text_identity(), plan.inputs["text"])
        with stage.spending(), runtime.one_thread(device):
            if text_table.is_table(config.text):
                table = text_table.load(Path(config.text).expanduser(), classes)
                info, embeds, mask = table.info, table.embeds, table.mask
                sentences, asked = [""] * len(classes), {}
            else:
                encoder = open_text(config.text, device)
                sentences = prompts([c["name"] for c in classes], config.template, config.synonyms)
                info, (embeds, mask) = encoder.info, encoder.encode(sentences)
                asked = {"prompt_template": config.template, "synonyms": config.synonyms}
            save_array(stage.path / "text_embeds.npy", embeds)
            save_array(stage.path / "text_mask.npy", mask)
            write_json(stage.path / "prompts.json", sentences)
        summary = {**info.to_dict(), **asked}
        stage.finish(["text_embeds.npy", "text_mask.npy", "prompts.json"], summary, device=device.type)


def _encode_parts(ranks: Ranks, job: _Job) -> None:
    config, workspace = job.config, Workspace(job.config.workspace)
    scores = workspace.scores.require("d2c score DIR")
    device = runtime.resolve_device(config.device)
    with runtime.one_thread(device):
        picks = picked.load(workspace, config.selection)
        source, encoder, classes = open_for_scores(str(config.vision), config.grid, workspace, device, config.seed)
        labels = classes[picks.table["label"].to_numpy()]
        _same_encoder(job.stage.path / ENCODER, encoder.info)
        if ranks.main:
            # Every rank would write the same; the first does.
            write_json(job.stage.path / ENCODER, encoder.info.to_dict())

        def make(part: Part, bar: Bar) -> None:
            encoded = []
            size = int(scores.config["size"])
            for batch in picked.read(source, picks, part.items, size, batch=config.batch_size, threads=config.threads):
                with runtime.autocast(config.precision, device):
                    views = [encoder.encode(seen(batch.pixels, v), labels[batch.indices]) for v in config.views]
                encoded.append(np.stack(views, axis=1))
                bar.advance(len(batch.indices) * ranks.world)
            save_array(part.path, np.concatenate(encoded))

        work(job.todo, make, ranks=ranks, stage=job.stage, progress=job.progress, label="attach")


def _same_encoder(record: Path, info: EncoderInfo) -> None:
    """Refuse to go on with other weights than those of the parts that are there: the hub may have newer ones."""
    before = read_json(record)["weights_xxh3"] if record.exists() else info.weights_xxh3
    if before != info.weights_xxh3:
        raise D2CError(
            "the encoder's weights changed since its first tokens were computed",
            where=info.name,
            found=f"weights {info.weights_xxh3}",
            expected=f"weights {before}",
            hint="put the old weights back, or encode all images anew: d2c attach --overwrite",
        )


def _finish_vision(job: _Job, device: torch.device) -> None:
    require_all(job.parts)
    summary = {**read_json(job.stage.path / ENCODER), "spec": public_name(str(job.config.vision))}
    outputs = [str(part.path.relative_to(job.stage.path)) for part in job.parts]
    job.stage.finish([*outputs, ENCODER], summary, device=device.type)
