"""Values as users write them, and the makers of options."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Literal

import typer

_FACTORS = {"": 1, "k": 1_000, "m": 1_000_000}


def whole(text: str | int) -> int:
    """Parse an integer such as ``50000``, ``50k`` or ``1.5M``.

    Raises:
        typer.BadParameter: this is no whole number.
    """
    match = re.fullmatch(r"([+-]?)(\d[\d_]*)(?:\.(\d+))?([kKmM]?)", str(text).strip())
    if match:
        sign, digits, decimals, suffix = match.groups(default="")
        # In integers: 1.1k is 1100, which binary fractions would miss.
        scale: int = 10 ** len(decimals)
        scaled, rest = divmod(int(digits + decimals) * _FACTORS[suffix.lower()], scale)
        if not rest:
            return -scaled if sign == "-" else scaled
    raise typer.BadParameter(f"{text!r} is not a whole number, such as 50000, 50k or 1.5M.")


def finite(text: str | float) -> float:
    """Parse a number that is neither infinite nor NaN.

    Raises:
        typer.BadParameter: this is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return number
    raise typer.BadParameter(f"{text!r} is not a number, such as 1.5.")


def several(parse: Callable[[str], Any]) -> Callable[[Any], tuple[Any, ...]]:
    """A parser of one value or several with commas between, such as ``0.008,0.04``."""

    def parse_all(text: Any) -> tuple[Any, ...]:
        return tuple(parse(part.strip()) for part in str(text).split(","))

    return parse_all


def interval(text: str | tuple[float, float]) -> tuple[float, float]:
    """Parse two numbers with a comma between, such as ``0.1,0.8``.

    Raises:
        typer.BadParameter: these are not two numbers in rising order between 0 and 1.
    """
    ends = text if isinstance(text, tuple) else several(finite)(text)
    if len(ends) == 2 and 0 <= ends[0] <= ends[1] <= 1:
        return ends[0], ends[1]
    raise typer.BadParameter(f"{text!r} is not an interval between 0 and 1, such as 0.1,0.8.")


def channels(text: str | int) -> Literal["all", 3]:
    """Parse ``3`` or ``all``.

    Raises:
        typer.BadParameter: it is neither.
    """
    if text == "all":
        return "all"
    if str(text) == "3":
        return 3
    raise typer.BadParameter(f"{text!r} is neither 3 nor all.")


def at_least(least: int) -> Callable[[str], int]:
    """A parser of whole numbers that are no smaller."""

    def parse(text: str) -> int:
        number = whole(text)
        if number < least:
            raise typer.BadParameter(f"{text} is too small: {least} or more.")
        return number

    return parse


def variable(name: str) -> str:
    """The environment variable of an option: ``--batch-size`` -> ``D2C_BATCH_SIZE``."""
    return "D2C_" + name.lstrip("-").upper().replace("-", "_")


def option(
    name: str,
    metavar: str | None,
    text: str,
    *,
    parser: Callable[[str], Any] | None = None,
    callback: Callable[[typer.Context, Any], Any] | None = None,
    is_eager: bool = False,
    file_okay: bool = True,
) -> Any:
    """An option with its unit, its help and its environment variable."""
    return typer.Option(
        name,
        metavar=metavar,
        help=text,
        envvar=variable(name),
        show_envvar=False,
        parser=parser,
        callback=callback,
        is_eager=is_eager,
        file_okay=file_okay,
    )


def count(name: str, metavar: str, text: str, *, least: int = 1) -> Any:
    """An option that takes a whole number of at least ``least``."""
    return option(name, metavar, text, parser=at_least(least))


def folder(name: str, text: str) -> Any:
    """An option that takes a folder, which need not exist."""
    return option(name, "DIR", text, file_okay=False)
