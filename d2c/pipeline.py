"""What a command needs before it can do its own work: the stages that are missing or stale."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from d2c import attachment, packing, picks, runtime, scoring, selection, training
from d2c.choices import SMALL, TRAIN_SCORER, choose_codec, choose_scorer, choose_scorer_model
from d2c.errors import UsageError
from d2c.latents import open_codec
from d2c.progress import Progress, Silent
from d2c.recipe import Recipe, recipe, without_attachments
from d2c.runs import Run
from d2c.runtime import resolve_device, resolve_precision
from d2c.selection import Method, SelectionConfig
from d2c.sit import model_spec
from d2c.sources import Source, open_source
from d2c.tokens import TokenCodec
from d2c.workspace import Workspace
from formats.hashing import xxh3_json
from formats.schema import Container

SCORER_IMAGES = 100_000
"""A scorer trained here sees at most this many images: the paper finds that a weak scorer costs little (Table 6)."""


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """What a user asks of `score`; None leaves the choice to the data."""

    source: Path
    workspace: Path
    scorer: str | None = None
    objective: str | None = None
    codec: str | None = None
    size: int | None = None
    estimator: Literal["stratified", "paper"] = "stratified"
    evals: int = 8
    scorer_model: str | None = None
    scorer_steps: int | None = None
    seed: int = 0
    precision: str = "auto"
    batch_size: int = 64
    device: str = "auto"
    gpus: int = 1
    threads: int = 4
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class PackRequest:
    """What a user asks of `pack`; None leaves the choice to what was selected or attached last, or to the data."""

    workspace: Path
    out: Path
    method: Method | None = None
    ratio: float | None = None
    per_class: int | None = None
    interval: int | None = None
    text: str | None = None
    vision: str | None = None
    grid: int | None = None
    tokens: TokenCodec = "int8"
    container: Container = "tar"
    shards: int | None = None
    licence: str = ""
    source_terms: str = ""
    seed: int = 0
    device: str = "auto"
    gpus: int = 1
    threads: int = 4
    overwrite: bool = False


@dataclass(frozen=True)
class Step:
    """One stage of a pipeline: whether it ran, and why."""

    stage: str
    ran: bool
    reasons: list[str]
    seconds: float
    facts: dict[str, Any]


T = TypeVar("T")


def score(request: ScoreRequest, progress: Progress | None = None) -> tuple[scoring.Result, list[Step]]:
    """Train a scorer where none is named and the data asks for one, then score every image."""
    progress = progress or Silent()
    source = open_source(request.source)
    for note in source.notes:
        progress.say(note)
    codec, size = choose_codec(source, request.codec, request.size)
    chosen = choose_scorer(source, request.scorer, codec)
    steps = []
    if chosen == TRAIN_SCORER:
        scorer = plan_scorer(request, source, codec, size)
        reasons = [] if scorer.done else [_why_train(request, source, scorer)]
        _, step = _step(
            "train the scorer",
            reasons,
            lambda: scorer.done or runtime.once(lambda: _train_scorer(request, scorer, source, codec, size, progress)),
            progress,
        )
        chosen = str(scorer.run)
        facts = {"model": scorer.model, "steps": scorer.recipe.steps, "images": len(scorer.images)}
        steps.append(_with(step, facts))
    plan = scoring.plan(scoring_config(request, codec, size, chosen), source)
    result, step = _step("score", plan.reasons, lambda: scoring.run(plan, progress), progress)
    facts = {"images": result.record.summary["images"], "bad_files": result.record.summary["bad_files"]}
    return result, [*steps, _with(step, facts)]


def _why_train(request: ScoreRequest, source: Source, scorer: ScorerPlan) -> str:
    what = f"{scorer.model} on {len(scorer.images):,} of its images for {scorer.recipe.steps:,} steps"
    if request.scorer is not None:
        return what
    kind = "its images are modelled as pixels" if source.is_imagenet else "it is not ImageNet-1k"
    return f"no scorer was named and {kind}: {what}"


def scoring_config(request: ScoreRequest, codec: str, size: int, scorer: str) -> scoring.ScoringConfig:
    """The stage's config once every open choice is made."""
    return scoring.ScoringConfig(
        source=request.source,
        workspace=request.workspace,
        scorer=scorer,
        objective=request.objective,
        codec=codec,
        size=size,
        estimator=request.estimator,
        evals=request.evals,
        batch_size=request.batch_size,
        precision=request.precision,
        seed=request.seed,
        device=request.device,
        gpus=request.gpus,
        threads=request.threads,
        overwrite=request.overwrite,
    )


