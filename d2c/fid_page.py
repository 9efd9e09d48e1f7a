"""Finished measurements as one HTML page: a single one with its pictures, or several side by side.

Everything on it is read from ``fid.json``; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2c import report
from d2c.errors import D2CError
from formats.errors import FormatError
from formats.files import read_json

REPORT = "fid.json"
_COLUMNS = {
    "distance": "",  # its space says what it is called
    "class_distance": "mean of classes",
    "worst_class_distance": "worst classes",
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "copy_rate": "copy rate",
    "second_distance": "second space",
    "spatial_distance": "sFID",
    "inception_score": "IS",
    "kernel_distance": "KID",
    "density": "density",
    "coverage_unselected": "of unselected",
    "n": "images",
    "reference_n": "against",
}
_PICTURES = {
    "grid.png": "The first generated images, in the order of their seeds.",
    "closest.png": "Pairs: a generated image, then the training image that it is nearest to; the closest pairs first.",
}
_SAME = (
    "space", "reference", "samples", "sampler", "labels", "seed", "rounding", "side", "decoder", "class_covariance",
)  # fmt: skip
"""What two measurements must share for their distances to be compared."""


@dataclass(frozen=True)
class Measured:
    """A folder that `d2c fid` wrote, and what stands in its ``fid.json``."""

    folder: Path
    document: dict[str, Any]

    @staticmethod
    def open(place: Path) -> Measured:
        """Read the measurement of a run (its folder), or the one in ``place`` itself.

        Raises:
            D2CError: there is none.
        """
        for folder in (place / "fid", place):
            path = folder / REPORT
            if path.is_file():
                try:
                    document = read_json(path)
                except FormatError as error:
                    raise D2CError("this measurement cannot be read", where=path, found=error.what) from error
                return Measured(folder, document)
        raise D2CError(
            "nothing was measured here yet",
            where=place,
            expected=f"a run with fid/{REPORT}, or a folder with {REPORT}",
            hint=f"d2c fid {place}",
        )

    @property
    def name(self) -> str:
        """What a person calls it: the run's folder."""
        folder = self.folder.resolve()
        return folder.parent.name if folder.name == "fid" else folder.name

    @property
    def generated(self) -> dict[str, Any]:
        """The row of what was judged."""
        return dict(self.document["rows"][0])

    @property
    def protocol(self) -> dict[str, Any]:
        """All that decides the numbers, one value a name."""
        document = self.document
        flat = {"space": document["space"], "reference": document.get("reference"), **document["protocol"]}
        flat["class_covariance"] = self.generated.get("class_covariance")
        return dict(_flat(flat))


def one(measured: Measured) -> str:
    """The page of one measurement."""
    title = f"{measured.name}: {measured.document['space']['distance']}"
    return report.page(title, [report.section("Distance to real images", *_summary(measured)), *_sections(measured)])


def several(found: Sequence[Measured]) -> str:
    """Measurements side by side, the best distance first, with what keeps them from being compared."""
    order = sorted(found, key=lambda measured: float(measured.generated["distance"]))
    parts = [report.note(text) for text in incomparable(order)]
    names = [name for name in _COLUMNS if any(measured.generated.get(name) is not None for measured in order)]
    rows = [[measured.name, *(_cell(measured.generated.get(name)) for name in names)] for measured in order]
    parts.append(report.table("What was generated, by run", ["run", *_heads(names, order[0])], rows))
    parts.append(report.table("What it took", ["run", *_TRAINED], [[m.name, *_trained(m)] for m in order]))
    pages = [report.details(measured.name, *_summary(measured), *_sections(measured)) for measured in order]
    return report.page(f"{len(order)} measurements", [report.section("Side by side", *parts), *pages])


def incomparable(found: Sequence[Measured]) -> list[str]:
    """Sentences that name what the protocols differ in, where distances must not be compared."""
    told = []
    flat = [measured.protocol for measured in found]
    for name in sorted({key for protocol in flat for key in protocol if key.split(".")[0] in _SAME}):
        values = {str(protocol.get(name)) for protocol in flat}
        if len(values) > 1 and name != "reference.images":
            told.append(f"Not measured alike: {name} is {' or '.join(sorted(values))}. Distances cannot be compared.")
    return told


