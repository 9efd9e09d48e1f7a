"""Train a SiT or DiT straight from the shards: ``loss = denoising + lambda * alignment`` (paper, section 3.4).

Batches, times, noise and dropped conditions are pure functions of (seed, step), drawn for the whole batch and then
shared out, so that a resumed run repeats an undisturbed one and any number of ranks trains on the same draws.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d2c import checkpoint, runtime
from d2c.checkpoint import Parts
from d2c.config import execution
from d2c.ema import Ema
from d2c.errors import D2CError, UsageError
from d2c.latents import to_model
from d2c.loading import Loader
from d2c.progress import Progress, Silent
from d2c.recipe import Recipe
from d2c.runs import CHECKPOINTS, DONE, WEIGHTS, Run
from d2c.runtime import Ranks
from d2c.sit import ModelSpec, SiT, model_spec
from d2c.transport import Objective, alignment_loss, objective_for
from formats import open_artifact
from formats.files import read_json, remove_tree

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_FEW_TOKENS = 1024
"""Tokens of a batch below which a second CPU thread costs time (tiny/2: 37 ms a step on one thread, 63 on two)."""
_SMALLEST_SCALE = 2.0**-14
"""Of fp16's gradients: one that shrinks below this means that every step overflows."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What to train on what. ``recipe`` holds every number; ``out`` is the run's folder.

    Raises:
        UsageError: a number is not positive, or the precision is unknown.
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
    threads: int | None = None
    """CPU threads of each worker. The order of sums follows the threads, so bytes that must not depend on a machine's
    cores or on ``OMP_NUM_THREADS`` need a number here. None: all cores for one process, one thread for each of several.
    """
    device: str = execution("auto")
    gpus: int = execution(1)
    overwrite: bool = execution(False)

    def __post_init__(self) -> None:
        names = ("log_every", "checkpoint_every", "checkpoint_minutes", "threads", "gpus")
        numbers = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        for name, value in {**numbers, "steps": self.recipe.steps, "batch_size": self.recipe.batch_size}.items():
            if not value > 0:
                raise UsageError(f"{name} must be positive", found=value)
        if self.precision not in PRECISIONS:
            raise UsageError("unknown precision", found=self.precision, expected=", ".join(PRECISIONS))


@dataclass(frozen=True)
class Plan:
    """What `run` will do."""

    config: TrainingConfig
    spec: ModelSpec
    identity: dict[str, Any]
    samples: int
    done: bool
    token_column: str | None
    notes: list[str]

    @property
    def passes(self) -> float:
        """How often each image is seen."""
        return self.config.recipe.steps * self.config.recipe.batch_size / self.samples


@dataclass(frozen=True)
class Result:
    """A finished run."""

    path: Path
    steps: int
    loss: float
    passes_per_image: float
    seconds: float


def plan(config: TrainingConfig) -> Plan:
    """Open the artifact, fit the model to it, and compare with the run that ``out`` may hold.

    Raises:
        D2CError: the model's grid is not the stored tokens', or ``out`` holds another run.
    """
    artifact = open_artifact(config.artifact)
    if not artifact.shards:
        raise D2CError(
            "a recipe holds no arrays to train on",
            where=config.artifact,
            hint=f"make them from your own copy of the images: d2c rebuild {config.artifact} --source DIR",
        )
    recipe, encoders, latent = config.recipe, artifact.manifest["encoders"], artifact.manifest["latent"]
    notes = []
    if recipe.text and not encoders["text"]:
        notes.append("the artifact holds no text: training on class labels alone")
    if recipe.align and not encoders["vision"]:
        notes.append("the artifact holds no vision tokens: training without alignment")
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
        )
    spec = model_spec(
        config.model,
        latent["size"],
        latent["channels"],
        len(artifact.classes),
        text_dim=text["dim"] if text else None,
        align_dim=vision["dim"] if vision else None,
    )
    column = str(vision["column"]) if vision else None
    if vision and vision["grid"] != spec.grid:
        raise D2CError(
            "the model's tokens lie on another grid than the stored vision tokens",
            where=config.artifact,
            found=f"{spec.name}: {spec.grid} x {spec.grid}, stored: {vision['grid']} x {vision['grid']}",
            hint=f"use a /{latent['size'] // vision['grid']} model, or attach again with --grid {spec.grid}",
        )
    device = runtime.resolve_device(config.device)
    identity = {
        "content_id": artifact.content_id,
        "model": spec.name,
        "recipe": {**asdict(recipe), "betas": list(recipe.betas)},
        "precision": runtime.resolve_precision(config.precision, device),
        "seed": config.seed,
        "log_every": config.log_every,
        **({"threads": config.threads} if config.threads and device.type == "cpu" else {}),
    }
    earlier = Run(config.out)
    replaced = config.overwrite and earlier.exists()
    done = not replaced and earlier.matches(identity) and earlier.finished_steps() == recipe.steps
    return Plan(config, spec, identity, len(artifact), done, column, notes)