@dataclass(frozen=True, kw_only=True)
class ScorerPlan:
    """A small class-conditional model to be trained on the source itself, because nobody named a scorer."""

    folder: Path
    model: str
    recipe: Recipe
    images: picks.Picks
    done: bool

    @property
    def run(self) -> Path:
        """The run's folder, which is what `score` takes as its scorer."""
        return self.folder / "run"


def plan_scorer(request: ScoreRequest, source: Source, codec: str, size: int) -> ScorerPlan:
    """Which model, how long, and on which images; the folder's name follows from all that decides the weights."""
    small = codec == "rgb"
    model = request.scorer_model or choose_scorer_model(codec, size)
    numbers = recipe("small" if small else "sit", steps=request.scorer_steps or (2_000 if small else 20_000))
    plain = without_attachments(numbers)
    device = resolve_device(request.device)
    latent = open_codec(codec, size, torch.device("cpu")).spec
    # Checked before anything is packed for it.
    model_spec(model, latent.size, latent.channels, len(source.classes))
    asked = {
        "model": model,
        "recipe": repr(plain),
        "codec": latent.to_dict(),
        "precision": resolve_precision(request.precision, device),
        "seed": request.seed,
        "source": source.digest,
    }
    folder = Workspace(request.workspace).scorer / xxh3_json(asked)[:8]
    return ScorerPlan(
        folder=folder,
        model=model,
        recipe=plain,
        images=picks.everything(source, limit=SCORER_IMAGES, seed=request.seed),
        done=Run(folder / "run").finished_steps() >= plain.steps,
    )


def _train_scorer(
    request: ScoreRequest, scorer: ScorerPlan, source: Source, codec: str, size: int, progress: Progress
) -> None:
    """Pack the source without attachments and train on it, in one process whatever ``--gpus`` says.

    A sum over several ranks, or over several threads, would round differently and change every score.
    """
    shards = scorer.folder / "shards"
    pack_config = packing.PackingConfig(
        workspace=request.workspace,
        out=shards,
        selection="all",
        container="parquet",
        seed=request.seed,
        device=request.device,
        threads=request.threads,
    )
    packing.run(packing.plan_source(pack_config, source, scorer.images, codec, size), progress)
    config = training.TrainingConfig(
        artifact=shards,
        out=scorer.run,
        model=scorer.model,
        recipe=scorer.recipe,
        precision=request.precision,
        seed=request.seed,
        threads=1,
        device=request.device,
    )
    training.run(training.plan(config), progress)


def select(config: SelectionConfig, progress: Progress | None = None) -> tuple[selection.Selection, Step]:
    """Select, unless this very selection is there."""
    progress = progress or Silent()
    plan = selection.plan(config)
    result, step = _step("select", plan.reasons, lambda: selection.run(plan, progress), progress)
    return result, _with(step, {"selection": config.name, "images": result.table.num_rows})


def current_selection(workspace: Path) -> str:
    """The name of the selection that `select` or `pack` made last.

    Raises:
        UsageError: there is none.
    """
    current = Workspace(workspace).current("selection")
    if current is None:
        raise UsageError(
            "nothing is selected yet",
            where=workspace,
            hint="give a budget, for example --ratio 0.008, or run d2c select",
        )
    return str(current["name"])


