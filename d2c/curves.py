"""Curves as a PNG, drawn while a run goes on: for the eye; the numbers are in the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 880, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 34, 40
_COLOURS = ("#1b6ca8", "#b8452f", "#588b3f", "#8f63ad", "#8a6d1f", "#3d8f8a")
_INK, _LINE = "#333333", "#dddddd"


@dataclass(frozen=True)
class Curve:
    """A line by name: ``values`` at ``steps``."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


def sheet(charts: Sequence[tuple[str, Sequence[Curve]]]) -> Image.Image:
    """One chart below the other, each with its title and its curves over the same steps."""
    drawn = Image.new("RGB", (WIDTH, HEIGHT * len(charts)), "white")
    last = max((max(curve.steps, default=1) for _, curves in charts for curve in curves), default=1)
    for place, (title, curves) in enumerate(charts):
        chart = Image.new("RGB", (WIDTH, HEIGHT), "white")
        _chart(ImageDraw.Draw(chart), title, curves, last)
        drawn.paste(chart, (0, place * HEIGHT))
    return drawn


def _chart(pen: ImageDraw.ImageDraw, title: str, curves: Sequence[Curve], last: float) -> None:
    font = ImageFont.load_default(13)
    values = np.array([value for curve in curves for value in curve.values if np.isfinite(value)])
    # A few values at the start are often far above all others, and would press the rest flat.
    low, high = (float(values.min()), float(np.quantile(values, 0.99))) if len(values) else (0.0, 1.0)
    pad = 0.05 * (high - low) or 0.5
    low, high = low - pad, high + pad

    def place(step: float, value: float) -> tuple[float, float]:
        across = _LEFT + (WIDTH - _LEFT - _RIGHT) * step / last
        down = (min(max(value, low), high) - low) / (high - low)
        return across, HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * down

    for share in (0, 0.25, 0.5, 0.75, 1):
        value = low + share * (high - low)
        y = place(0, value)[1]
        pen.line([(_LEFT, y), (WIDTH - _RIGHT, y)], fill=_LINE)
        pen.text((_LEFT - 8, y), f"{value:.4g}", fill=_INK, font=font, anchor="rm")
        x = place(share * last, low)[0]
        pen.text((x, HEIGHT - _BOTTOM + 8), f"{share * last:,.0f}", fill=_INK, font=font, anchor="mt")
    pen.text(((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6), "step", fill=_INK, font=font, anchor="mb")
    pen.text((_LEFT, 8), title, fill=_INK, font=font)
    right = float(WIDTH - _RIGHT)
    for curve, colour in reversed(list(zip(curves, _cycle(len(curves)), strict=True))):
        right -= pen.textlength(curve.name, font=font)
        pen.text((right, 8), curve.name, fill=colour, font=font)
        right -= 16
        points = [place(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if np.isfinite(v)]
        if len(points) == 1:
            x, y = points[0]
            pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colour)
        elif points:
            pen.line(points, fill=colour, width=2)


def _cycle(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]
