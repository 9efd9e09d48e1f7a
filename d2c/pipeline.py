"""What a command needs before it can do its own work: the stages that are missing or stale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from d2c import attachment, confidence, embedding, overview, packing, runtime, selection
from d2c.choices import SMALL
from d2c.confidence import ConfidenceConfig
from d2c.embedding import EmbeddingConfig
from d2c.errors import UsageError
from d2c.labelling import OWN, images_there
from d2c.progress import Progress, Silent
from d2c.selection import SelectionConfig
from d2c.selectors import METHODS
from d2c.selectors.ot import Weights
from d2c.steps import Step, run_step
from d2c.text import Synonyms
from d2c.tokens import TokenCodec
from d2c.workspace import Workspace
from formats.schema import Container, View


@dataclass(frozen=True, kw_only=True)
class SelectRequest:
    """What a user asks of `select`. Several budgets of one kind make selections that lie inside each other."""

    workspace: Path
    method: str = "interval"
    ratio: tuple[float, ...] = ()
    per_class: tuple[int, ...] = ()
    total: tuple[int, ...] = ()
    balance: str = "equal"
    spread: bool = False
    interval: int | None = None
    easiest: float | None = None
    score: str = "score"
    features: str | None = None
    """Encoder, or a Parquet of features; None takes the scorer where the method looks at images."""
    confidence: float = Weights().confusion
    """Weight of a classifier's cross-entropies, for `ot`."""
    seed: int = 0
    device: str = "auto"
    gpus: int = 1
    threads: int = 4
    overwrite: bool = False

    @property
    def encoder(self) -> str | None:
        """What the features come from; None where none are needed."""
        return self.features or ("scorer" if self.method in METHODS and METHODS[self.method].features else None)

    @property
    def embedding(self) -> EmbeddingConfig | None:
        """The stage that computes the features."""
        return None if self.encoder is None else self.embedding_by(self.encoder)

    def embedding_by(self, encoder: str) -> EmbeddingConfig:
        """The stage that computes features by ``encoder``, on the devices of this request."""
        return EmbeddingConfig(
            workspace=self.workspace, encoder=encoder, device=self.device, gpus=self.gpus, threads=self.threads
        )

    def configs(self, features: str | None) -> list[SelectionConfig]:
        """One config a budget, ascending; ``features`` is the folder of the computed ones."""
        given = {"ratio": self.ratio, "per_class": self.per_class, "total": self.total}
        kinds = [(kind, sorted(set(budgets))) for kind, budgets in given.items() if budgets]
        if len(kinds) != 1:
            raise UsageError(
                "a selection needs one kind of budget",
                found=" and ".join(kind for kind, _ in kinds) or "none",
                expected="--ratio R, --per-class N or --total N",
            )
        kind, budgets = kinds[0]
        return [
            SelectionConfig(
                workspace=self.workspace,
                method=self.method,
                inside=tuple(budgets[:place]),
                balance=self.balance,
                spread=self.spread,
                interval=self.interval,
                easiest=self.easiest,
                score=self.score,
                features=features,
                confidence=self.confidence,
                seed=self.seed,
                gpus=self.gpus,
                overwrite=self.overwrite,
                **dict[str, Any]({kind: budget}),
            )
            for place, budget in enumerate(budgets)
        ]


