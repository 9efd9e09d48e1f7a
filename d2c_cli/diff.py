"""``d2c diff``."""

from __future__ import annotations

import typer

from d2c_cli import options
from d2c_cli.output import Output

EXAMPLES = (
    "d2c diff interval-20-per-class-58e66a match-20-per-class-7c8398",
    "d2c diff theirs/selection.parquet match-20-per-class-7c8398 --json",
)


def diff(
    ctx: typer.Context,
    first: options.FirstSelection,
    second: options.SecondSelection,
    workspace: options.Workspace = options.WORKSPACE,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Say how two selections differ.

    In: two selections of the workspace. Out: how many images they share, and how many two random ones with the same
    images of each class would; how the score shifts, in standard deviations and by a Kolmogorov-Smirnov test; and the
    classes that differ most.
    """
    output = Output.open(ctx)
    from d2c.comparing import compare
    from d2c.workspace import Workspace

    output.show(compare(Workspace(workspace), first, second))
