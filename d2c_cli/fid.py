"""``d2c fid`` and ``d2c fid-stats``."""

from __future__ import annotations

from pathlib import Path

import typer

from d2c_cli import fid_options, options, plans
from d2c_cli.output import Output
from d2c_cli.paths import existing

EXAMPLES = (
    "d2c fid runs/sit-xl-2-d2c --samples 50k --reference imagenet256.npz",
    "d2c fid runs/sit-tiny-2-small --samples 2k --device cpu",
    "d2c fid samples.npz --train shards/ --held-out val/ --reference in/",
)
STATS_EXAMPLES = (
    "d2c fid-stats imagenet/ --size 256 --out in256.npz",
    "d2c fid-stats shards/ --inception inception.pth --device cpu",
)
_COLUMNS = ("name", "n", "distance", "spatial_distance", "class_distance", "precision", "recall", "coverage")
_SHOWN = (
    "copy_rate copy_rate_interval copy_rate_held_out copying_flagged space second reference protocol intervals copying "
    "rulers costs payback notes"
).split()
WORST = 5
_DRAWING = (
    "samples sampler sampling_steps guidance guidance_interval guidance_channels precision class_labels batch_size gpus"
).split()
"""Options that concern images which are drawn from a run."""


def fid(
    ctx: typer.Context,
    judged: fid_options.Judged,
    workspace: options.Workspace = options.WORKSPACE,
    samples: fid_options.Samples = 2_000,
    artifact: fid_options.RunArtifact = None,
    train: fid_options.TrainedOn = None,
    held_out: fid_options.KeptBack = None,
    inception: fid_options.Inception = None,
    second: fid_options.SecondSpace = None,
    reference: fid_options.Reference = None,
    subsets: fid_options.Subsets = 3,
    sampler: options.Sampler = "euler",
    sampling_steps: options.SamplingSteps = 50,
    guidance: options.Guidance = None,
    guidance_interval: options.GuidanceInterval = (0.0, 1.0),
    guidance_channels: options.GuidanceChannels = "all",
    precision: options.SamplingPrecision = "auto",
    class_labels: options.ClassLabels = "balanced",
    export_npz: fid_options.ExportNpz = None,
    codec: options.RunCodec = None,
    out: fid_options.FidOut = None,
    batch_size: options.SampleBatch = 64,
    device: options.Device = "auto",
    gpus: options.Gpus = 1,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Measure a run, or images that were drawn elsewhere, against real images, and whether they are copies.

    In: a run folder, a folder of images, or an .npz of samples (arr_0); a workspace with the scored source, or
    --reference; Inception weights if the result is to be called FID. Out: fid.json (in RUN/fid, or beside the images in
    NAME-fid) with the Frechet distance, sFID, its floor and baselines on real images, precision, recall, density,
    coverage, a table of the classes and the rate of copies; a sample grid, and the 64 closest pairs.
    """
    output = Output.open(ctx)
    existing(judged, "run and no images", "d2c train shards/ --model sit-xl/2")
    inception = _inception(inception)
    if artifact is not None:
        existing(artifact, "artifact", "d2c pack --ratio 0.008")
    from d2c import fid as stage
    from d2c import fid_pipeline
    from d2c.runtime import resolve_device
    from d2c.sampling import SamplerConfig, precision_on

    settings = stage.FidConfig(
        judged=judged,
        workspace=workspace,
        artifact=artifact,
        train=train,
        held_out=held_out,
        inception=inception,
        second=second,
        reference=reference,
        samples=samples,
        sampler=SamplerConfig(
            method=sampler,
            steps=sampling_steps,
            guidance=guidance,
            guidance_interval=guidance_interval,
            guidance_channels=guidance_channels,
            precision=precision_on(resolve_device(device), precision),
        ),
        labels=class_labels,
        subsets=subsets,
        seed=seed,
        export_npz=export_npz,
        out=out,
        codec=codec,
        device=device,
        batch_size=batch_size,
        overwrite=overwrite,
    )
    plan = stage.plan(settings)
    unused = [f"--{name.replace('_', '-')}" for name in _DRAWING if name in output.typed]
    if plan.generator is None and unused:
        output.progress.warn(f"these images were drawn elsewhere: {', '.join(unused)} changes nothing")
    if dry_run:
        facts: dict[str, int | None] = {"images": len(plan.judged)}
        if plan.generator:
            facts["evaluations"] = plans.evaluations(plan.config.sampler, samples)
        reasons = [] if plan.done else ["not measured yet, or asked for something else"]
        space = "Inception" if plan.inception else "a classifier of this data"
        output.show({"space": space, "steps": [plans.step("fid", reasons, facts)]}, dry_run=True)
        return
    if plan.done:
        output.progress.say("fid: up to date")
    result = fid_pipeline.measure(plan, gpus, output.progress)
    report = dict(result.report)
    rows = [{name: row.get(name) for name in dict.fromkeys((*_COLUMNS, *row))} for row in report["rows"]]
    classes = report["classes"] if output.as_json else report["classes"][:WORST]
    told = {name: report[name] for name in _SHOWN}
    output.show(
        {
            "report": result.path,
            "page": result.path.with_name(stage.PAGE),
            "rows": rows,
            "worst_classes": classes,
            **told,
        }
    )


def fid_stats(
    ctx: typer.Context,
    source: options.Source,
    out: fid_options.StatsOut = Path("stats.npz"),
    size: fid_options.StatsSize = None,
    inception: fid_options.Inception = None,
    workspace: options.Workspace = options.WORKSPACE,
    codec: options.RunCodec = None,
    device: options.Device = "auto",
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Write the statistics of real images, to measure against with `d2c fid --reference`.

    In: images, an artifact or an .npz of images. Out: an .npz with ADM's names, mu and sigma (2,048 Inception
    features) and mu_s and sigma_s (sFID). Without Inception weights: statistics in the workspace's classifier.
    """
    output = Output.open(ctx)
    inception = _inception(inception)
    from d2c import fid_stats as stage

    settings = stage.StatsConfig(
        source=source, out=out, size=size, inception=inception, workspace=workspace, codec=codec, device=device
    )
    result = stage.run(stage.plan(settings), output.progress)
    output.show(result)


def _inception(given: Path | None) -> Path | None:
    if given is not None and str(given) == "download":
        from d2c.features import fetch_inception

        return fetch_inception()
    if given is not None:
        existing(given, "Inception weight file", "--inception download, or leave --inception out")
    return given
