"""``d2c sample``."""

from __future__ import annotations

import typer

from d2c_cli import options, plans
from d2c_cli.output import Output
from d2c_cli.paths import existing

EXAMPLES = (
    "d2c sample runs/sit-xl-2-d2c --guidance 1.5",
    "d2c sample runs/sit-tiny-2-small --count 10k --npz --device cpu",
)


def sample(
    ctx: typer.Context,
    run: options.Run,
    count: options.Count = 64,
    sampler: options.Sampler = "euler",
    sampling_steps: options.SamplingSteps = 50,
    guidance: options.Guidance = 1.5,
    npz: options.Npz = False,
    codec: options.RunCodec = None,
    out: options.SamplesOut = None,
    batch_size: options.SampleBatch = 64,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Draw images from a trained run.

    In: a run folder that `d2c train` finished. Out: grid.png with up to 100 images, and with --npz all of them as one
    samples.npz that other evaluators read.
    """
    output = Output.open(ctx)
    existing(run, "run", "d2c train shards/ --model sit-xl/2")
    from d2c import generation
    from d2c.sampling import SamplerConfig

    settings = generation.GenerationConfig(
        run=run,
        out=out or run / "samples",
        count=count,
        sampler=SamplerConfig(method=sampler, steps=sampling_steps, guidance=guidance),
        seed=seed,
        npz=npz,
        codec=codec,
        device=device,
        batch_size=batch_size,
        overwrite=overwrite,
    )
    plan = generation.plan(settings)
    if dry_run:
        per_image = plans.evaluations_per_image(settings.sampler)
        facts = {"images": count, "evaluations": count * per_image}
        reasons = [] if plan.done else ["not sampled yet, or asked for something else"]
        output.show({"out": settings.out, "steps": [plans.step("sample", reasons, facts)]}, dry_run=True)
        return
    if plan.done:
        output.progress.say("sample: up to date")
    result = generation.run(plan, output.progress)
    step = {"stage": "sample", "ran": not plan.done, "reasons": [], "seconds": result.seconds, "facts": {}}
    output.show({"out": result.path, "images": result.images, "files": result.files, "steps": [step]})
