"""``d2c select``."""

from __future__ import annotations

from dataclasses import asdict

import typer

from d2c_cli import options, plans
from d2c_cli.output import Output

EXAMPLES = ("d2c select --ratio 0.008", "d2c select --per-class 50 --interval 16")


def select(
    ctx: typer.Context,
    ratio: options.Ratio = None,
    per_class: options.PerClass = None,
    method: options.Method = "interval",
    interval: options.Interval = None,
    workspace: options.Workspace = options.WORKSPACE,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Choose images by their scores, within a budget.

    In: the workspace's scores, and --ratio or --per-class. Out: a named selection in the workspace, which becomes the
    current one for attach and pack. `d2c pack` does this by itself; select is for looking first.
    """
    output = Output.open(ctx)
    from d2c import pipeline, selection

    settings = selection.SelectionConfig(
        workspace=workspace,
        method=method,
        ratio=ratio,
        per_class=per_class,
        interval=interval,
        seed=seed,
        overwrite=overwrite,
    )
    plan = selection.plan(settings)
    if dry_run:
        output.show({"selection": settings.name, "steps": [plans.selection_step(plan)]}, dry_run=True)
        return
    result, step = pipeline.select(settings, output.progress)
    output.show(
        {
            "selection": result.name,
            "images": result.table.num_rows,
            "classes": plan.classes,
            "per_class": plan.per_class,
            "classes_short_of_budget": len(plan.shortfalls),
            "table": plan.stage.path / "selection.parquet",
            "steps": [asdict(step)],
        }
    )
    output.then("d2c pack", "workspace", "device")
