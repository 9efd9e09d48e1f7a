"""Facts as text: the same nested dictionary that ``--json`` prints, for people.

A key ends in its unit where it has one (``_bytes``, ``_seconds``); a list of dictionaries is a table.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Row = Mapping[str, Any]
_GAP = "  "
_LABEL = 24
"""Labels longer than this do not move the column of values."""


def render(facts: Mapping[str, Any], width: int | None = 80, indent: str = "") -> Iterator[str]:
    """Lines of at most ``width`` cells where words allow it; None: as long as they are."""
    labels = [len(_label(key)) for key, value in facts.items() if not _nested(value)]
    column = min(max(labels, default=0), _LABEL)
    for key, value in facts.items():
        if key == "steps" and _is_table(value):
            yield from _steps(value, width, indent)
        elif _is_table(value):
            yield f"{indent}{_label(key)}"
            yield from table(value, width, indent + _GAP)
        elif isinstance(value, Mapping) and value:
            yield f"{indent}{_label(key)}"
            yield from render(value, width, indent + _GAP)
        else:
            yield from _wrapped(f"{indent}{_label(key):<{column}}{_GAP}", shown(key, value), width)


def shown(key: str, value: Any) -> str:
    """One value as text."""
    if value is None or value in ("", [], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "where" and isinstance(value, list | tuple):
        return f"bytes {'-'.join(str(end) for end in value)}"
    if isinstance(value, list | tuple):
        return ", ".join(shown("", item) for item in value)
    if isinstance(value, int | float) and key.endswith(("bytes", "seconds")):
        return size(value) if key.endswith("bytes") else duration(value)
    if isinstance(value, int):
        return str(value) if "seed" in key else f"{value:,}"
    if isinstance(value, float):
        if 0.999 < value < 1:
            # What is not quite all must not look like all.
            return f"{value:.6f}"
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return safe(str(value))


def table(rows: Sequence[Row], width: int | None = 80, indent: str = "") -> Iterator[str]:
    """Aligned columns under headings of a word a line; what does not fit follows below, with the first column again."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [_column(name, rows) for name in names]
    first, blank = columns[0], ""
    while columns:
        shown_now = _fitting(columns, width, len(indent))
        columns = columns[len(shown_now) :]
        height = max(len(column.heading) for column in shown_now)
        for line in range(height):
            yield _line_of(shown_now, [_at(column.heading, line - height) for column in shown_now], indent)
        for number in range(len(rows)):
            yield _line_of(shown_now, [column.cells[number] for column in shown_now], indent)
        if columns:
            yield blank
            columns = [first, *columns]


@dataclass(frozen=True)
class _Column:
    heading: list[str]
    cells: list[str]
    right: bool
    width: int


def _column(name: str, rows: Sequence[Row]) -> _Column:
    heading = _label(name).split() or [""]
    cells = [_cell(row, name) for row in rows]
    numeric = all(row.get(name) is None or isinstance(row.get(name), int | float) for row in rows)
    return _Column(heading, cells, numeric, max(cells_of(text) for text in (*heading, *cells)))


def _fitting(columns: list[_Column], width: int | None, taken: int) -> list[_Column]:
    """The first columns that fit side by side: at least two, with their text cut where even they do not fit."""
    if width is None:
        return columns
    room = width - taken
    count = 0
    for column in columns:
        room -= column.width + len(_GAP)
        if room + len(_GAP) < 0 and count >= 2:
            break
        count += 1
    chosen = columns[:count]
    over = sum(column.width + len(_GAP) for column in chosen) - len(_GAP) - (width - taken)
    while over > 0:
        widest = max(range(count), key=lambda i: (not chosen[i].right, chosen[i].width))
        if chosen[widest].width <= 8:
            break
        chosen[widest] = replace(chosen[widest], width=chosen[widest].width - 1)
        over -= 1
    return chosen


def _at(heading: list[str], from_end: int) -> str:
    """Headings stand on the line above the cells, however many words they have."""
    return heading[from_end] if -from_end <= len(heading) else ""


def _line_of(columns: list[_Column], texts: list[str], indent: str) -> str:
    padded = (_pad(_cut(text, c.width), c.width, c.right) for text, c in zip(texts, columns, strict=True))
    return (indent + _GAP.join(padded)).rstrip()


def duration(seconds: float) -> str:
    """``0.4 s``, ``41 s``, ``2 min 41 s``, ``3 h 12 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """``812 bytes``, ``1.5 MB (1,512,448 bytes)``."""
    exact = f"{count:,.0f} bytes"
    return exact if count < 1e3 else f"{short_size(count)} ({exact})"


def short_size(count: float) -> str:
    """``812 bytes``, ``1.5 MB``."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:,.0f} bytes"


def safe(text: str) -> str:
    """Without control characters and lone surrogates, which names of files can carry to the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def cells_of(text: str) -> int:
    """Terminal cells of ``text``: East Asian wide characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _label(key: str) -> str:
    if key.endswith("seconds"):
        key = f"{key.removesuffix('seconds')}time"
    plain = "size" if key == "bytes" else key.removesuffix("_bytes")
    return safe(plain).replace("_", " ")


def _nested(value: Any) -> bool:
    return _is_table(value) or (isinstance(value, Mapping) and bool(value))


def _is_table(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _cell(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return _line(value)
    return shown(name, value)


def _line(facts: Row) -> str:
    return ", ".join(f"{_label(key)} {shown(key, value)}" for key, value in facts.items())


def _steps(steps: Sequence[Row], width: int | None, indent: str) -> Iterator[str]:
    """One line per stage, what it did and why, and its facts below."""
    yield f"{indent}steps"
    column = max(len(step["stage"]) for step in steps)
    for step in steps:
        dry = "would_run" in step
        runs = step["would_run"] if dry else step["ran"]
        done = "would run" if dry else f"ran, {duration(step['seconds'])}"
        why = f": {'; '.join(step['reasons'])}" if step["reasons"] else ""
        head = f"{indent}{_GAP}{step['stage']:<{column}}{_GAP}"
        yield from _wrapped(head, safe(f"{done}{why}" if runs else f"up to date{why}"), width)
        if step["facts"]:
            yield from _wrapped(" " * len(head), _line(step["facts"]), width)


def _wrapped(head: str, text: str, width: int | None) -> list[str]:
    if width is None or cells_of(head + text) <= width:
        return [f"{head}{text}".rstrip()]
    room = max(20, width - len(head))
    # Paths and hashes stay whole, for copying.
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    return [f"{head if i == 0 else ' ' * len(head)}{line}" for i, line in enumerate(lines)]


def _cut(text: str, width: int) -> str:
    """Keep both ends: paths differ at the end, names at the start."""
    if cells_of(text) <= width:
        return text
    start, end = text[: (width - 1) // 2], text[-(width // 2) :]
    while cells_of(start) + cells_of(end) + 1 > width:
        start, end = (start[:-1], end) if len(start) >= len(end) else (start, end[1:])
    return f"{start}…{end}"


def _pad(text: str, width: int, right: bool) -> str:
    fill = " " * (width - cells_of(text))
    return fill + text if right else text + fill
