"""``d2c verify``."""

from __future__ import annotations

import typer

from d2c_cli import options
from d2c_cli.errors import INTEGRITY
from d2c_cli.output import Output
from d2c_cli.paths import existing

EXAMPLES = ("d2c verify shards/", "d2c verify shards/ --level deep --json")


def verify(
    ctx: typer.Context,
    artifact: options.Artifact,
    level: options.Level = "default",
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Check an artifact against its own hashes and list every fault.

    In: a folder that `d2c pack` wrote, here or elsewhere. Out: all faults with file, place and sample; exit code 0
    where there are none, 3 where the data is damaged, 4 where it needs a newer release. Nothing is changed.
    """
    output = Output.open(ctx)
    existing(artifact, "artifact", "d2c pack --ratio 0.008")
    import formats

    report = formats.verify(artifact, level)
    output.show(report.to_dict(), ok=report.ok)
    if not report.ok:
        raise typer.Exit(INTEGRITY)
