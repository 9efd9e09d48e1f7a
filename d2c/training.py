"""Train a SiT or DiT straight from the shards, resumable to the bit: the loop around `d2c.trainer`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from d2c import checkpoint, runtime, sharding
from d2c.errors import InterruptedRunError
from d2c.log_writers import open_writers
from d2c.memorisation import Clock, since_lowest
from d2c.model_card import write_model_card
from d2c.progress import Progress, Silent
from d2c.runs import CHECKPOINTS, DONE, WEIGHTS, Run
from d2c.runtime import Ranks
from d2c.train_plan import Plan, TrainingConfig, multiple, plan
from d2c.trainer import Settings, Tally, Trainer
from d2c.transport import objective_for
from d2c.watching import Watch
from formats import Artifact, open_artifact
from formats.files import read_json, remove_tree

__all__ = ["Plan", "Result", "TrainingConfig", "plan", "run", "step_settings"]

_FEW_TOKENS = 1024
"""Tokens of a batch below which a second CPU thread costs time (tiny/2: 37 ms a step on one thread, 63 on two)."""
_SMALLEST_SCALE = 2.0**-14
"""Of fp16's gradients: one that shrinks below this means that every step overflows."""
_HEED = 5
"""Steps between which several ranks ask one another for signals: in host memory, so that no GPU runs out of work."""
_LOST = 10
"""Steps in a row without a finite gradient after which a run has diverged; a few are only skipped."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    path: Path
    steps: int
    loss: float
    passes_per_image: float
    seconds: float
    stopped: str
    """Why it ended before the recipe's last step; empty where it did not."""


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
        stopped=here.stopped(),
    )


def _open_run(plan: Plan) -> None:
    config, here = plan.config, Run(plan.config.out)
    if config.overwrite and here.exists():
        remove_tree(config.out)
    # Again, now that nobody else writes: another process may have trained since the plan was made.
    here.matches(plan.identity)
    here.open(plan.identity, plan.spec.to_dict(), open_artifact(config.artifact), text=plan.spec.text_dim is not None)


def step_settings(plan: Plan) -> Settings:
    """What `Trainer` needs of a plan."""
    config = plan.config
    return Settings(
        recipe=config.recipe,
        spec=plan.spec,
        token_column=plan.token_column,
        class_column=plan.class_column,
        precision=plan.identity["precision"],
        seed=config.seed,
        compile=plan.compile,
        micro_batch=config.micro_batch,
        shard=plan.sharding.on,
    )


def _train(ranks: Ranks, job: tuple[Plan, Progress]) -> None:
    plan, progress = job
    config, device = plan.config, runtime.resolve_device(plan.config.device)
    with runtime.cpu_threads(device, _threads(plan, ranks)):
        artifact = open_artifact(config.artifact)
        # Nodes may have GPUs of different sizes.
        settings = replace(step_settings(plan), shard=runtime.any_of(plan.sharding.on))
        # What may fail on the first rank alone comes before the model: the others are not in a sum with it yet.
        watch = runtime.once(lambda: _watch(plan, artifact, device, progress))
        try:
            trainer = Trainer.build(settings, artifact, device, ranks)
            _loop(plan, trainer, watch, progress if ranks.main else Silent())
        finally:
            if watch is not None:
                watch.close()


def _watch(plan: Plan, artifact: Artifact, device: torch.device, progress: Progress) -> Watch:
    config, run, objective = plan.config, Run(plan.config.out), objective_for(plan.spec.objective)
    common: dict[str, Any] = {"seed": config.seed, "device": device}
    clock = None
    if config.held_out is not None:
        text = plan.spec.text_dim is not None
        clock = Clock.open(artifact, config.held_out, objective, text=text, **common)
    writers = open_writers(config.log_to, run.path, plan.identity)
    common |= {"clock": clock, "writers": writers, "progress": progress}
    return Watch.open(run, artifact, plan.spec, objective, class_dropout=config.recipe.class_dropout, **common)


