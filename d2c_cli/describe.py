"""``d2c inspect``."""

from __future__ import annotations

import typer

from d2c.errors import UsageError
from d2c_cli import options
from d2c_cli.output import Output
from d2c_cli.paths import existing

EXAMPLES = (
    "d2c inspect shards/",
    "d2c inspect shards/ --sample 00000007",
    "d2c inspect --diff shards-yesterday/ shards/ --json",
)


def inspect(
    ctx: typer.Context,
    artifact: options.Artifact,
    sample: options.SampleKey = None,
    diff: options.Diff = None,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Say what is in an artifact and where it came from.

    In: a folder that `d2c pack` wrote, here or elsewhere. Out: counts, classes, columns and their bytes, encoders,
    selection, licence and the memory that training needs. No pixel is read and torch is not needed.
    """
    output = Output.open(ctx)
    existing(artifact, "artifact", "d2c pack --ratio 0.008")
    from formats.describe import describe, describe_sample
    from formats.difference import difference

    if sample is not None and diff is not None:
        raise UsageError("--sample and --diff exclude each other", hint="ask one after the other")
    if sample is not None:
        output.show({"sample": describe_sample(artifact, sample)})
    elif diff is not None:
        existing(diff, "artifact", "d2c pack --ratio 0.008")
        output.show({"difference": difference(diff, artifact)})
    else:
        output.show({"artifact": describe(artifact)})
