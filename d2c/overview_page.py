"""A selection as one page to look at: what it holds, what it left out, and how it stands beside random ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from d2c import charts, report
from d2c.report import Thumbnail
from d2c.subsets import WORST

Array: TypeAlias = np.ndarray[Any, Any]
MEASURES = {
    "distance": "Fréchet distance",
    "class_distance": "mean distance of the classes",
    "worst": f"mean distance of the worst {WORST:.0%} of classes",
    "recall": "recall",
    "coverage": "coverage",
}
LOWER = ("distance", "class_distance", "worst")
"""Measures of which less is better."""
NOTABLE = 3.0
"""Standard deviations from random below which nothing is said to differ: those of five draws are themselves so
uncertain that one more draw is farther away once in twenty times (Student's t with 4 degrees of freedom)."""


@dataclass(frozen=True)
class Space:
    """What was measured in one feature space: for each of `MEASURES` the four numbers of `d2c.subsets.beside`.

    ``images``: of the full set that were looked at. ``selectors_own``: the selection was made in this space.
    """

    name: str
    images: int
    nearest: int
    selectors_own: bool
    rows: dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Sheets:
    """Pictures of picks, of rejected images, and of rejected images with the pick nearest to each."""

    picked: list[Thumbnail]
    rejected: list[Thumbnail]
    borderline: list[tuple[Thumbnail, Thumbnail]]


@dataclass(frozen=True)
class ClassSheets:
    """One class; ``distance`` of its picks from it, in the first space."""

    name: str
    images: int
    picks: int
    distance: float | None
    sheets: Sheets


@dataclass(frozen=True, eq=False)
class Overview:
    """What the page shows.

    scores f8 [N], picked f8 [n]: of all images and of the picks, by ``score``. tenths [10]: picks in each tenth of
    their class, easiest first. per_class, sizes [C]: picks and images of each class. near: how borderline images are
    near to picks. confident: the selection weighed a classifier's confidence.
    """

    name: str
    asked: list[tuple[str, str]]
    costs: list[tuple[str, float, str]]
    inside: list[tuple[str, int]]
    shortfalls: list[dict[str, Any]]
    score: str
    scores: Array
    picked: Array
    tenths: Array
    per_class: Array
    sizes: Array
    spaces: list[Space]
    subsets: int
    clusters: tuple[int, dict[str, float | None]] | None
    near: str
    sheets: Sheets
    classes: list[ClassSheets]
    confident: bool = False
    notes: list[str] = field(default_factory=list)


def page(overview: Overview) -> str:
    """The whole document."""
    sections = [
        report.section("What was asked", *_asked(overview)),
        report.section("Difficulty", *_difficulty(overview)),
        report.section("Beside random selections", *_distances(overview)),
        report.section("Pictures", *_pictures(overview.sheets, len(overview.picked), _left(overview), overview.near)),
        report.section("Classes", *_classes(overview)),
    ]
    return report.page(f"Selection {overview.name}", sections)


def _left(overview: Overview) -> int:
    return len(overview.scores) - len(overview.picked)


def _asked(overview: Overview) -> list[str]:
    per_class, present = overview.per_class, overview.sizes > 0
    least, most = int(per_class[present].min()), int(per_class[present].max())
    share = len(overview.picked) / len(overview.scores)
    facts = [
        *overview.asked,
        ("images", f"{len(overview.picked):,} of {len(overview.scores):,} ({share:.2%})"),
        ("classes", f"{int(np.count_nonzero(per_class)):,} of {int(present.sum()):,} have picks"),
        ("picks in a class", f"{least:,}" if least == most else f"{least:,} to {most:,}"),
    ]
    parts = [report.table("What was asked for, and what came of it", [], facts, words=True)]
    if overview.shortfalls:
        missing = sum(int(row["missing"]) for row in overview.shortfalls)
        some = ", ".join(f"{row['class']} ({row['missing']:,})" for row in overview.shortfalls[:10])
        more = f" and {len(overview.shortfalls) - 10:,} more" if len(overview.shortfalls) > 10 else ""
        how_many = f"{len(overview.shortfalls):,} classes are smaller than their share, by {missing:,} images together"
        parts.append(report.note(f"{how_many}: {some}{more}."))
    if overview.inside:
        rows = [[name, f"{images:,}"] for name, images in overview.inside]
        parts.append(report.table("Smaller selections inside this one", ["selection", "images"], rows))
    costs = [[stage, f"{seconds:,.1f}", device] for stage, seconds, device in overview.costs]
    parts.append(report.table("What it cost, in seconds of one worker", ["stage", "seconds", "device"], costs))
    return parts + [report.note(words) for words in overview.notes]


def _difficulty(overview: Overview) -> list[str]:
    scores, picked = overview.scores, overview.picked
    shift = (picked.mean() - scores.mean()) / scores.std() if scores.std() else 0.0
    label = (
        f"Histogram of {overview.score}: all images have a mean of {scores.mean():.4g}, "
        f"the picks one of {picked.mean():.4g}"
    )
    svg = charts.histogram(scores, picked, label=label, unit=f"{overview.score} (higher is harder)")
    shares = overview.tenths / max(1, overview.tenths.sum()) * 100
    tenths = charts.bars(
        shares,
        label="Share of the picks in each tenth of their class: " + ", ".join(f"{share:.1f} %" for share in shares),
        x_unit="tenth of the class, easiest first",
        y_unit="% of the picks",
        level=10.0,
    )
    words = "as hard as" if abs(shift) < 0.05 else f"{abs(shift):.2f} standard deviations {_way(shift)} than"
    return [
        report.text(f"On average the picks are {words} all images."),
        report.chart(svg, "Difficulty of all images and of the picks; the bars at the ends hold all beyond them"),
        report.chart(tenths, "Picks in each tenth of their class; dashed: without regard to difficulty"),
    ]


def _way(shift: float) -> str:
    return "harder" if shift > 0 else "easier"


def _distances(overview: Overview) -> list[str]:
    parts = [
        report.text(
            f"The same numbers for {overview.subsets} random selections that take as many images of every class. z is "
            f"how many of their standard deviations (sd) the selection is away; within {NOTABLE:.0f} of 0 it may be "
            "chance. A selection that is nearer to all images is not always the better one to train on."
        )
    ]
    for space in overview.spaces:
        if space.selectors_own:
            parts.append(
                report.note(
                    f"{space.name}: the same feature space as the selector. The selection was made to look good here: "
                    "judge it by another space."
                    + " The classifier whose confidence it weighed is linear in this space, too."
                    * overview.confident
                )
            )
        elif overview.confident:
            parts.append(
                report.note(
                    f"{space.name}: it learnt the labels that the selector's classifier learnt, whose confidence was "
                    "weighed, and may agree with it."
                )
            )
        rows = [[MEASURES[name], *_numbers(found), _verdict(name, found)] for name, found in space.rows.items()]
        header = ["measure", "selection", "random", "sd", "z", "than random"]
        caption = (
            f"{space.name}, against {space.images:,} images. Recall: share of images inside the picks' manifold; "
            f"coverage: share of images that have a pick among their {space.nearest:,} nearest"
        )
        parts.append(report.table(caption, header, rows))
    if overview.clusters is not None:
        count, found = overview.clusters
        row = [f"share of {count:,} clusters", *_numbers(found), _verdict("clusters", found)]
        header = ["measure", "selection", "random", "sd", "z", "than random"]
        parts.append(report.table("Clusters (k-means of the features) that have a pick", header, [row]))
    return parts


def _numbers(found: dict[str, float | None]) -> list[str]:
    shown = [_number(found[name], 4) for name in ("value", "random_mean")]
    return [*shown, _number(found["random_sd"], 2), "-" if found["z"] is None else f"{found['z']:+.1f}"]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _verdict(name: str, found: dict[str, float | None]) -> str:
    z = found["z"]
    if z is None:
        return "-"
    if abs(z) < NOTABLE:
        return "within chance"
    return "better" if (z < 0) == (name in LOWER) else "worse"


def _pictures(sheets: Sheets, picks: int, left: int, near: str) -> list[str]:
    parts = []
    if sheets.picked:
        parts += [report.sheet(_some("picked", sheets.picked, picks), sheets.picked)]
    if sheets.rejected:
        parts += [report.sheet(_some("rejected", sheets.rejected, left), sheets.rejected)]
    if sheets.borderline:
        caption = (
            f"Borderline: {len(sheets.borderline):,} rejected images, each beside the pick (framed) nearest {near}"
        )
        parts += [report.pairs(caption, sheets.borderline)]
    return parts


def _some(what: str, shown: Sequence[Thumbnail], of: int) -> str:
    if len(shown) == of:
        return f"{what.capitalize()}: all {of:,} images, easiest first"
    return f"{what.capitalize()}: {len(shown):,} of {of:,} images, drawn at random, easiest first"


def _classes(overview: Overview) -> list[str]:
    parts = []
    if len(np.unique(overview.per_class[overview.sizes > 0])) > 1:
        order = np.argsort(-overview.sizes, kind="stable")
        svg = charts.bars(
            overview.per_class[order].astype(np.float64),
            label=f"Picks of each class: {overview.per_class.min():,} to {overview.per_class.max():,}",
            x_unit="classes, largest first",
            y_unit="picks",
        )
        parts.append(report.chart(svg, "Picks of each class"))
    shown, all_of_them = len(overview.classes), int((overview.sizes > 0).sum())
    if shown < all_of_them:
        parts.append(
            report.text(f"The {shown} of {all_of_them:,} classes that the picks cover worst, the worst first.")
        )
    else:
        parts.append(report.text("All classes, the one that the picks cover worst first."))
    for one in overview.classes:
        distance = "" if one.distance is None else f", distance {one.distance:.4g}"
        summary = f"{one.name}: {one.picks:,} of {one.images:,} images{distance}"
        parts.append(report.details(summary, *_pictures(one.sheets, one.picks, one.images - one.picks, overview.near)))
    return parts
