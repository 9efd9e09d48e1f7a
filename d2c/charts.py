"""Charts as inline SVG: no library, no script, readable in any browser and in print."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

WIDTH, HEIGHT = 640, 240
LEFT, BOTTOM, TOP, RIGHT = 56, 36, 12, 28
COLOURS = ("#1b6ca8", "#c8553d", "#588b3f", "#7a5195")
Array = np.ndarray[Any, Any]


def histogram(values: Array, picked: Array, *, label: str, unit: str) -> str:
    """Counts of ``values`` in 40 bins, and over them those of ``picked``; each is scaled to its own peak."""
    edges = np.histogram_bin_edges(np.concatenate([values, picked]), bins=40)
    low, high = float(edges[0]), float(edges[-1])
    bars = []
    for data, colour, opacity in ((values, COLOURS[0], 0.35), (picked, COLOURS[1], 0.8)):
        counts, _ = np.histogram(data, bins=edges)
        peak = max(int(counts.max()), 1)
        for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
            x, w = _x(left, low, high), _x(right, low, high) - _x(left, low, high)
            y = _y(count / peak, 0, 1)
            bars.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(w - 1, 0.5):.1f}" height="{HEIGHT - BOTTOM - y:.1f}" '
                f'fill="{colour}" fill-opacity="{opacity}"/>'
            )
    legend = _legend([f"all {len(values):,} images", f"{len(picked):,} picks (scaled up)"])
    return _frame(label, "".join(bars) + legend, (low, high), (0, 1), unit, "share of peak")


def lines(series: Sequence[tuple[str, Array, Array]], *, label: str, x_unit: str, y_unit: str) -> str:
    """One line per (name, x, y)."""
    xs = np.concatenate([x for _, x, _ in series])
    ys = np.concatenate([y for _, _, y in series])
    (x0, x1), (y0, y1) = _range(xs), _range(ys)
    paths = []
    for index, (_, x, y) in enumerate(series):
        points = " ".join(f"{_x(a, x0, x1):.1f},{_y(b, y0, y1):.1f}" for a, b in zip(x, y, strict=True))
        colour = COLOURS[index % len(COLOURS)]
        paths.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    body = "".join(paths) + _legend([name for name, _, _ in series])
    return _frame(label, body, (x0, x1), (y0, y1), x_unit, y_unit)


def _range(values: Array) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _x(value: float, low: float, high: float) -> float:
    return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def _y(value: float, low: float, high: float) -> float:
    return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)


def _legend(names: Sequence[str]) -> str:
    return "".join(
        f'<rect x="{WIDTH - 210}" y="{TOP + 16 * i}" width="10" height="10" fill="{COLOURS[i % len(COLOURS)]}"/>'
        f'<text x="{WIDTH - 194}" y="{TOP + 16 * i + 9}">{escape(name)}</text>'
        for i, name in enumerate(names)
    )


def _frame(label: str, body: str, x: tuple[float, float], y: tuple[float, float], x_unit: str, y_unit: str) -> str:
    axis = f'<path d="M{LEFT},{TOP} V{HEIGHT - BOTTOM} H{WIDTH - RIGHT}" fill="none" stroke="#888"/>'
    ticks = []
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        value_x, value_y = x[0] + fraction * (x[1] - x[0]), y[0] + fraction * (y[1] - y[0])
        ticks.append(
            f'<text x="{_x(value_x, *x):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{value_x:.3g}</text>'
            f'<text x="{LEFT - 6}" y="{_y(value_y, *y) + 4:.1f}" text-anchor="end">{value_y:.3g}</text>'
        )
    units = (
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_unit)}</text>'
        f'<text x="12" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 12 {HEIGHT / 2})">'
        f"{escape(y_unit)}</text>"
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{axis}{body}{''.join(ticks)}{units}</svg>"
    )
