"""``d2c pack``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from d2c.errors import UsageError
from d2c_cli import options, plans
from d2c_cli.output import Output
from d2c_cli.paths import quoted

EXAMPLES = ("d2c pack --ratio 0.008", "d2c pack --per-class 10 --method random --container parquet --out random-10")


def pack(
    ctx: typer.Context,
    ratio: options.Ratio = None,
    per_class: options.PerClass = None,
    selection: options.Selection = None,
    method: options.PackMethod = None,
    interval: options.Interval = None,
    features: options.Features = None,
    text: options.Text = None,
    vision: options.Vision = None,
    grid: options.Grid = None,
    views: options.Views = None,
    tokens: options.Tokens = "int8",
    container: options.Container = "tar",
    shards: options.Shards = None,
    recipe_only: options.RecipeOnly = False,
    licence: options.Licence = "",
    source_terms: options.SourceTerms = "",
    workspace: options.Workspace = options.WORKSPACE,
    out: options.PackOut = None,
    device: options.Device = "auto",
    gpus: options.Gpus = 1,
    seed: options.PackSeed = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Write the condensed, enriched data set: select, attach and pack.

    In: the workspace that `d2c score` filled, and a budget or a selection (without them, the one made last). Out: a
    folder of shards with latents, labels and attachments, hashed and versioned, that needs no workspace and is read by
    webdataset and pyarrow alike.

    Only what is missing or stale runs.
    """
    output = Output.open(ctx)
    from d2c import pipeline

    request = pipeline.PackRequest(
        workspace=workspace,
        out=out or (Path("recipe") if recipe_only else options.SHARDS),
        selected=selection,
        method=method,
        ratio=_one(ratio),
        per_class=_one(per_class),
        interval=interval,
        features=features,
        text=text,
        vision=vision,
        grid=grid,
        views=views,
        tokens=tokens,
        container="recipe" if recipe_only else container,
        shards=shards,
        licence=licence,
        source_terms=source_terms,
        seed=seed,
        device=device,
        gpus=gpus,
        overwrite=overwrite,
    )
    if dry_run:
        output.show(plans.pack(request), dry_run=True)
        return
    result, steps = pipeline.pack(request, output.progress)
    output.show(
        {
            "artifact": result.path,
            "content_id": result.content_id,
            "images": result.samples,
            "bytes": result.bytes,
            "steps": [asdict(step) for step in steps],
        }
    )
    if recipe_only:
        output.then(f"d2c push {quoted(result.path)} DESTINATION")
        return
    model = f"sit-tiny/{result.patch} --recipe small" if device == "cpu" else f"sit-xl/{result.patch}"
    output.then(f"d2c train {quoted(result.path)} --model {model}", "device")


def _one(budgets: tuple[Any, ...] | None) -> Any:
    if budgets is not None and len(budgets) > 1:
        raise UsageError(
            "an artifact has one budget",
            found=", ".join(map(str, budgets)),
            hint="select them together with d2c select, then pack each with a budget of its own",
        )
    return budgets[0] if budgets else None
