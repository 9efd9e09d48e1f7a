"""``--config FILE.toml``: options from a file, below flags and environment variables and above defaults."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from d2c.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

JSON = "d2c.json"
"""Where the context remembers that errors, too, are wanted as JSON."""
_NOT_IN_FILES = ("config", "help")


def note_json(ctx: typer.Context, value: bool) -> bool:
    """Remember ``--json`` before anything can fail."""
    ctx.meta[JSON] = value
    return value


def apply(ctx: typer.Context, value: Path | None) -> Path | None:
    """Make the file's values the command's defaults.

    Top-level keys are for every command that has such an option; a command's own table goes before them.

    Raises:
        UsageError: the file is missing or not TOML, or a name in it is no command and no option.
    """
    if value is not None and not ctx.resilient_parsing:
        ctx.default_map = read(value, ctx.info_name or "", _options_of_commands(ctx))
    return value


def read(path: Path, command: str, commands: dict[str, list[str]]) -> dict[str, Any]:
    """The values for ``command``: parameter name -> value.

    ``commands`` maps each command to the names of its options; all tables are checked, whatever the command.
    """
    tables = _parse(path)
    shared = {key: value for key, value in tables.items() if not isinstance(value, dict)}
    everywhere = {name for names in commands.values() for name in names}
    values: dict[str, Any] = {}
    for key, value in shared.items():
        # A misspelt table and a misspelt shared option look the same; suggest from both.
        name = _known(key, everywhere, path, "the top level", others=commands)
        if name in commands.get(command, []):
            values[name] = _scalar(value, path, key)
    for table, content in tables.items():
        if not isinstance(content, dict):
            continue
        owner = _known(table, commands, path, "the top level", others=everywhere)
        for key, value in content.items():
            name = _known(key, commands[owner], path, f"[{table}]")
            plain = _scalar(value, path, key)
            if owner == command:
                values[name] = plain
    return values


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        close = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = f"did you mean {path.parent / close[0]}?" if close else None
        raise UsageError("there is no such config file", where=path, hint=hint) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError("this config file is not TOML", where=path, found=error) from error


def _known(key: str, names: Iterable[str], path: Path, place: str, others: Iterable[str] = ()) -> str:
    name = key.replace("-", "_")
    if name in names:
        return name
    valid = sorted({*names, *others})
    close = difflib.get_close_matches(name, valid, n=1)
    raise UsageError(
        "unknown name in the config file",
        where=f"{path}, {place}",
        found=key,
        expected=None if close else ", ".join(valid),
        hint=f"did you mean {close[0]}?" if close else None,
    )


def _scalar(value: Any, path: Path, key: str) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, str | int | float):
        # As on the command line, so that the option's own parser judges it.
        return str(value)
    raise UsageError(
        "an option in the config file is one value",
        where=path,
        found=f"{key} = {value!r}",
        expected="text, number or true/false",
    )


def _options_of_commands(ctx: typer.Context) -> dict[str, list[str]]:
    group: Any = ctx.find_root().command
    return {
        name: [p.name for p in command.params if p.param_type_name == "option" and p.name not in _NOT_IN_FILES]
        for name, command in group.commands.items()
    }