def _loop(plan: Plan, trainer: Trainer, watch: Watch | None, progress: Progress) -> None:
    config, ranks, parts = plan.config, trainer.ranks, trainer.parts
    run, last, batch = Run(config.out), config.recipe.steps, config.recipe.batch_size
    first, found = checkpoint.resume(run.path / CHECKPOINTS, parts)
    if ranks.main:
        run.forget_after(first)
    tally, taken = Tally.of(found.get("tally"), trainer.device, ranks), first
    # A kill may have come between the last look and the end that followed from it.
    stopped = _impatient(plan, ranks)
    clock = _SaveClock(config)
    trainer.wrapped.train()
    with (
        checkpoint.Saver(
            run.path / CHECKPOINTS, config.keep_checkpoints, config.keep_every, writes=ranks.main
        ) as saver,
        runtime.asked_to_stop() as asked,
        progress.bar("train", last, "step", done=first) as bar,
    ):
        begun = time.perf_counter()
        for taken in range(first + 1, first + 1 if stopped else last + 1):
            tally.add(trainer.step(taken - 1))
            # Several ranks must leave at the same step.
            leave = (ranks.world == 1 or taken % _HEED == 0) and runtime.any_of(asked())
            saves = False
            if taken % config.log_every == 0 or taken == last:
                count = tally.count
                line, saves = tally.line(taken, ranks, due=clock.due(taken))
                if _diverged(plan, tally, parts.scaler.get_scale()):
                    raise run.diverged(plan.identity, taken)
                if watch is not None:
                    run.log(line)
                    watch.line(line)
                speed = (taken - first) * batch / (time.perf_counter() - begun)
                passes = taken * batch / plan.samples
                bar.advance(count, f"loss {line['loss']}, {speed:,.0f} images/s, {passes:,.1f} passes")
                if taken % plan.watch_every == 0 or taken == last:
                    _look(trainer, watch, taken)
                    stopped = _impatient(plan, ranks)
            if leave or stopped or taken == last or saves:
                seconds = clock.restart()
                facts = {"content_id": plan.identity["content_id"], "tally": tally.to_dict()}
                _written(saver)
                saver.save(parts.state(taken, facts))
                if ranks.main:
                    run.spend(seconds * ranks.world, step=taken, device=trainer.device.type)
            if stopped:
                break
            if leave and taken != last:
                _written(saver)
                raise InterruptedRunError(
                    f"stopped at step {taken:,}; its state is saved", where=run.path, hint="run the same command again"
                )
    runtime.meet()  # the first rank has waited for its last state
    weights = sharding.host_copies(parts.ema.state_dict(), keep=ranks.main)
    if ranks.main:
        checkpoint.save_tensors(run.path / WEIGHTS, weights, {"step": taken})
        write_model_card(run, samples=plan.samples)
        run.finish(stopped)


def _look(trainer: Trainer, watch: Watch | None, step: int) -> None:
    # In a function of its own, after which nothing holds the averaged model.
    with trainer.averaged() as model:
        if watch is not None and model is not None:
            watch.look(step, model)


def _written(saver: checkpoint.Saver) -> None:
    # The others wait for the first rank's disk here, not in the sums of the next step; nor do they end before it.
    saver.wait()
    runtime.meet()


class _SaveClock:
    """When the state is due to be saved."""

    def __init__(self, config: TrainingConfig) -> None:
        # A multiple of log_every, where the running means are empty.
        self._every = multiple(config.checkpoint_every, config.log_every)
        self._seconds, self._started = 60 * config.checkpoint_minutes, time.perf_counter()

    def due(self, step: int) -> bool:
        return step % self._every == 0 or time.perf_counter() - self._started >= self._seconds

    def restart(self) -> float:
        """Seconds since the last time."""
        before, self._started = self._started, time.perf_counter()
        return self._started - before


def _impatient(plan: Plan, ranks: Ranks) -> str:
    """Why to stop here, on every rank alike; empty where there is no reason.

    The others wait here until the first rank has looked.
    """
    patience = plan.config.patience
    enough = ranks.main and patience is not None and since_lowest(Run(plan.config.out).readings()) >= patience
    if not runtime.any_of(enough):
        return ""
    return f"the loss of held-out images has not been lower for {patience} readings"


def _diverged(plan: Plan, tally: Tally, scale: float) -> bool:
    if plan.identity["precision"] == "fp16":
        return scale < _SMALLEST_SCALE
    return tally.lost >= _LOST


def _threads(plan: Plan, ranks: Ranks) -> int | None:
    """CPU threads of a worker: as asked for; one where processes share the cores, or a step is too small for more."""
    small = plan.config.recipe.batch_size * plan.spec.tokens < _FEW_TOKENS
    return plan.config.threads or (1 if ranks.world > 1 or small else None)
