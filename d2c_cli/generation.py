"""``d2c sample``."""

from __future__ import annotations

from pathlib import Path

import typer

from d2c_cli import options, plans
from d2c_cli.output import Output
from d2c_cli.paths import existing

EXAMPLES = (
    "d2c sample runs/sit-xl-2-d2c --guidance 1.5",
    "d2c sample runs/sit-xl-2-d2c --count 50k --npz --sampler sde --gpus 8",
    "d2c sample SiT-XL-2-256.pt --codec vae --guidance 4 --guidance-channels 3",
    "d2c sample runs/sit-tiny-2-small --count 10k --npz --device cpu",
)


def sample(
    ctx: typer.Context,
    run: options.RunOrWeights,
    count: options.Count = 64,
    class_labels: options.ClassLabels = "balanced",
    sampler: options.Sampler = "euler",
    sampling_steps: options.SamplingSteps = 50,
    guidance: options.Guidance = None,
    guidance_interval: options.GuidanceInterval = (0.0, 1.0),
    guidance_channels: options.GuidanceChannels = "all",
    precision: options.SamplingPrecision = "auto",
    npz: options.Npz = False,
    codec: options.RunCodec = None,
    objective: options.Objective = None,
    out: options.SamplesOut = None,
    batch_size: options.SampleBatch = 64,
    device: options.Device = "auto",
    gpus: options.Gpus = 1,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Draw images from a trained run, or from published weights.

    In: a run folder that `d2c train` finished, an official SiT, DiT or REPA weight file (classes are then numbers), or
    a folder of diffusers. Out: grid.png with up to 100 images, and with --npz all of them as one samples.npz that other
    evaluators read.

    Image i depends on the seed and its number, not on batch size or number of GPUs. An interrupted run goes on where
    it stopped.
    """
    output = Output.open(ctx)
    existing(run, "run or weight file", "d2c train shards/ --model sit-xl/2")
    from d2c import generation
    from d2c.runtime import resolve_device
    from d2c.sampling import SamplerConfig, precision_on

    settings = generation.GenerationConfig(
        run=run,
        out=out or _beside(run),
        count=count,
        sampler=SamplerConfig(
            method=sampler,
            steps=sampling_steps,
            guidance=guidance,
            guidance_interval=guidance_interval,
            guidance_channels=guidance_channels,
            precision=precision_on(resolve_device(device), precision),
        ),
        labels=class_labels,
        seed=seed,
        npz=npz,
        objective=objective,
        codec=codec,
        device=device,
        gpus=gpus,
        batch_size=batch_size,
        overwrite=overwrite,
    )
    plan = generation.plan(settings)
    if dry_run:
        facts = {"images": count, "evaluations": plans.evaluations(plan.config.sampler, count)}
        reasons = [] if plan.done else ["not sampled yet, or asked for something else"]
        output.show({"out": settings.out, "steps": [plans.step("sample", reasons, facts)]}, dry_run=True)
        return
    if plan.done:
        output.progress.say("sample: up to date")
    result = generation.run(plan, output.progress)
    step = {"stage": "sample", "ran": not plan.done, "reasons": [], "seconds": result.seconds, "facts": {}}
    output.show({"out": result.path, "images": result.images, "files": result.files, "steps": [step]})


def _beside(run: Path) -> Path:
    """In a run's own folder; weights of others often lie where nothing should be written."""
    if (run / "run.json").exists():
        return run / "samples"
    return Path("samples") / (run.stem if run.is_file() else run.resolve().name)
