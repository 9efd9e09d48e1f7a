"""``d2c explain``."""

from __future__ import annotations

import typer

from d2c_cli import options
from d2c_cli.output import Output

EXAMPLES = (
    "d2c explain n01440764/n01440764_10026.JPEG",
    "d2c explain cat/0001.png --selection match-20-per-class-7c8398 --json",
)


def explain(
    ctx: typer.Context,
    key: options.Key,
    selection: options.Selection = None,
    workspace: options.Workspace = options.WORKSPACE,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Say why an image was picked or not.

    In: the key of a scored image, which is its path below the source, and a selection in the workspace. Out: its score
    and rank in its class (0 is the easiest), the reason in words of the method, the picks nearest to it, in features
    where the method looks at them, and whether it has a duplicate.
    """
    output = Output.open(ctx)
    from d2c.explaining import explain
    from d2c.workspace import Workspace

    output.show(explain(Workspace(workspace), key, selection))