@dataclass(frozen=True, kw_only=True)
class PackRequest:
    """What a user asks of `pack`; None leaves the choice to what was selected or attached last, or to the data."""

    workspace: Path
    out: Path
    selected: str | None = None
    """A finished selection by name, instead of a budget."""
    method: str | None = None
    ratio: float | None = None
    per_class: int | None = None
    interval: int | None = None
    features: str | None = None
    text: str | None = None
    prompt: str | None = None
    synonyms: Synonyms | None = None
    vision: str | None = None
    grid: int | None = None
    views: tuple[View, ...] | None = None
    tokens: TokenCodec = "int8"
    container: Container = "tar"
    shards: int | None = None
    licence: str = ""
    source_terms: str = ""
    seed: int | None = None
    device: str = "auto"
    gpus: int = 1
    threads: int = 4
    overwrite: bool = False

    @property
    def finished(self) -> str | None:
        """The finished selection that is to be packed; None where a budget asks for one.

        Raises:
            UsageError: options that contradict each other, or nothing is selected yet.
        """
        if self.ratio is None and self.per_class is None:
            if self.method is not None or self.interval is not None:
                raise UsageError("--method and --interval need a budget", hint="add --ratio R or --per-class N")
            return self.selected or current_selection(self.workspace)
        if self.selected is not None:
            raise UsageError("--selection and a budget", found=self.selected, hint="leave one of them out")
        return None

    @property
    def wanted(self) -> SelectRequest:
        """The selection that a budget asks for."""
        return SelectRequest(
            workspace=self.workspace,
            method=self.method or "interval",
            ratio=() if self.ratio is None else (self.ratio,),
            per_class=() if self.per_class is None else (self.per_class,),
            interval=self.interval,
            features=self.features,
            seed=self.seed or 0,
            device=self.device,
            gpus=self.gpus,
            threads=self.threads,
        )


def select(
    request: SelectRequest, progress: Progress | None = None
) -> tuple[list[tuple[selection.Plan, selection.Selection]], list[Step]]:
    """Compute the features that the method needs, then select, whatever of it is not there yet."""
    progress, steps, features = progress or Silent(), list[Step](), None
    # Refuses what cannot be meant before images are read.
    for config in request.configs(None):
        selection.check(config)
    if request.embedding is not None:
        embed = embedding.plan(request.embedding)
        found, step = run_step("embed", embed.reasons, lambda: embedding.run(embed, progress), progress)
        features = found.name
        steps.append(step.telling({"features": features, "images": embed.images}))
    configs, results = request.configs(features), []
    if features is not None and configs[0].needs_confidence:
        judge = confidence.plan(ConfidenceConfig(workspace=request.workspace, features=features))
        record, step = run_step("classify", judge.reasons, lambda: confidence.run(judge, progress), progress)
        steps.append(step.telling({"accuracy": record.summary["accuracy"], "chance": record.summary["chance"]}))
    for config in configs:
        plan = selection.plan(config)
        result, step = run_step("select", plan.reasons, partial(selection.run, plan, progress), progress)
        steps.append(step.telling({"selection": config.name, "images": result.table.num_rows}))
        results.append((plan, result))
    return results, steps


