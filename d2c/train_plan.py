"""What training is asked for, fitted to the artifact and compared with the run that may be there, before any step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from d2c import runtime, sharding
from d2c.config import execution
from d2c.errors import D2CError, UsageError
from d2c.loading import require_equal_shares
from d2c.log_writers import Log
from d2c.memorisation import has_clusters
from d2c.recipe import Recipe
from d2c.runs import Run
from d2c.sharding import Sharding
from d2c.sit import ModelSpec, model_spec
from d2c.sources import open_source
from d2c.throughput import pays
from formats import Artifact, open_artifact

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
INITIAL = 0.1
"""Share of the averaged weights that may still be those of the beginning."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What to train on what. ``recipe`` holds every number; ``out`` is the run's folder.

    Raises:
        UsageError: a number is not positive, or a word is unknown.
    """

    artifact: Path = execution()
    out: Path = execution()
    model: str
    recipe: Recipe
    precision: str = "auto"
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = execution(500)
    checkpoint_minutes: float = execution(15.0)
    """A slow run saves its state this often too, whenever it next writes to its log."""
    keep_checkpoints: int = execution(2)
    """The newest states that stay."""
    keep_every: int = execution(0)
    """States of steps that are multiples of this stay too; 0: none."""
    micro_batch: int | None = execution(None)
    """Images that a GPU computes at once; the gradients of several such pieces are added up. None: all of its part."""
    shard: str = execution("auto")
    """``yes``: cut weights, gradients, moments and averages up among the GPUs; ``auto``: where these do not fit."""
    compile: bool = True
    """On a GPU, and where there is enough to do, compile the model first."""
    held_out: str | None = execution(None)
    """Images that are not trained on, such as the scored source: the memorisation clock reads their loss."""
    watch_every: int | None = execution(None)
    """Steps between looks: samples, curves, the clock. None: ten times in a run."""
    patience: int | None = None
    """Stop once so many readings of the clock have brought no new lowest held-out loss."""
    log_to: tuple[str, ...] = execution(())
    threads: int | None = None
    """CPU threads of each worker. The order of sums follows the threads, so bytes that must not depend on a machine's
    cores or on ``OMP_NUM_THREADS`` need a number here. None: all cores for one process, one thread for each of several.
    """
    device: str = execution("auto")
    gpus: int = execution(1)
    overwrite: bool = execution(False)

    def __post_init__(self) -> None:
        names = ("log_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "micro_batch",
                 "watch_every", "patience", "threads", "gpus")  # fmt: skip
        numbers = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        for name, value in {**numbers, "steps": self.recipe.steps, "batch_size": self.recipe.batch_size}.items():
            if not value > 0:
                raise UsageError(f"{name} must be positive", found=value)
        if self.precision not in PRECISIONS:
            raise UsageError("unknown precision", found=self.precision, expected=", ".join(PRECISIONS))
        if self.shard not in sharding.CHOICES:
            raise UsageError("shard cannot be this", found=self.shard, expected=", ".join(sharding.CHOICES))
        if strange := [name for name in self.log_to if name not in get_args(Log)]:
            raise UsageError("nobody writes logs of this kind", found=strange[0], expected=", ".join(get_args(Log)))
        if self.patience is not None and self.held_out is None:
            raise UsageError("patience waits for the loss of held-out images", hint="name some: --held-out SOURCE")


@dataclass(frozen=True)
class Plan:
    """What `run` will do."""

    config: TrainingConfig
    spec: ModelSpec
    identity: dict[str, Any]
    samples: int
    done: bool
    token_column: str | None
    class_column: str | None
    notes: list[str]
    sharding: Sharding

    @property
    def compile(self) -> bool:
        """Whether the model is compiled first."""
        return bool(self.identity.get("compile"))

    @property
    def watch_every(self) -> int:
        """Steps between looks: whenever a line is written next."""
        steps = self.config.watch_every or -(-self.config.recipe.steps // 10)
        return multiple(steps, self.config.log_every)

    @property
    def passes(self) -> float:
        """How often each image is seen."""
        return self.config.recipe.steps * self.config.recipe.batch_size / self.samples


def plan(config: TrainingConfig) -> Plan:
    """Open the artifact, fit the model to it, and compare with the run that ``out`` may hold.

    Raises:
        D2CError: the model's grid is not the stored tokens', or ``out`` holds another run.
        UsageError: one process is to share the training state, or the ranks cannot share the batch equally.
    """
    artifact = open_artifact(config.artifact)
    if not artifact.shards:
        raise D2CError(
            "a recipe holds no arrays to train on",
            where=config.artifact,
            hint=f"make them from your own copy of the images: d2c rebuild {config.artifact} --source DIR",
        )
    recipe, encoders, latent = config.recipe, artifact.manifest["encoders"], artifact.manifest["latent"]
    notes = _notes(recipe, artifact)
    if recipe.flip == "stored" and "hflip" not in artifact.manifest["container"]["views"]:
        raise D2CError(
            "the artifact holds no mirror images",
            where=config.artifact,
            found=f"views {', '.join(artifact.manifest['container']['views'])}",
            expected="views orig, hflip",
            hint="pack it again with --views orig,hflip, or mirror latents and tokens together: --set flip=grid",
        )
    text = encoders["text"] if recipe.text else None
    vision = encoders["vision"] if recipe.align else None
    family = "dit" if recipe.objective == "eps" else "sit"
    if config.model.split("-")[0].lower() != family:
        raise UsageError(
            "the recipe trains another objective than the model's",
            found=f"--model {config.model} --recipe {recipe.name}",
            expected=f"a {family}-... model",
            hint="--recipe dit for a DiT, or any recipe with --set objective=eps (DiT) or objective=velocity (SiT)",
        )
    spec = model_spec(
        config.model,
        latent["size"],
        latent["channels"],
        len(artifact.classes),
        text_dim=text["dim"] if text else None,
        align_dim=vision["dim"] if vision else None,
        align_depth=recipe.align_depth,
        projector=recipe.projector,
        qk_norm=recipe.qk_norm,
        class_dim=vision["dim"] if vision and recipe.class_token else None,
    )
    column = str(vision["column"]) if vision else None
    class_column = f"{column}_cls" if spec.class_dim is not None else None
    if recipe.class_token and class_column not in [known.name for known in artifact.columns]:
        raise D2CError(
            "the artifact holds no class tokens",
            where=config.artifact,
            found=f"vision tokens of {vision['name']}" if vision else "no vision tokens",
            hint="attach an encoder that has one, such as --vision dinov2, or leave class_token=0",
        )
    if recipe.class_token and config.held_out is not None:
        raise UsageError(
            "held-out images have no class token, which this recipe denoises too", hint="leave --held-out out"
        )
    if config.held_out is not None and has_clusters(artifact):
        if not recipe.class_dropout:
            raise UsageError(
                "held-out images are in none of the artifact's clusters, and this recipe trains no model without them",
                found="class_dropout=0",
                hint="leave --held-out out, or --set class_dropout=0.1",
            )
        notes.append("the artifact's classes are clusters: the memorisation clock asks the model without them")
    if vision and vision["grid"] != spec.grid:
        raise D2CError(
            "the model's tokens lie on another grid than the stored vision tokens",
            where=config.artifact,
            found=f"{spec.name}: {spec.grid} x {spec.grid}, stored: {vision['grid']} x {vision['grid']}",
            hint=f"use a /{latent['size'] // vision['grid']} model, or attach again with --grid {spec.grid}",
        )
    device = runtime.resolve_device(config.device)
    earlier = Run(config.out)
    replaced = config.overwrite and earlier.exists()
    # More steps continue a run as it began: whether compiling pays is asked of a new one alone.
    pay = pays(device, recipe.steps * recipe.batch_size) if replaced or not earlier.begun() else earlier.compiled()
    identity = {
        "content_id": artifact.content_id,
        "model": spec.name,
        "recipe": {**asdict(recipe), "betas": list(recipe.betas)},
        "precision": runtime.resolve_precision(config.precision, device),
        "seed": config.seed,
        "log_every": config.log_every,
        **({"threads": config.threads} if config.threads and device.type == "cpu" else {}),
        **({"compile": True} if config.compile and pay else {}),
    }
    if config.patience is not None:
        # When it stops follows from these.
        asked = {"patience": config.patience, "watch_every": config.watch_every}
        identity |= {**asked, "held_out": open_source(str(config.held_out), labels="none").digest}
    there = not replaced and earlier.matches(identity)
    done = there and (earlier.finished_steps() == recipe.steps or bool(earlier.stopped()))
    world = runtime.ranks().world
    world = world if world > 1 else config.gpus
    if not done:
        require_equal_shares(recipe.batch_size, world)
    shared = sharding.decide(config.shard, spec, device, world)
    return Plan(config, spec, identity, len(artifact), done, column, class_column, notes, shared)


def _notes(recipe: Recipe, artifact: Artifact) -> list[str]:
    encoders = artifact.manifest["encoders"]
    empty = sum(not row.count for row in artifact.classes)
    notes = [f"{empty:,} of {len(artifact.classes):,} classes have no image to learn from"] if empty else []
    if recipe.text and not encoders["text"]:
        notes.append("the artifact holds no text: training on class labels alone")
    if recipe.align and not encoders["vision"]:
        notes.append("the artifact holds no vision tokens: training without alignment")
    if not recipe.class_dropout:
        notes.append("class_dropout=0: the model never learns to draw without a class, so samples are not guided")
    left = recipe.ema_decay**recipe.steps
    if left > INITIAL:
        # As much is left of the beginning as in the paper, e^-4; one digit of the complement says it.
        better = max(0.0, 1 - float(f"{4 / recipe.steps:.1g}"))
        notes.append(
            f"after {recipe.steps:,} steps {left:.0%} of the averaged weights, which are what is sampled, are still "
            f"those of the beginning (ema_decay {recipe.ema_decay:g}): train for more steps, or d2c train with --set "
            f"ema_decay={better:.10g}, which leaves {better**recipe.steps:.0%}"
        )
    return notes


def multiple(count: int, of: int) -> int:
    """``count`` rounded up to a multiple of ``of``."""
    return -(-count // of) * of
