"""``d2c attach``."""

from __future__ import annotations

from dataclasses import asdict

import typer

from d2c_cli import options, plans
from d2c_cli.output import Output

EXAMPLES = ("d2c attach --text t5 --vision dinov2 --gpus 8", "d2c attach --text hashed --vision scorer --device cpu")


def attach(
    ctx: typer.Context,
    selection: options.Selection = None,
    text: options.Text = None,
    vision: options.Vision = None,
    grid: options.Grid = None,
    workspace: options.Workspace = options.WORKSPACE,
    device: options.Device = "auto",
    gpus: options.Gpus = 1,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Attach text to the classes and vision tokens to the picks.

    In: a selection in the workspace. Out: one embedding per class and one grid of tokens per picked image, in the
    workspace, for pack. `d2c pack` does this by itself; attach is for naming the encoders first.
    """
    output = Output.open(ctx)
    from d2c import pipeline

    request = pipeline.PackRequest(
        workspace=workspace,
        out=options.SHARDS,
        text=text,
        vision=vision,
        grid=grid,
        seed=seed,
        device=device,
        gpus=gpus,
        overwrite=overwrite,
    )
    name = selection or pipeline.current_selection(workspace)
    if dry_run:
        steps, _ = plans.attachment_steps(request, name, overwrite=overwrite)
        output.show({"selection": name, "steps": steps}, dry_run=True)
        return
    result, step = pipeline.attach(request, name, output.progress)
    output.show({"selection": name, "text": result.text, "vision": result.vision, "steps": [asdict(step)]})
    output.then("d2c pack", "workspace", "device")
