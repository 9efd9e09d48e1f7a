"""``d2c select``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import typer

from d2c_cli import options, plans
from d2c_cli.output import Output

EXAMPLES = (
    "d2c select --ratio 0.008",
    "d2c select --per-class 50 --interval 16",
    "d2c select --ratio 0.008,0.04 --method match",
)


def select(
    ctx: typer.Context,
    ratio: options.Ratios = None,
    per_class: options.PerClasses = None,
    total: options.Totals = None,
    method: options.Method = "interval",
    interval: options.Interval = None,
    easiest: options.Easiest = None,
    score: options.Score = "score",
    features: options.Features = None,
    balance: options.Balance = "equal",
    spread: options.Spread = False,
    workspace: options.Workspace = options.WORKSPACE,
    device: options.Device = "auto",
    gpus: options.Gpus = 1,
    threads: options.Threads = 4,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Choose images, within a budget.

    In: the workspace's scores, and --ratio, --per-class or --total. Out: a named selection in the workspace, which
    becomes the current one for attach and pack. `d2c pack` does this by itself; select is for looking first.
    """
    output = Output.open(ctx)
    from d2c import pipeline

    request = pipeline.SelectRequest(
        workspace=workspace,
        method=method,
        ratio=ratio or (),
        per_class=per_class or (),
        total=total or (),
        balance=balance,
        spread=spread,
        interval=interval,
        easiest=easiest,
        score=score,
        features=features,
        seed=seed,
        device=device,
        gpus=gpus,
        threads=threads,
        overwrite=overwrite,
    )
    if dry_run:
        output.show({"steps": plans.select(request)}, dry_run=True)
        return
    results, steps = pipeline.select(request, output.progress)
    shown: list[dict[str, Any]] = [
        {
            "selection": result.name,
            "images": result.table.num_rows,
            "classes": len(plan.names),
            "per_class": plan.per_class,
            "classes_short_of_budget": len(plan.shortfalls),
            "table": plan.stage.path / "selection.parquet",
        }
        for plan, result in results
    ]
    facts = shown[0] if len(shown) == 1 else {"selections": shown}
    output.show({**facts, "steps": [asdict(step) for step in steps]})
    output.then("d2c pack", "workspace", "device")
