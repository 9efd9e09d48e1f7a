"""The program ``d2c``: its commands, and how each run of it begins and ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from d2c import __version__
from d2c_cli import (
    attachment,
    demo,
    describe,
    diff,
    environment,
    explain,
    fid,
    generation,
    packing,
    publishing,
    rebuilding,
    repack,
    reporting,
    scoring,
    selection,
    training,
    verify,
)
from d2c_cli.errors import known_failures

PRECEDENCE = (
    "An option can also come from the environment (--batch-size: D2C_BATCH_SIZE) or from --config. A flag wins over "
    "the environment, that over the file, and that over the default. Whole numbers may be written 50k or 1.5M."
)
_START = """\b
Have a look:
  d2c demo

\b
Condense your images and train on the result:
  d2c score imagenet/ --gpus 8
  d2c pack --ratio 0.008
  d2c train shards/ --model sit-xl/2

Without a GPU add --device cpu, or set D2C_DEVICE=cpu. Results go to stdout (--json: one document), the rest to stderr.
Exit codes: 0 done, 1 known failure, 2 usage, 3 integrity, 4 version, 75 stopped (run again), 130 Ctrl-C."""


class _Group(TyperGroup):
    """The commands, with known failures turned into messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        with known_failures(ctx):
            return super().invoke(ctx)


app = typer.Typer(
    name="d2c",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_START,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"d2c {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Condense an image data set for diffusion models: score, select, attach, pack, train and measure."""


def _register(command: Callable[..., None], examples: tuple[str, ...]) -> None:
    lines = "\n".join(f"  {line}" for line in examples)
    app.command(epilog=f"\b\nExamples:\n{lines}\n\n{PRECEDENCE}")(command)


_register(scoring.score, scoring.EXAMPLES)
_register(selection.select, selection.EXAMPLES)
_register(explain.explain, explain.EXAMPLES)
_register(diff.diff, diff.EXAMPLES)
_register(attachment.attach, attachment.EXAMPLES)
_register(packing.pack, packing.EXAMPLES)
_register(training.train, training.EXAMPLES)
_register(generation.sample, generation.EXAMPLES)
_register(fid.fid, fid.EXAMPLES)
_register(fid.fid_stats, fid.STATS_EXAMPLES)
_register(reporting.report, reporting.EXAMPLES)
_register(verify.verify, verify.EXAMPLES)
_register(describe.inspect, describe.EXAMPLES)
_register(publishing.push, publishing.PUSH_EXAMPLES)
_register(publishing.pull, publishing.PULL_EXAMPLES)
_register(repack.repack, repack.EXAMPLES)
_register(rebuilding.rebuild, rebuilding.EXAMPLES)
_register(demo.demo, demo.EXAMPLES)


def main() -> None:
    """Entry point of ``d2c`` and ``python -m d2c_cli``."""
    environment.prepare()
    app(prog_name="d2c")
