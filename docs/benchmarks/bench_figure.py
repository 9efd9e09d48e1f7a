"""A picture of runs as SVG that stands alone: a panel a measure, a row an arm, its runs, mean and standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

STEP, LEFT, WIDTH, GAP, TOP, BOTTOM = 24, 190, 270, 40, 48, 26
RUN, MEAN, QUIET = "#1b6ca8", "#b8452f", "#666"


def figure(title: str, panels: Sequence[tuple[str, Mapping[str, np.ndarray]]], level: str | None) -> str:
    """``panels``: name of the measure, and the values [runs] of each arm, in one order.

    ``level``: the arm whose mean is drawn through all rows.
    """
    names = list(panels[0][1])
    width, height = LEFT + len(panels) * (WIDTH + GAP), TOP + STEP * len(names) + BOTTOM
    body = [text(LEFT - 14, row(place) + 4, name, "end") for place, name in enumerate(names)]
    for number, (measure, arms) in enumerate(panels):
        body += panel(LEFT + number * (WIDTH + GAP), height, measure, arms, level)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui,sans-serif" font-size="12">'
        f'<rect width="{width}" height="{height}" fill="#fff"/>{text(8, 15, title, "start")}{"".join(body)}</svg>\n'
    )


def panel(left: float, height: float, measure: str, arms: Mapping[str, np.ndarray], level: str | None) -> list[str]:
    """One measure."""
    everything = np.concatenate(list(arms.values()))
    margin = 0.06 * max(float(np.ptp(everything)), 1e-9)
    low, high = float(everything.min()) - margin, float(everything.max()) + margin

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * WIDTH

    found = [text(left + WIDTH / 2, 34, f"{measure} (lower is better)", "middle")]
    found += [text(x(tick), height - 10, f"{tick:.6g}", "middle", QUIET) for tick in ticks(low, high)]
    if level is not None and len(arms[level]):
        at = x(float(arms[level].mean()))
        found.append(f'<path d="M{at:.1f},{TOP - 10} V{height - BOTTOM}" stroke="#999" stroke-dasharray="4 4"/>')
    for place, values in enumerate(arms.values()):
        if not len(values):
            continue
        y, mean = row(place), float(values.mean())
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
        found += [
            f'<circle cx="{x(v):.1f}" cy="{y}" r="2.5" fill="{RUN}" fill-opacity="0.45"/>' for v in values.tolist()
        ]
        found.append(f'<path d="M{x(mean - error):.1f},{y} H{x(mean + error):.1f}" stroke="{MEAN}" stroke-width="3"/>')
        found.append(f'<circle cx="{x(mean):.1f}" cy="{y}" r="4.5" fill="{MEAN}"/>')
    return found


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between ``low`` and ``high``."""
    power = 10.0 ** np.floor(np.log10(high - low))
    step = next(part * power for part in (2.5, 2, 1, 0.5, 0.25, 0.2) if high - low >= 3 * part * power)
    return [round(number * step, 12) for number in range(int(np.ceil(low / step)), int(high / step) + 1)]


def row(place: int) -> int:
    return TOP + 6 + STEP * place


def text(x: float, y: float, words: str, anchor: str, colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="fill:{colour}">{escape(words)}</text>'
