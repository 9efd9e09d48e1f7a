"""What scoring needs first: a scorer where none is named, and a number of evaluations where a reliability is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch

from d2c import packing, picks, pilot, runtime, scoring, training
from d2c.choices import TRAIN_SCORER, choose_codec, choose_scorer, choose_scorer_model
from d2c.config import identity
from d2c.deduplication import Duplicates
from d2c.difficulty import Settings
from d2c.duplicates import Keep
from d2c.errors import UsageError
from d2c.labelling import OWN, clustering_due, open_labelled
from d2c.latents import open_codec
from d2c.progress import Progress, Silent
from d2c.recipe import Recipe, recipe, without_attachments
from d2c.runs import RUN, Run
from d2c.runtime import resolve_device, resolve_precision
from d2c.score_plan import LATE
from d2c.sit import model_spec
from d2c.sources import Source
from d2c.steps import Step, run_step
from d2c.throughput import pays
from d2c.workspace import Stage, Workspace
from formats import FormatError, open_artifact
from formats.files import read_json, write_json
from formats.hashing import xxh3_json

SAME = "same.json"
"""Names the scorer that was trained on the same images, when their files had other times."""
SCORER_IMAGES = 100_000
"""A scorer trained here sees at most this many images: the paper finds that a weak scorer costs little (Table 6)."""


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """What a user asks of `score`; None leaves the choice to the data."""

    source: str
    workspace: Path
    scorer: str | None = None
    objective: str | None = None
    class_map: Path | None = None
    codec: str | None = None
    size: int | None = None
    estimator: Literal["stratified", "paper"] = "stratified"
    evals: int = 8
    target_rank_corr: float | None = None
    """Chooses ``evals``: the fewest at which two scorings of a few images agree so well in rank."""
    scorer_model: str | None = None
    scorer_steps: int | None = None
    seed: int = 0
    precision: str = "auto"
    compile: bool = True
    batch_size: int = 64
    device: str = "auto"
    gpus: int = 1
    threads: int = 4
    share: tuple[int, int] | None = None
    labels: str = OWN
    duplicates: Duplicates = "report"
    keep: Keep = "first"
    held_out: str | None = None
    retry_bad: bool = False
    max_bad: float | None = None
    overwrite: bool = False


def score(request: ScoreRequest, progress: Progress | None = None) -> tuple[scoring.Result | scoring.Share, list[Step]]:
    """Train a scorer where none is named and the data asks for one, then score every image, or this task's share.

    Raises:
        UsageError: a share is asked for before there is a scorer.
    """
    progress = progress or Silent()
    workspace = Workspace(request.workspace)
    if request.share is not None and clustering_due(request.source, request.labels, workspace, request.seed):
        raise UsageError(
            "the tasks of a job array share their clusters, and there are none yet",
            hint="run the command once without --part until it scores",
        )
    source = open_labelled(
        request.source,
        request.labels,
        workspace,
        seed=request.seed,
        threads=request.threads,
        progress=progress,
    )
    for note in source.notes:
        progress.say(note)
    codec, size = choose_codec(source, request.codec, request.size)
    chosen = choose_scorer(source, request.scorer, codec)
    steps = []
    if chosen == TRAIN_SCORER and request.retry_bad and (kept := _kept_scorer(request, source, codec, size)):
        chosen = str(kept)
        progress.say(f"--retry-bad: the scorer stays {chosen}")
    if chosen == TRAIN_SCORER:
        if not (scorer := plan_scorer(request, source, codec, size)).done:
            runtime.once(lambda: _know_again(scorer, source, size, request.threads, progress))
            scorer = plan_scorer(request, source, codec, size)
        reasons = [] if scorer.done else [_why_train(request, source, scorer)]
        if reasons and request.share is not None:
            raise UsageError(
                "the tasks of a job array share one scorer, and there is none yet",
                hint="name one with --scorer, or run the command once without --part until it scores",
            )
        _, step = run_step(
            "train the scorer",
            reasons,
            lambda: scorer.done or runtime.once(lambda: _train_scorer(request, scorer, source, codec, size, progress)),
            progress,
        )
        chosen = str(scorer.run)
        facts = {"model": scorer.model, "steps": scorer.recipe.steps, "images": len(scorer.images)}
        steps.append(step.telling(facts))
    config = scoring_config(request, codec, size, chosen)
    if request.target_rank_corr is not None:
        config, step = _choose_evals(config, source, request.target_rank_corr, progress)
        steps.append(step)
    plan = scoring.plan(config, source)
    if request.share is not None:
        share, step = run_step("score", plan.reasons, lambda: scoring.run_share(plan, progress), progress)
        return share, [*steps, step.telling({"parts": share.total, "done": share.done})]
    result, step = run_step("score", plan.reasons, lambda: scoring.run(plan, progress), progress)
    facts = {"images": result.record.summary["images"], "bad_files": result.record.summary["bad_files"]}
    return result, [*steps, step.telling(facts)]


@dataclass(frozen=True)
class EvalsPlan:
    """The choice of the number of evaluations by ``asked["target"]``; without ``reasons`` it is made already."""

    settings: Settings
    stage: Stage
    asked: dict[str, Any]
    inputs: dict[str, str]
    reasons: list[str]

    @property
    def found(self) -> dict[str, Any]:
        """What was tried and chosen: the fields of `pilot.Pilot`."""
        return self.stage.require("d2c score DIR").summary


def plan_evals(config: scoring.ScoringConfig, source: Source, target: float) -> EvalsPlan:
    """Whether it is known how many evaluations the rank correlation ``target`` takes.

    Raises:
        UsageError: no rank correlation is ``target``.
    """
    if not 0 < target < 1:
        raise UsageError("a rank correlation to reach lies between 0 and 1", found=target, expected="such as 0.95")
    plan = scoring.plan(config, source)
    stage = Workspace(config.workspace).pilot
    asked = {name: value for name, value in identity(plan.config).items() if name not in ("evals", "part", *LATE)}
    asked["target"] = target
    inputs = {name: value for name, value in plan.inputs.items() if name not in LATE}
    return EvalsPlan(plan.config.settings, stage, asked, inputs, stage.stale(asked, inputs))


def _choose_evals(
    config: scoring.ScoringConfig, source: Source, target: float, progress: Progress
) -> tuple[scoring.ScoringConfig, Step]:
    """The config with as many evaluations as the wanted rank correlation takes; tried once, and remembered."""
    plan = plan_evals(config, source, target)
    stage = plan.stage
    if plan.reasons and config.share is not None:
        raise UsageError(
            "the tasks of a job array share one number of evaluations, and it is not chosen yet",
            hint="name one with --evals, or run the command once without --part until it scores",
        )

    def choose() -> None:
        with stage.locked():
            stage.begin(plan.asked, plan.inputs)
            with stage.spending():
                found = pilot.run(plan.settings, source, target, progress)
            write_json(stage.path / "pilot.json", asdict(found))
            stage.finish(["pilot.json"], asdict(found), device=resolve_device(config.device).type)

    _, step = run_step("choose the evaluations", plan.reasons, lambda: plan.reasons and runtime.once(choose), progress)
    facts = plan.found
    if not facts["reached"]:
        best = facts["tried"][-1]["rank_correlation"]
        progress.warn(
            f"{facts['evals']} evaluations reach a rank correlation of {best}, not {target}: more is not tried"
        )
    return replace(config, evals=facts["evals"]), step.telling({"evals": facts["evals"], "tried": facts["tried"]})


def _kept_scorer(request: ScoreRequest, source: Source, codec: str, size: int) -> Path | None:
    """The scorer of the finished scores, where it was trained here with the options that are asked for now.

    A mended file makes another source, of which another scorer would be trained, and all images scored again.
    """
    workspace = Workspace(request.workspace)
    record = workspace.scores.record()
    run = Path(workspace.recall(record.summary["scorer"]["spec"])) if record else workspace.scorer
    if not (run.name == "run" and run.parent.parent == workspace.scorer and (run / RUN).exists()):
        return None
    wanted = plan_scorer(request, source, codec, size)
    return run if run.parent in wanted.alike() else None


def _know_again(scorer: ScorerPlan, source: Source, size: int, threads: int, progress: Progress) -> None:
    """Let ``scorer`` be the one that was trained alike on a copy of these images, if there is one.

    The times of files make another source, of which another scorer would be trained, and all images scored again.
    """
    labels = dict(zip(scorer.images.keys, scorer.images.table["label"].to_pylist(), strict=True))
    for folder in scorer.alike():
        try:
            artifact = open_artifact(folder / "shards")
            infos = [artifact.info(i) for i in range(len(artifact))]
        except FormatError:
            continue  # removed or damaged since: nothing says what it was trained on
        trained = {info["source_key"]: info["source_xxh3"] for info in infos}
        if len(artifact.classes) != len(source.classes) or any(
            labels.get(info["source_key"]) != info["class_id"] for info in infos
        ):
            continue
        progress.say(f"looking whether these are the images that {folder} was trained on")
        # What could not be used was not trained on.
        table = pa.table({"key": list(labels), "xxh3": pa.array([trained.get(key) for key in labels], pa.string())})
        if picks.unchanged(source, table, size, threads=threads):
            write_json(scorer.folder / SAME, {"images_of": folder.name})
            progress.say("they are, under other file times: the scorer stays")
            return


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
        class_map=request.class_map,
        codec=codec,
        size=size,
        estimator=request.estimator,
        evals=request.evals,
        batch_size=request.batch_size,
        precision=request.precision,
        compile=request.compile,
        seed=request.seed,
        device=request.device,
        gpus=request.gpus,
        threads=request.threads,
        labels=request.labels,
        duplicates=request.duplicates,
        keep=request.keep,
        held_out=request.held_out,
        share=request.share,
        retry_bad=request.retry_bad,
        max_bad=request.max_bad,
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

    @property
    def reasons(self) -> list[str]:
        """Why it must be trained, as far as that is known before images are read."""
        if self.done:
            return []
        return ["source changed: trained anew unless its images are the same"] if self.alike() else ["not trained yet"]

    def alike(self) -> list[Path]:
        """Folders of scorers that were trained alike, on another source or on a copy of this one."""
        found = sorted(self.folder.parent.glob(f"{self.folder.name.partition('-')[0]}-*"))
        return [folder for folder in found if Run(folder / "run").finished_steps() >= self.recipe.steps]


def plan_scorer(request: ScoreRequest, source: Source, codec: str, size: int) -> ScorerPlan:
    """Which model, how long, and on which images; the folder's name follows from the options, then from the source."""
    small = codec == "rgb"
    model = request.scorer_model or choose_scorer_model(codec, size)
    numbers = recipe("small" if small else "sit", steps=request.scorer_steps or (2_000 if small else 20_000))
    # Images are scored as they are, and of some data the mirror image is something else.
    plain = replace(without_attachments(numbers), flip="none")
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
    }
    if not request.compile and pays(device, plain.steps * plain.batch_size):
        asked["compile"] = False  # where it would be compiled, its weights differ
    folder = Workspace(request.workspace).scorer / f"{xxh3_json(asked)[:8]}-{source.digest[:8]}"
    if (folder / SAME).exists():
        folder = folder.with_name(read_json(folder / SAME)["images_of"])
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
        compile=request.compile,
        seed=request.seed,
        threads=1,
        watch_every=scorer.recipe.steps,
        device=request.device,
    )
    training.run(training.plan(config), progress)