def report(
    request: SelectRequest, names: Sequence[str], out: Path, progress: Progress | None = None
) -> tuple[overview.Result, list[Step]]:
    """A page about the last of the selections ``names``, which the others lie inside.

    It measures in the features that the selection was made with, else in the scorer's, which are computed first.

    Raises:
        UsageError: several ranks ask for it.
    """
    progress, steps = progress or Silent(), list[Step]()
    if runtime.ranks().world > 1:
        raise UsageError(
            "a report is written by one process",
            found=f"{runtime.ranks().world} ranks",
            hint="run the same command once more without torchrun: what is selected is kept",
        )
    record = Workspace(request.workspace).selection(names[-1]).require("d2c select --ratio R")
    features = record.config.get("features")
    if features is None:
        embed = embedding.plan(request.embedding_by("scorer"))
        found, step = run_step("embed", embed.reasons, lambda: embedding.run(embed, progress), progress)
        features = found.name
        steps.append(step.telling({"features": features, "images": embed.images}))
    plan = overview.plan(
        overview.OverviewConfig(
            workspace=request.workspace,
            selection=names[-1],
            out=out,
            features=features,
            inside=tuple(names[:-1]),
            seed=request.seed,
            device=request.device,
            threads=request.threads,
        )
    )
    result, step = run_step("report", ["asked for"], partial(overview.run, plan, progress), progress)
    return result, [*steps, step.telling({"report": str(out)})]


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

    Small images (codec ``rgb``) get the encoders that need no download; others the paper's, T5 and DINOv2. Classes that
    are no more than numbers, because the images have no labels of their own, get no text.
    """
    workspace = Workspace(request.workspace)
    scores = workspace.scores.require("d2c score DIR")
    before = workspace.current(f"attachments/{name}") or {}
    small = scores.config["codec"] == "rgb"
    named = scores.summary["source"].get("labels", OWN) == OWN
    usual = ("hashed" if small else "t5") if named else "none"
    text = request.text or before.get("asked_text") or usual
    vision = request.vision or before.get("asked_vision") or ("scorer" if small else "dinov2")
    grid = request.grid or before.get("grid") or usual_grid(workspace)
    seed = before.get("seed", 0) if request.seed is None else request.seed
    return attachment.AttachmentConfig(
        workspace=request.workspace,
        selection=name,
        text=None if text == "none" else text,
        # An empty prompt is a mistake to be told of, not a wish for the usual one.
        template=before.get("prompt", attachment.TEXT_TEMPLATE) if request.prompt is None else request.prompt,
        synonyms=request.synonyms or before.get("synonyms") or "first",
        vision=None if vision == "none" else vision,
        grid=grid,
        views=request.views or tuple(before.get("views") or ("orig",)),
        seed=seed,
        device=request.device,
        gpus=request.gpus,
        threads=request.threads,
    )


def usual_grid(workspace: Workspace) -> int:
    """Side of the token grid that nobody named: a /2 model's, so that the published sizes train on it.

    Huge grids of pixels keep the scorer's own.
    """
    summary = workspace.scores.require("d2c score DIR").summary
    latent = int(summary["codec"]["size"])
    return latent // 2 if latent <= SMALL else int(summary["scorer"]["grid"])


def attach(
    request: PackRequest, name: str, progress: Progress | None = None, *, remember: bool = True
) -> tuple[attachment.Result, Step]:
    """Attach to the named selection what is not attached yet; ``remember`` the choices for later `pack`s."""
    progress = progress or Silent()
    config = attachment_config(request, name)
    plan = attachment.plan(replace(config, overwrite=request.overwrite and remember))
    reasons = [f"text: {why}" for why in plan.text_reasons] + [f"vision: {why}" for why in plan.vision_reasons]
    result, step = run_step("attach", reasons, lambda: attachment.run(plan, progress), progress)
    if remember:
        asked = {
            "asked_text": config.text or "none",
            "asked_vision": config.vision or "none",
            "grid": request.grid,
            "views": config.views,
            "seed": config.seed,
            "prompt": config.template,
            "synonyms": request.synonyms,
        }
        runtime.once(lambda: Workspace(request.workspace).set_current(f"attachments/{name}", asked))
    return result, step.telling({"text": result.text, "vision": result.vision})


def pack(request: PackRequest, progress: Progress | None = None) -> tuple[packing.Result, list[Step]]:
    """Select, attach and pack: whatever is missing or stale, and nothing else."""
    progress = progress or Silent()
    steps: list[Step] = []
    name = request.finished
    if name is None:
        made, steps = select(request.wanted, progress)
        name = made[-1][1].name
    attached, step = attach(request, name, progress, remember=False)
    steps.append(step)
    plan = packing.plan(packing_config(request, name, attached))
    with images_there(Workspace(request.workspace)):
        result, step = run_step("pack", plan.reasons, lambda: packing.run(plan, progress), progress)
    return result, [*steps, step.telling({"out": str(result.path), "content_id": result.content_id})]


def packing_config(request: PackRequest, name: str, attached: attachment.Result) -> packing.PackingConfig:
    """The stage's config once selection and attachments are known."""
    return packing.PackingConfig(
        workspace=request.workspace,
        out=request.out,
        selection=name,
        text=attached.text,
        vision=attached.vision,
        views=attached.views,
        tokens=request.tokens,
        container=request.container,
        shards=request.shards,
        licence=request.licence,
        source_terms=request.source_terms,
        seed=request.seed or 0,
        device=request.device,
        gpus=request.gpus,
        threads=request.threads,
        overwrite=request.overwrite,
    )
