"""``d2c fid``."""

from __future__ import annotations

import typer

from d2c_cli import options, plans
from d2c_cli.output import Output
from d2c_cli.paths import existing

EXAMPLES = (
    "d2c fid runs/sit-xl-2-d2c --samples 50k --inception inception.pth",
    "d2c fid runs/sit-tiny-2-small --samples 2k --device cpu",
)
_COLUMNS = ("name", "n", "distance", "class_distance", "precision", "recall", "copy_rate")


def fid(
    ctx: typer.Context,
    run: options.Run,
    workspace: options.Workspace = options.WORKSPACE,
    samples: options.Samples = 2_000,
    artifact: options.RunArtifact = None,
    inception: options.Inception = None,
    reference: options.Reference = None,
    subsets: options.Subsets = 3,
    sampler: options.Sampler = "euler",
    sampling_steps: options.SamplingSteps = 50,
    guidance: options.Guidance = 1.5,
    guidance_interval: options.GuidanceInterval = (0.0, 1.0),
    guidance_channels: options.GuidanceChannels = "all",
    precision: options.Precision = "fp32",
    codec: options.RunCodec = None,
    batch_size: options.SampleBatch = 64,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Measure a run against real images, and whether it copies.

    In: a run folder, the workspace with the scored source, and Inception weights if the result is to be called FID.
    Out: RUN/fid/fid.json with the Frechet distance, its floor and baselines on real images, precision, recall and the
    rate of copies, and a sample grid.
    """
    output = Output.open(ctx)
    existing(run, "run", "d2c train shards/ --model sit-xl/2")
    if inception is not None:
        existing(inception, "Inception weight file", "a download of it, or leave --inception out")
    if artifact is not None:
        existing(artifact, "artifact", "d2c pack --ratio 0.008")
    from d2c import fid as stage
    from d2c.runtime import resolve_device, resolve_precision
    from d2c.sampling import SamplerConfig

    settings = stage.FidConfig(
        run=run,
        workspace=workspace,
        artifact=artifact,
        inception=inception,
        reference=reference,
        samples=samples,
        sampler=SamplerConfig(
            method=sampler,
            steps=sampling_steps,
            guidance=guidance,
            guidance_interval=guidance_interval,
            guidance_channels=guidance_channels,
            precision=resolve_precision(precision, resolve_device(device)),
        ),
        subsets=subsets,
        seed=seed,
        codec=codec,
        device=device,
        batch_size=batch_size,
        overwrite=overwrite,
    )
    plan = stage.plan(settings)
    if dry_run:
        facts = {"images": samples, "evaluations": plans.evaluations(settings.sampler, samples)}
        reasons = [] if plan.done else ["not measured yet, or asked for something else"]
        space = "Inception" if inception else "a classifier of this data"
        output.show({"space": space, "steps": [plans.step("fid", reasons, facts)]}, dry_run=True)
        return
    if plan.done:
        output.progress.say("fid: up to date")
    result = stage.run(plan, output.progress)
    report = dict(result.report)
    rows = [{name: row.get(name) for name in dict.fromkeys((*_COLUMNS, *row))} for row in report.pop("rows")]
    wanted = ("space", "protocol", "copying", "costs", "notes")
    output.show({"report": result.path, "rows": rows, **{name: report.get(name) for name in wanted}})