def run(plan: Plan, progress: Progress | None = None) -> Result:
    """Train to the recipe's last step, from the newest checkpoint where there is one."""
    progress = progress or Silent()
    config, here = plan.config, Run(plan.config.out)
    for note in plan.notes:
        progress.warn(note)
    if plan.done:
        runtime.once(lambda: here.moved_artifact(config.artifact))
    else:
        lock = runtime.once(here.lock)
        try:
            runtime.once(lambda: _open_run(plan))
            device = runtime.resolve_device(config.device)
            runtime.launch(_train, (plan, progress), workers=config.gpus, device=device)
        finally:
            if lock is not None:
                lock.release()
    done = read_json(config.out / DONE)
    return Result(
        path=config.out,
        steps=done["step"],
        loss=done["loss"],
        passes_per_image=round(done["step"] * config.recipe.batch_size / plan.samples, 1),
        seconds=here.seconds(),
    )


def _open_run(plan: Plan) -> None:
    config, here = plan.config, Run(plan.config.out)
    if config.overwrite and here.exists():
        remove_tree(config.out)
    # Again, now that nobody else writes: another process may have trained since the plan was made.
    here.matches(plan.identity)
    here.open(plan.identity, plan.spec.to_dict(), open_artifact(config.artifact), text=plan.spec.text_dim is not None)


