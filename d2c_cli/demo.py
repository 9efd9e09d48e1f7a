"""``d2c demo``."""

from __future__ import annotations

import typer

from d2c_cli import options
from d2c_cli.output import Output
from d2c_cli.paths import quoted

EXAMPLES = ("d2c demo", "d2c demo --seeds 1 --steps 200 --out quick-look")


def demo(
    ctx: typer.Context,
    out: options.Out = options.DEMO,
    seeds: options.Seeds = 3,
    steps: options.DemoSteps = 500,
    samples: options.DemoSamples = 500,
    device: options.Device = "cpu",
    seed: options.Seed = 0,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Run the whole path on handwritten digits, in minutes on a CPU.

    In: nothing; the 1,797 digits ship with scikit-learn. Out: in --out, the images, scores, shards, trained runs and a
    report.html with pictures and results. Each step prints the command that does the same; give it your own images.
    """
    output = Output.open(ctx)
    from d2c import demo as stage

    settings = stage.DemoConfig(out=out, seeds=seeds, steps=steps, samples=samples, device=device, seed=seed)
    if dry_run:
        output.show({"out": out, "steps_per_run": steps, **stage.plan(settings)}, dry_run=True)
        return
    result = stage.run(settings, output.progress)
    output.show(
        {
            "report": result.report,
            "grid": result.grid,
            "seconds": result.seconds,
            "space": result.space,
            "arms": result.arms,
            "rows": result.rows,
        }
    )
    output.then(f"open {quoted(result.report)} in a browser")
