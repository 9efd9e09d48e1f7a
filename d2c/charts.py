"""Charts as inline SVG: no library, no script, readable in any browser and in print."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

WIDTH, HEIGHT = 640, 240
LEFT, BOTTOM, TOP, RIGHT = 56, 36, 12, 28
COLOURS = ("var(--all,#1b6ca8)", "var(--some,#b8452f)", "#588b3f", "#8f63ad")
"""The first two follow the page's light or dark colours."""
Array = np.ndarray[Any, Any]


def histogram(values: Array, picked: Array, *, label: str, unit: str) -> str:
    """Counts of ``values`` in 40 bins, and over them those of ``picked``; each is scaled to its own peak.

    The bins at both ends hold what lies beyond them: 0.1 % of ``values``, in which a long tail would drown the rest.
    """
    ends = np.quantile(values, (0.0005, 0.9995))
    edges = np.histogram_bin_edges(ends, bins=40)
    low, high = float(edges[0]), float(edges[-1])
    areas = []
    for data, colour, opacity in ((values, COLOURS[0], 0.25), (picked, COLOURS[1], 0.45)):
        counts, _ = np.histogram(np.clip(data, *ends), bins=edges)
        heights = counts / max(int(counts.max()), 1)
        steps = zip(np.repeat(edges, 2)[1:-1], np.repeat(heights, 2), strict=True)
        line = " ".join(f"{_x(x, low, high):.1f},{_y(y, 0, 1):.1f}" for x, y in steps)
        base = f"{_x(low, low, high):.1f},{_y(0, 0, 1):.1f} {line} {_x(high, low, high):.1f},{_y(0, 0, 1):.1f}"
        style = f"fill:{colour};fill-opacity:{opacity};stroke:{colour};stroke-width:1.5"
        areas.append(f'<polygon points="{base}" style="{style}"/>')
    legend = _legend([f"all {len(values):,} images", f"{len(picked):,} picks (scaled up)"])
    return _frame(label, "".join(areas) + legend, (low, high), (0, 1), unit, "share of peak")


def bars(values: Array, *, label: str, x_unit: str, y_unit: str, level: float | None = None) -> str:
    """A bar for each of ``values``, numbered from 1, and a dashed line at ``level``."""
    top = _round_up(max(float(values.max(initial=0)), level or 0))
    x = (0.5, len(values) + 0.5)
    # Of a thousand bars the gaps would be all that is seen.
    gap = 0.1 if len(values) <= 60 else 0
    found = []
    for place, value in enumerate(values.tolist(), 1):
        left, right, up = _x(place - 0.5 + gap, *x), _x(place + 0.5 - gap, *x), _y(value, 0, top)
        found.append(
            f'<rect x="{left:.1f}" y="{up:.1f}" width="{right - left:.2f}" height="{HEIGHT - BOTTOM - up:.1f}" '
            f'style="fill:{COLOURS[0]};fill-opacity:0.5;stroke:{COLOURS[0]}"/>'
        )
    if level is not None:
        y = _y(level, 0, top)
        style = f"stroke:{COLOURS[1]};stroke-width:2;stroke-dasharray:6 4"
        found.append(f'<path d="M{LEFT},{y:.1f} H{WIDTH - RIGHT}" style="{style}"/>')
    marks = np.unique(np.linspace(1, len(values), min(len(values), 10)).round()).astype(int).tolist()
    return _frame(label, "".join(found), x, (0, top), x_unit, y_unit, marks)


def lines(series: Sequence[tuple[str, Array, Array]], *, label: str, x_unit: str, y_unit: str) -> str:
    """One line per (name, x, y)."""
    xs = np.concatenate([x for _, x, _ in series])
    ys = np.concatenate([y for _, _, y in series])
    (x0, x1), (y0, y1) = _range(xs), _range(ys)
    paths = []
    for index, (_, x, y) in enumerate(series):
        points = " ".join(f"{_x(a, x0, x1):.1f},{_y(b, y0, y1):.1f}" for a, b in zip(x, y, strict=True))
        colour = COLOURS[index % len(COLOURS)]
        paths.append(f'<polyline points="{points}" style="fill:none;stroke:{colour};stroke-width:1.5"/>')
    body = "".join(paths) + _legend([name for name, _, _ in series])
    return _frame(label, body, (x0, x1), (y0, y1), x_unit, y_unit)


def _range(values: Array) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _round_up(value: float) -> float:
    """The next number whose quarters are short: 4, 8, 12, 20 or 40 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value / 4))
    return float(next(step * power for step in (4, 8, 12, 20, 40) if step * power >= value))


def _x(value: float, low: float, high: float) -> float:
    return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def _y(value: float, low: float, high: float) -> float:
    return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)


def _legend(names: Sequence[str]) -> str:
    return "".join(
        f'<rect x="{WIDTH - 210}" y="{TOP + 16 * i}" width="10" height="10" style="fill:{COLOURS[i % len(COLOURS)]}"/>'
        f'<text x="{WIDTH - 194}" y="{TOP + 16 * i + 9}">{escape(name)}</text>'
        for i, name in enumerate(names)
    )


def _frame(
    label: str,
    body: str,
    x: tuple[float, float],
    y: tuple[float, float],
    x_unit: str,
    y_unit: str,
    marks: Sequence[float] | None = None,
) -> str:
    """Axes with five ticks each, or those at ``marks`` on the x axis."""
    axis = f'<path d="M{LEFT},{TOP} V{HEIGHT - BOTTOM} H{WIDTH - RIGHT}" fill="none" stroke="#888"/>'
    quarters = (0, 0.25, 0.5, 0.75, 1)
    ticks = [
        f'<text x="{_x(at, *x):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{at:.4g}</text>'
        for at in marks or [x[0] + part * (x[1] - x[0]) for part in quarters]
    ]
    for part in quarters:
        at = y[0] + part * (y[1] - y[0])
        ticks.append(f'<text x="{LEFT - 6}" y="{_y(at, *y) + 4:.1f}" text-anchor="end">{at:.3g}</text>')
    units = (
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_unit)}</text>'
        f'<text x="12" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 12 {HEIGHT / 2})">'
        f"{escape(y_unit)}</text>"
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{axis}{body}{''.join(ticks)}{units}</svg>"
    )