def _summary(measured: Measured) -> list[str]:
    document = measured.document
    parts = [report.note(text) for text in document["notes"]]
    if document.get("copying_flagged"):
        parts.insert(0, report.note(f"Copying: {_rates(document)}."))
    elif document.get("copying"):
        parts.insert(0, report.text(f"No sign of copying: {_rates(document)}."))
    names = [name for name in _COLUMNS if any(row.get(name) is not None for row in document["rows"])]
    rows = [[row["name"], *(_cell(row.get(name)) for name in names)] for row in document["rows"]]
    parts.append(report.table("Beside rows without a model", ["what", *_heads(names, measured)], rows))
    intervals = {name: value for name, value in (document.get("intervals") or {}).items() if isinstance(value, list)}
    if intervals:
        cells = [[name, *map(_cell, value)] for name, value in intervals.items()]
        parts.append(report.table("Intervals of the first row", ["figure", "from", "to"], cells))
        parts.append(report.text(str(document["intervals"].get("method", ""))))
    return parts


def _rates(document: Mapping[str, Any]) -> str:
    own, others = document.get("copy_rate"), document.get("copy_rate_held_out")
    return f"{_cell(own)} of the images count as copies, {_cell(others)} of unseen real ones do"


def _sections(measured: Measured) -> list[str]:
    document, found = measured.document, []
    pictures = [
        report.picture(measured.folder / name, caption)
        for name, caption in _PICTURES.items()
        if name in document["files"] and (measured.folder / name).is_file()
    ]
    if pictures:
        found.append(report.section("Pictures", *pictures))
    if copying := document.get("copying"):
        rows = [
            [space, *(_cell(copying[space].get(name)) for name in ("rate", "held_out_rate", "threshold", "mirrored"))]
            for space in ("features", "pixels")
            if space in copying
        ]
        head = ["distance in", "copies", "of unseen real images", "threshold", "of these mirrored"]
        found.append(report.section("Copies", report.table("By nearest neighbours", head, rows),
                                    report.text(str(copying.get("rule", "")))))  # fmt: skip
    if classes := document.get("classes"):
        names = [name for name in classes[0] if name != "name"]
        rows = [[str(row.get("name", "")), *(_cell(row[name]) for name in names)] for row in classes]
        table = report.table("The farthest first", ["class", *names], rows)
        found.append(report.section("Classes", report.details(f"{len(rows):,} classes", table)))
    found.append(report.section("Costs", *_costs(document)))
    rows = [[name, str(value)] for name, value in measured.protocol.items()]
    found.append(report.section("Protocol", report.table("All that decides the numbers", [], rows, words=True)))
    return found


def _costs(document: Mapping[str, Any]) -> list[str]:
    costs = document.get("costs") or {}
    rows = [[name, _cell(value)] for name, value in costs.items() if isinstance(value, (int, float))]
    parts = [report.table(str(costs.get("unit", "")), ["stage", "seconds"], rows)] if rows else []
    if payback := document.get("payback"):
        times = payback["trainings"]
        told = f"Condensing pays from training number {times:,} on." if times else "Condensing saves nothing here."
        parts += [report.text(told), report.text(str(payback["assumption"]))]
    return parts or [report.text("Nothing is known of what it cost.")]


_TRAINED = ("model", "recipe", "images", "steps", "passes an image", "training seed", "seconds")


def _trained(measured: Measured) -> list[str]:
    protocol, costs = measured.document["protocol"], measured.document.get("costs") or {}
    names = ("model", "recipe", "images", "steps", "passes_per_image", "training_seed")
    return [*(_cell(protocol.get(name)) for name in names), _cell(costs.get("train"))]


def _heads(names: Sequence[str], measured: Measured) -> list[str]:
    heads = {**_COLUMNS, "distance": str(measured.document["space"]["distance"])}
    if measured.generated.get("class_covariance") == "diagonal":
        heads["class_distance"] += ", variances alone"
    return [heads[name] for name in names]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found
