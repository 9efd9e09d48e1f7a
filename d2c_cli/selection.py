"""``d2c select``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import typer

from d2c.errors import UsageError
from d2c_cli import options, plans
from d2c_cli.output import Output

EXAMPLES = (
    "d2c select --ratio 0.008",
    "d2c select --per-class 50 --interval 16",
    "d2c select --ratio 0.008,0.04 --method match --report report.html",
)


def select(
    ctx: typer.Context,
    ratio: options.Ratio = None,
    per_class: options.PerClass = None,
    total: options.Total = None,
    method: options.Method = "interval",
    interval: options.Interval = None,
    easiest: options.Easiest = None,
    score: options.Score = "score",
    features: options.Features = None,
    confidence: options.Confidence = 10.0,
    balance: options.Balance = "equal",
    spread: options.Spread = False,
    report: options.Report = None,
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
    becomes the current one for attach and pack, and with --report a page to look at. `d2c pack` selects by itself;
    select is for looking first.
    """
    output = Output.open(ctx)
    from d2c import pipeline
    from d2c.selection_rule import ONLY

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
        confidence=confidence,
        seed=seed,
        device=device,
        gpus=gpus,
        threads=threads,
        overwrite=overwrite,
    )
    for name, concerned in ONLY.items():
        if name in output.typed and method != concerned:
            output.progress.warn(f"--{name} is for --method {concerned}, and changes nothing here")
    if report is not None and report.is_dir():
        raise UsageError("the report is a file", where=report, found="a folder", expected=f"{report / 'report.html'}")
    if dry_run:
        page = (
            []
            if report is None
            else [plans.step("report", ["after select"], {"report": report, "features": request.encoder or "scorer"})]
        )
        output.show({"steps": plans.select(request) + page}, dry_run=True)
        return
    results, steps = pipeline.select(request, output.progress)
    shown: list[dict[str, Any]] = [
        {
            "selection": result.name,
            "images": result.table.num_rows,
            "classes": len(plan.names),
            "classes_with_picks": result.classes,
            "per_class": plan.per_class,
            "classes_short_of_budget": len(plan.shortfalls),
            "table": plan.stage.path / "selection.parquet",
        }
        for plan, result in results
    ]
    facts = shown[0] if len(shown) == 1 else {"selections": shown}
    # The same for all budgets.
    judged = results[-1][1].record.summary.get("confidence")
    if judged is not None:
        facts = {**facts, "confidence": judged}
    if report is not None:
        shown_in, more = pipeline.report(request, [result.name for _, result in results], report, output.progress)
        facts, steps = {**facts, "report": shown_in.path, "beside_random": shown_in.measured}, [*steps, *more]
    output.show({**facts, "steps": [asdict(step) for step in steps]})
    output.then("d2c pack", "workspace", "device")
