"""``d2c verify``."""

from __future__ import annotations

import typer

from d2c.errors import UsageError
from d2c_cli import options
from d2c_cli.errors import INTEGRITY
from d2c_cli.output import Output
from d2c_cli.paths import existing

EXAMPLES = ("d2c verify shards/", "d2c verify shards/ --deep --json")


def verify(
    ctx: typer.Context,
    artifact: options.Artifact,
    quick: options.Quick = False,
    deep: options.Deep = False,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Check an artifact against its own hashes and list every fault.

    In: a folder that `d2c pack` wrote, here or elsewhere. Out: all faults with file, place and sample; exit code 0
    where there are none, 1 where there is no artifact, 3 where the data is damaged, 4 where it needs a newer release.
    Nothing is changed.
    """
    output = Output.open(ctx)
    existing(artifact, "artifact", "d2c pack --ratio 0.008")
    if quick and deep:
        raise UsageError("--quick and --deep exclude each other", hint="leave both out for the hashes of all files")
    import formats
    from formats.layout import MANIFEST, OWNED

    if quick:
        report = formats.verify(artifact, "quick")
    else:
        # Not the whole tree: the folder may be no artifact, but somebody's home.
        folders = [artifact / name for name in OWNED] if (artifact / MANIFEST).is_file() else []
        files = (file for folder in folders for file in folder.rglob("*"))
        size = sum(file.stat().st_size for file in files if file.is_file())
        with output.progress.bar("verify", size, "byte") as bar:
            report = formats.verify(artifact, "deep" if deep else "default", bar.advance)
    output.show(report.to_dict(), ok=report.ok)
    if not report.ok:
        raise typer.Exit(INTEGRITY)
