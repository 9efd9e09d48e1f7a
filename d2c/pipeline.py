"""What a command needs before it can do its own work: the choices nobody named, and the stages that are missing.

The choices depend on the data alone, never on what the network happens to reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from d2c import attachment, packing, picks, scoring, selection, training
from d2c.batches import probe
from d2c.errors import UsageError
from d2c.progress import Progress, Silent
from d2c.recipe import recipe, without_attachments
from d2c.selection import Method, SelectionConfig
from d2c.sources import Source, open_source
from d2c.workspace import Workspace
from formats.hashing import xxh3_json

PAPER_SCORER = "facebook/DiT-XL-2-256"
"""The paper's scorer, as diffusers publishes it."""
TRAIN_SCORER = "train"
SMALL = 64
"""Images up to this side (pixels) are modelled as they are; larger ones through the VAE at 256 px."""
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
    container: Literal["tar", "parquet"] = "tar"
    shards: int | None = None
    licence: str = ""
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


def choose_codec(source: Source, codec: str | None, size: int | None) -> tuple[str, int]:
    """The latent codec and image side for a source: small images as they are, larger ones through the VAE at 256."""
    if codec is not None and size is not None:
        return codec, size
    seen = probe(source)
    native = max(4, seen.median_side - seen.median_side % 4)
    if codec is None:
        codec = "rgb" if (size or seen.max_side) <= SMALL else "vae"
    return codec, size or (min(native, SMALL) if codec == "rgb" else 256)


def choose_scorer(source: Source, scorer: str | None, codec: str) -> str:
    """The scorer nobody named: the paper's for ImageNet-1k at full size, else one trained on the source itself."""
    if scorer is not None:
        return scorer
    return PAPER_SCORER if source.imagenet_ids is not None and codec != "rgb" else TRAIN_SCORER


def choose_scorer_model(codec: str, size: int) -> str:
    """A small model for a scorer: S/2 on the VAE's latents; tiny on pixels, with at most 256 tokens up to 128 px."""
    if codec != "rgb":
        return "sit-s/2"
    # 2 up to 16 px and 4 up to 64 px: a CPU then scores 50,000 images in minutes.
    return f"sit-tiny/{2 if size <= 16 else 4 if size <= 64 else 8}"


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
        run, step = _train_scorer(request, source, codec, size, progress)
        chosen = str(run)
        steps.append(step)
    plan = scoring.plan(scoring_config(request, codec, size, chosen), source)
    result, step = _step("score", plan.reasons, lambda: scoring.run(plan, progress), progress)
    facts = {"images": result.record.summary["images"], "bad_files": result.record.summary["bad_files"]}
    return result, [*steps, _with(step, facts)]


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


def _train_scorer(
    request: ScoreRequest, source: Source, codec: str, size: int, progress: Progress
) -> tuple[Path, Step]:
    """Pack the source without attachments and train a small model on it, in one process."""
    model = request.scorer_model or choose_scorer_model(codec, size)
    small = codec == "rgb"
    numbers = recipe("small" if small else "sit", steps=request.scorer_steps or (2_000 if small else 20_000))
    plain = without_attachments(numbers)
    asked = {"model": model, "recipe": repr(plain), "codec": codec, "size": size, "seed": request.seed}
    folder = Workspace(request.workspace).scorer / xxh3_json({**asked, "source": source.digest})[:8]
    pack_config = packing.PackingConfig(
        workspace=request.workspace,
        out=folder / "shards",
        selection="all",
        container="parquet",
        seed=request.seed,
        device=request.device,
        gpus=1,
        threads=request.threads,
    )
    everything = picks.everything(source, limit=SCORER_IMAGES, seed=request.seed)
    plan = packing.plan_source(pack_config, source, everything, codec, size)
    why = "" if request.scorer else f"no scorer was named and {source.path.name} is not ImageNet-1k: "
    progress.say(f"{why}training {model} on {len(everything):,} of its images for {plain.steps:,} steps")
    _step("pack for the scorer", plan.reasons, lambda: packing.run(plan, progress), progress)
    # One process, whatever --gpus says: a sum over ranks would round differently and change every score.
    config = training.TrainingConfig(
        artifact=folder / "shards",
        out=folder / "run",
        model=model,
        recipe=plain,
        precision=request.precision,
        seed=request.seed,
        device=request.device,
        gpus=1,
    )
    train = training.plan(config)
    reasons = [] if train.done else ["not trained yet"]
    result, step = _step("train the scorer", reasons, lambda: training.run(train, progress), progress)
    return folder / "run", _with(step, {"model": model, "steps": result.steps, "images": len(everything)})


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
    latent = int(scores.summary["codec"]["size"])
    grid = (
        request.grid or before.get("grid") or (scores.summary["scorer"]["grid"] if vision == "scorer" else latent // 2)
    )
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


def attach(request: PackRequest, name: str, progress: Progress | None = None) -> tuple[attachment.Result, Step]:
    """Attach to the named selection what is not attached yet."""
    progress = progress or Silent()
    plan = attachment.plan(attachment_config(request, name))
    reasons = [f"text: {why}" for why in plan.text_reasons] + [f"vision: {why}" for why in plan.vision_reasons]
    result, step = _step("attach", reasons, lambda: attachment.run(plan, progress), progress)
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
    attached, step = attach(request, name, progress)
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
        container=request.container,
        shards=request.shards,
        licence=request.licence,
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
