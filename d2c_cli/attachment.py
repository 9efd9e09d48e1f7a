"""``d2c attach``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

from d2c.errors import UsageError
from d2c.workspace import Workspace
from d2c_cli import options, plans
from d2c_cli.output import Output

EXAMPLES = (
    "d2c attach --text t5 --vision dinov2 --gpus 8",
    "d2c attach --text hashed --vision scorer --device cpu",
    "d2c attach --rank-encoders dinov2,scorer",
)


def attach(
    ctx: typer.Context,
    selection: options.Selection = None,
    text: options.Text = None,
    prompt: options.Prompt = None,
    synonyms: options.Synonyms = None,
    vision: options.Vision = None,
    grid: options.Grid = None,
    views: options.Views = None,
    rank_encoders: options.RankEncoders = None,
    rank_images: options.RankImages = 2_000,
    workspace: options.Workspace = options.WORKSPACE,
    device: options.Device = "auto",
    gpus: options.Gpus = 1,
    seed: options.PackSeed = None,
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

    if rank_encoders:
        if text is not None or vision is not None:
            raise UsageError("--rank-encoders attaches nothing", hint="leave --text and --vision out")
        _rank(output, workspace, rank_encoders, grid, rank_images, seed or 0, device, dry_run=dry_run)
        return
    request = pipeline.PackRequest(
        workspace=workspace,
        out=options.SHARDS,
        text=text,
        prompt=prompt,
        synonyms=synonyms,
        vision=vision,
        grid=grid,
        views=views,
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


def _rank(
    output: Output,
    workspace: Path,
    encoders: tuple[str, ...],
    grid: int | None,
    images: int,
    seed: int,
    device: str,
    *,
    dry_run: bool,
) -> None:
    from d2c import encoder_ranking, pipeline

    grid = grid or pipeline.usual_grid(Workspace(workspace))
    if dry_run:
        output.show({"encoders": list(encoders), "images": images, "grid": grid}, dry_run=True)
        return
    ranking = encoder_ranking.rank(
        workspace, encoders, grid=grid, images=images, seed=seed, device=device, progress=output.progress
    )
    rows = [
        {
            "encoder": row.encoder,
            **{
                key: value
                for name, pair in row.measures.items()
                for key, value in zip((name, f"{name}_stderr"), pair, strict=True)
            },
            "dim": row.dim,
            "seconds per 1,000": row.seconds_per_1000,
        }
        for row in ranking.rows
        if not row.error
    ]
    failed = [{"encoder": row.encoder, "error": row.error} for row in ranking.rows if row.error]
    output.show({"images": ranking.images, "grid": grid, "rows": rows, "failed": failed, "caveat": ranking.caveat})
    if rows:
        output.then(f"d2c attach --vision {rows[0]['encoder']}", "workspace", "device")
