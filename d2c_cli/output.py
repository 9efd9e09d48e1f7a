"""stdout is data: the facts of a command, as text or as one JSON document. Everything else goes to stderr."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from d2c.errors import UsageError
from d2c.progress import Progress
from d2c_cli.progress import open_progress
from d2c_cli.render import render, safe

_ABOUT_OUTPUT = ("json", "dry_run", "config")
_ELSEWHERE = {"ENVIRONMENT": " (environment)", "DEFAULT_MAP": " (config file)"}


@dataclass(frozen=True)
class Output:
    """How one command speaks."""

    command: str
    config: dict[str, Any]
    as_json: bool
    main: bool
    progress: Progress
    typed: dict[str, str]
    """Options that stood on the command line, for the next command."""

    @staticmethod
    def open(ctx: typer.Context) -> Output:
        """Take the output options from the context, and echo the resolved options on stderr.

        Raises:
            UsageError: several processes are to share one GPU.
        """
        names = [param.name for param in ctx.command.params if param.name not in _ABOUT_OUTPUT]
        config = {name: _plain(ctx.params[name]) for name in names if name}
        output = Output(
            command=ctx.info_name or "",
            config=config,
            as_json=bool(ctx.params.get("json")),
            main=os.environ.get("RANK", "0") == "0",
            progress=open_progress(),
            typed={
                name: str(ctx.params[name])
                for name in (*config, "config")
                if name in ctx.params and _source(ctx, name) == "COMMANDLINE"
            },
        )
        if output.main and not output.as_json:
            typer.echo(safe(f"d2c {output.command}: {_resolved(ctx, config)}"), err=True)
        # Here, since every command comes by before it begins anything.
        if str(config.get("device")).startswith("cuda:") and (config.get("gpus") or 1) > 1:
            raise UsageError(
                "several processes cannot share one GPU",
                found=f"--device {config['device']} --gpus {config['gpus']}",
                expected="--device cuda, of which each takes its own",
            )
        return output

    def show(self, facts: Mapping[str, Any], *, dry_run: bool = False, ok: bool = True) -> None:
        """Print the result, once; both renderings hold the same facts."""
        if not self.main:
            return
        plain = _plain(facts)
        if self.as_json:
            head = {"command": self.command, "ok": ok, "dry_run": dry_run, "config": self.config}
            typer.echo(json.dumps({**head, **plain}, indent=2))
            return
        if dry_run:
            typer.echo("dry run: nothing was written", err=True)
        for line in render(plain, _width()):
            typer.echo(line)

    def then(self, command: str, *keep: str) -> None:
        """Name the next command, on stderr, with the options in ``keep`` as they were typed for this one."""
        if self.main and not self.as_json:
            same = [_as_typed(name, self.typed[name]) for name in keep if name in self.typed]
            typer.echo(" ".join([f"next: {command}", *same]), err=True)


def _as_typed(name: str, value: str) -> str:
    option = f"--{name.replace('_', '-')}"
    return option if value == "True" else f"{option} {shlex.quote(value)}"


def _resolved(ctx: typer.Context, config: Mapping[str, Any]) -> str:
    parts = []
    for name, value in config.items():
        if value is None or value == "":
            continue
        # What was typed can be seen; what came from elsewhere is named.
        where = _ELSEWHERE.get(_source(ctx, name), "")
        if isinstance(value, list | tuple):
            value = ",".join(map(str, value))
        parts.append(f"{name.replace('_', '-')}={value}{where}")
    return " ".join(parts)


def _source(ctx: typer.Context, name: str) -> str:
    source = ctx.get_parameter_source(name)
    return source.name if source else ""


def _width() -> int | None:
    """The terminal's width; none in a pipe, where nothing should be cut (COLUMNS sets one)."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return shutil.get_terminal_size().columns
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
