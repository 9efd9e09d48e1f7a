"""``d2c train``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

from d2c_cli import options, plans, train_options
from d2c_cli.output import Output
from d2c_cli.paths import existing, quoted

EXAMPLES = (
    "d2c train shards/ --model sit-xl/2 --gpus 8",
    "d2c train shards/ --model sit-tiny/2 --recipe small --steps 2k --device cpu",
)


def train(
    ctx: typer.Context,
    artifact: options.Artifact,
    model: train_options.Model,
    recipe: train_options.Recipe = "d2c",
    steps: train_options.Steps = None,
    batch_size: train_options.TrainBatch = None,
    set: train_options.Set = None,  # noqa: A002 (its name on the command line)
    micro_batch: train_options.MicroBatch = None,
    shard: train_options.Shard = "auto",
    held_out: train_options.TrainHeldOut = None,
    patience: train_options.Patience = None,
    watch_every: train_options.WatchEvery = None,
    checkpoint_every: train_options.CheckpointEvery = 500,
    keep_checkpoints: train_options.KeepCheckpoints = 2,
    keep_every: train_options.KeepEvery = 0,
    log_to: train_options.LogTo = None,
    precision: options.Precision = "auto",
    no_compile: options.NoCompile = False,
    out: train_options.RunOut = None,
    device: options.Device = "auto",
    gpus: options.Gpus = 1,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Train a SiT or DiT straight from the shards.

    In: an artifact (the folder that `d2c pack` wrote), a model and a recipe. Out: a run folder with the averaged
    weights (ema.safetensors), the loss log (stats.jsonl), curves.png, samples to look at, and checkpoints.

    An interrupted run goes on from its last checkpoint; more --steps than before continue a finished one.
    """
    output = Output.open(ctx)
    existing(artifact, "artifact", "d2c pack --ratio 0.008")
    from d2c import training
    from d2c.recipe import recipe as numbers_of

    run = out or Path("runs") / f"{model.lower().replace('/', '-')}-{recipe}"
    settings = training.TrainingConfig(
        artifact=artifact,
        out=run,
        model=model,
        recipe=numbers_of(recipe, steps=steps, batch_size=batch_size).changed(set or ()),
        precision=precision,
        compile=not no_compile,
        micro_batch=micro_batch,
        shard=shard,
        held_out=held_out,
        patience=patience,
        watch_every=watch_every,
        checkpoint_every=checkpoint_every,
        keep_checkpoints=keep_checkpoints,
        keep_every=keep_every,
        log_to=tuple(log_to or ()),
        seed=seed,
        device=device,
        gpus=gpus,
        overwrite=overwrite,
    )
    plan = training.plan(settings)
    facts = {
        "run": run,
        "model": plan.spec.name,
        "recipe": asdict(settings.recipe),
        "images": plan.samples,
        "batch_size": settings.recipe.batch_size,
        "passes_per_image": round(plan.passes, 1),
        "text": plan.spec.text_dim is not None,
        "alignment": plan.token_column is not None,
        "sharded": plan.sharding.on,
        "sharded_why": plan.sharding.why,
        "notes": plan.notes,
    }
    if dry_run:
        reasons = [] if plan.done else ["--overwrite" if overwrite else "not trained to this step yet"]
        todo = {"steps": settings.recipe.steps, "batch_size": settings.recipe.batch_size}
        output.show({**facts, "steps": [plans.step("train", reasons, todo)]}, dry_run=True)
        return
    if plan.done:
        output.progress.say("train: up to date")
    elif plan.sharding.on:
        output.progress.say(f"train: the training state is cut up among the GPUs: {plan.sharding.why}")
    result = training.run(plan, output.progress)
    step = {
        "stage": "train",
        "ran": not plan.done,
        "reasons": [],
        "seconds": result.seconds,
        "facts": {"steps": result.steps, "loss": result.loss},
    }
    if result.stopped:
        output.progress.say(f"train: stopped at step {result.steps:,}: {result.stopped}")
    found = {"loss": result.loss, "stopped": result.stopped or None, "worker_seconds": result.seconds}
    output.show({**facts, **found, "steps": [step]})
    output.then(f"d2c fid {quoted(run)}", "device")