def attachment_config(request: PackRequest, name: str) -> attachment.AttachmentConfig:
    """Which encoders to attach: the named ones, else those attached last, else by the data.

    Small images (codec ``rgb``) get the encoders that need no download; others the paper's, T5 and DINOv2.
    """
    workspace = Workspace(request.workspace)
    scores = workspace.scores.require("d2c score DIR")
    before = workspace.current(f"attachments/{name}") or {}
    small = scores.config["codec"] == "rgb"
    text = request.text or before.get("asked_text") or ("hashed" if small else "t5")
    vision = request.vision or before.get("asked_vision") or ("scorer" if small else "dinov2")
    # The grid of a /2 model, so that the published sizes train on it; huge pixel grids keep the scorer's own.
    latent, own = int(scores.summary["codec"]["size"]), int(scores.summary["scorer"]["grid"])
    grid = request.grid or before.get("grid") or (latent // 2 if latent <= SMALL else own)
    return attachment.AttachmentConfig(
        workspace=request.workspace,
        selection=name,
        text=None if text == "none" else text,
        vision=None if vision == "none" else vision,
        grid=grid,
        seed=request.seed,
        device=request.device,
        gpus=request.gpus,
        threads=request.threads,
    )


def attach(
    request: PackRequest, name: str, progress: Progress | None = None, *, remember: bool = True
) -> tuple[attachment.Result, Step]:
    """Attach to the named selection what is not attached yet; ``remember`` the choices for later `pack`s."""
    progress = progress or Silent()
    config = attachment_config(request, name)
    plan = attachment.plan(replace(config, overwrite=request.overwrite and remember))
    reasons = [f"text: {why}" for why in plan.text_reasons] + [f"vision: {why}" for why in plan.vision_reasons]
    result, step = _step("attach", reasons, lambda: attachment.run(plan, progress), progress)
    if remember:
        asked = {"asked_text": config.text or "none", "asked_vision": config.vision or "none", "grid": request.grid}
        runtime.once(lambda: Workspace(request.workspace).set_current(f"attachments/{name}", asked))
    return result, _with(step, {"text": result.text, "vision": result.vision})


def pack(request: PackRequest, progress: Progress | None = None) -> tuple[packing.Result, list[Step]]:
    """Select, attach and pack: whatever is missing or stale, and nothing else."""
    progress = progress or Silent()
    steps = []
    if request.ratio is None and request.per_class is None:
        if request.method is not None or request.interval is not None:
            raise UsageError("--method and --interval need a budget", hint="add --ratio R or --per-class N")
        name = current_selection(request.workspace)
    else:
        config = SelectionConfig(
            workspace=request.workspace,
            method=request.method or "interval",
            ratio=request.ratio,
            per_class=request.per_class,
            interval=request.interval,
            seed=request.seed,
        )
        chosen, step = select(config, progress)
        name = chosen.name
        steps.append(step)
    attached, step = attach(request, name, progress, remember=False)
    steps.append(step)
    plan = packing.plan(packing_config(request, name, attached))
    result, step = _step("pack", plan.reasons, lambda: packing.run(plan, progress), progress)
    return result, [*steps, _with(step, {"out": str(result.path), "content_id": result.content_id})]


def packing_config(request: PackRequest, name: str, attached: attachment.Result) -> packing.PackingConfig:
    """The stage's config once selection and attachments are known."""
    return packing.PackingConfig(
        workspace=request.workspace,
        out=request.out,
        selection=name,
        text=attached.text,
        vision=attached.vision,
        tokens=request.tokens,
        container=request.container,
        shards=request.shards,
        licence=request.licence,
        source_terms=request.source_terms,
        seed=request.seed,
        device=request.device,
        gpus=request.gpus,
        threads=request.threads,
        overwrite=request.overwrite,
    )


def _step(stage: str, reasons: list[str], action: Callable[[], T], progress: Progress) -> tuple[T, Step]:
    progress.say(f"{stage}: running ({'; '.join(reasons)})" if reasons else f"{stage}: up to date")
    start = time.perf_counter()
    result = action()
    return result, Step(stage, bool(reasons), reasons, round(time.perf_counter() - start, 2), {})


def _with(step: Step, facts: dict[str, Any]) -> Step:
    return Step(step.stage, step.ran, step.reasons, step.seconds, facts)