@dataclass
class _Trainer:
    """Everything that one rank holds while it trains."""

    plan: Plan
    parts: Parts
    wrapped: nn.Module
    objective: Objective
    loader: Loader
    device: torch.device
    ranks: Ranks

    @staticmethod
    def build(plan: Plan, ranks: Ranks) -> _Trainer:
        config, recipe = plan.config, plan.config.recipe
        device = runtime.resolve_device(config.device)
        artifact = open_artifact(config.artifact)
        # Weights are drawn on the CPU, so that they do not depend on the device.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(runtime.seed_of("init", config.seed))
            model = SiT(plan.spec)
        model = model.to(device)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=recipe.lr,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        wrapped: nn.Module = model
        if ranks.world > 1:
            ids = [device.index] if device.type == "cuda" else None
            wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        loader = Loader(
            artifact,
            batch_size=recipe.batch_size,
            seed=config.seed,
            device=device,
            token_column=plan.token_column,
            text=plan.spec.text_dim is not None,
            flip=recipe.flip,
            rank=ranks.rank,
            world=ranks.world,
        )
        # Small gradients vanish in fp16; for other precisions the scaler does nothing.
        scaler = torch.amp.GradScaler(device.type, enabled=plan.identity["precision"] == "fp16")
        parts = Parts(model, Ema(model, recipe.ema_decay), optimizer, scaler)
        return _Trainer(plan, parts, wrapped, objective_for(plan.spec.objective), loader, device, ranks)

    def losses(self, step: int) -> tuple[Tensor, Tensor]:
        """Denoising and alignment loss of this rank's part of the batch at ``step``, each a scalar."""
        plan, recipe = self.plan, self.plan.config.recipe
        batch = self.loader.batch(step)
        t, noise, posterior, null = self.loader.draws(step, self.objective, recipe.class_dropout)
        latents = to_model(batch.raw, self.loader.latent, posterior)
        z_t = self.objective.corrupt(latents, noise, t)
        with runtime.autocast(plan.identity["precision"], self.device):
            output = self.wrapped(
                z_t,
                self.objective.model_time(t),
                batch.labels,
                batch.text,
                batch.mask,
                null=null,
                return_tokens=batch.tokens is not None,
            )
        if batch.tokens is None:
            return self.objective.loss(output, latents, noise, t).mean(), torch.zeros((), device=self.device)
        prediction, projected = output
        denoising = self.objective.loss(prediction, latents, noise, t).mean()
        return denoising, recipe.align_weight * alignment_loss(projected, batch.tokens)

    def step(self, step: int) -> Tensor:
        """One optimizer step; returns [denoising, alignment, gradient norm] without waiting for the device."""
        denoising, alignment = self.losses(step)
        scaler, optimizer, model = self.parts.scaler, self.parts.optimizer, self.parts.model
        torch.autograd.backward(scaler.scale(denoising + alignment))
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), self.plan.config.recipe.clip_norm)
        if scaler.is_enabled():
            # The scaler skips a step that overflowed, and halves its scale: that is no divergence.
            norm = torch.nan_to_num(norm, nan=0.0, posinf=0.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        self.parts.ema.update(model)
        return torch.stack([denoising.detach(), alignment.detach(), norm.detach()])


def _train(ranks: Ranks, job: tuple[Plan, Progress]) -> None:
    plan, progress = job
    with runtime.cpu_threads(runtime.resolve_device(plan.config.device), _threads(plan, ranks)):
        _loop(_Trainer.build(plan, ranks), progress if ranks.main else Silent())


def _loop(trainer: _Trainer, progress: Progress) -> None:
    config, ranks = trainer.plan.config, trainer.ranks
    run, last, facts = Run(config.out), config.recipe.steps, {"content_id": trainer.plan.identity["content_id"]}
    first = checkpoint.resume(run.path / CHECKPOINTS, trainer.parts)
    if ranks.main:
        run.forget_after(first)
    # A multiple of log_every, where the running means are empty: a resumed run logs what an undisturbed one does.
    every = -(-config.checkpoint_every // config.log_every) * config.log_every
    total, logged, started = torch.zeros(3, device=trainer.device), first, time.perf_counter()
    trainer.wrapped.train()
    with progress.bar("train", last, "step", done=first) as bar:
        for step in range(first, last):
            total += trainer.step(step)
            taken = step + 1
            if taken % config.log_every and taken != last:
                continue
            line = _means(trainer, taken, total / (taken - logged))
            if ranks.main:
                run.log(line)
            bar.advance(taken - logged, f"loss {line['loss']:.4f}")
            logged = taken
            total.zero_()
            due = taken % every == 0 or time.perf_counter() - started >= 60 * config.checkpoint_minutes
            if ranks.main and (taken == last or due):
                checkpoint.save(run.path / CHECKPOINTS, trainer.parts.state(taken, facts))
                run.spend((time.perf_counter() - started) * ranks.world, step=taken, device=trainer.device.type)
                started = time.perf_counter()
    if ranks.main:
        checkpoint.save_tensors(run.path / WEIGHTS, trainer.parts.ema.state_dict(), {"step": last})
        run.finish()


def _threads(plan: Plan, ranks: Ranks) -> int | None:
    """CPU threads of a worker: as asked for; one where processes share the cores, or a step is too small for more."""
    small = plan.config.recipe.batch_size * plan.spec.tokens < _FEW_TOKENS
    return plan.config.threads or (1 if ranks.world > 1 or small else None)


def _means(trainer: _Trainer, step: int, means: Tensor) -> dict[str, Any]:
    """The line for the log: mean losses since the last one, over all ranks."""
    if trainer.ranks.world > 1:
        dist.all_reduce(means)
        means = means / trainer.ranks.world
    denoising, alignment, norm = (round(float(value), 6) for value in means)
    if not math.isfinite(denoising + alignment + norm) or trainer.parts.scaler.get_scale() < _SMALLEST_SCALE:
        raise Run(trainer.plan.config.out).diverged(trainer.plan.identity, step)
    return {
        "step": step,
        "loss": round(denoising + alignment, 6),
        "denoising": denoising,
        "alignment": alignment,
        "grad_norm": norm,
    }
