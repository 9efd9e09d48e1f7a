"""``d2c rebuild``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

from d2c_cli import options, plans
from d2c_cli.output import Output
from d2c_cli.paths import existing, quoted

EXAMPLES = (
    "d2c rebuild recipe/ --source imagenet/",
    "d2c rebuild recipe/ --source pets/ --scorer scorer-run/ --approximate",
)
WORKSPACE = Path("d2c-rebuild")


def rebuild(
    ctx: typer.Context,
    recipe: options.RecipeFolder,
    source: options.RebuildSource,
    scorer: options.RebuildScorer = None,
    vision: options.RebuildVision = None,
    codec: options.RebuildCodec = None,
    approximate: options.Approximate = False,
    container: options.Container = "tar",
    shards: options.Shards = None,
    workspace: options.Workspace = WORKSPACE,
    out: options.Out = options.SHARDS,
    device: options.Device = "auto",
    gpus: options.Gpus = 1,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Make the artifact of a recipe from your own copy of the images.

    In: a recipe (`d2c pack --recipe-only`, pulled or received) and the data set that it names. Out: shards whose every
    image and array was compared with the recipe's hashes: the same content id proves the same data set.
    """
    output = Output.open(ctx)
    existing(recipe, "recipe", "d2c pack --recipe-only")
    from d2c import rebuilding

    request = rebuilding.RebuildRequest(
        recipe=recipe,
        source=source,
        workspace=workspace,
        out=out,
        scorer=scorer,
        vision=vision,
        codec=codec,
        approximate=approximate,
        container=container,
        shards=shards,
        device=device,
        gpus=gpus,
        overwrite=overwrite,
    )
    plan = rebuilding.plan(request)
    if dry_run:
        images = {"images": len(plan.recipe)}
        facts = {
            "recipe": recipe,
            "content_id": plan.recipe.content_id,
            **images,
            "source_images": len(plan.source),
            "codec": plan.codec,
            "vision": plan.vision,
            "workspace": workspace,
            "out": out,
            "replaces": plan.replaced if plan.reasons else None,
        }
        output.show({**facts, "steps": [plans.step("rebuild", plan.reasons, images)]}, dry_run=True)
        return
    output.show({"artifact": asdict(rebuilding.run(plan, output.progress))})
    output.then(f"d2c inspect {quoted(out)}")
