"""``d2c inspect``."""

from __future__ import annotations

import typer

from d2c_cli import options
from d2c_cli.output import Output
from d2c_cli.paths import existing

EXAMPLES = ("d2c inspect shards/", "d2c inspect shards/ --json")


def inspect(
    ctx: typer.Context,
    artifact: options.Artifact,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Say what is in an artifact and where it came from.

    In: a folder that `d2c pack` wrote, here or elsewhere. Out: counts, classes, columns and their bytes, encoders,
    selection, licence and the memory that training needs. No pixel is read and torch is not needed.
    """
    output = Output.open(ctx)
    existing(artifact, "artifact", "d2c pack --ratio 0.008")
    from formats.describe import describe

    output.show({"artifact": describe(artifact)})
