"""Measure images honestly: their distance to real ones, beside what no model is needed for, and a copy check.

The distance is called FID only in the space of the published Inception weights. Rows without a model tell how to read
it. *replay* is the condensed set itself, scored as if it had been generated; *random real* are as many images drawn at
random from the scored source, which lie in the reference as often as those of the condensed set do. *real* is the
floor: real images that nothing was trained on, as many as were generated or, where they come out of the reference, a
fifth of all there are, whichever is less, measured against the reference without them. A row's ``reference_n`` and
``in_reference`` say how many real images it was compared with and how many of these are its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from d2c import fid_page, fid_report, intervals, ledger, metrics, report, runtime
from d2c.errors import D2CError
from d2c.features import FeatureSpace, distance_name
from d2c.fid_plan import REPORT, FidConfig, Plan, plan
from d2c.generator import grid, save_png
from d2c.judge import RealImages, Reference, drawn, given, open_second, open_space, scored_rows, studied
from d2c.npz import exported
from d2c.pictures import Drawn, FromSource, Pictures, class_numbers
from d2c.progress import Progress, Silent
from d2c.seen import Images, Seen, copy_check
from d2c.sources import Source
from d2c.yardstick import Compared, Yardstick
from formats.files import read_json, write_json

__all__ = ["CLOSEST", "GRID", "REPORT", "FidConfig", "Plan", "Result", "plan", "run"]

GRID, CLOSEST, PAGE = "grid.png", "closest.png", "report.html"
SHOWN = 100
"""Images on the grid."""
HELD_OUT = 2_000
"""Unselected real images that calibrate the copy check, at most."""
FEWEST = 10
"""Unseen real images below which nothing is calibrated."""
FLOOR = 5
"""One in so many unseen images, at most, is taken out of the reference to be the floor."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Result:
    """``report``: space, protocol, rows, copying, costs and notes, as written to ``path``."""

    report: dict[str, Any]
    path: Path


def run(plan: Plan, progress: Progress | None = None) -> Result:
    """Go through the images, measure and write ``fid.json``, unless the same measurement is there."""
    path = plan.config.folder / REPORT
    if not plan.done:
        runtime.once(lambda: write_json(path, {"asked": plan.asked, **_measure(plan, progress or Silent())}))
    runtime.once(lambda: report.write(path.with_name(PAGE), fid_page.one(fid_page.Measured.open(path.parent))))
    return Result(report=read_json(path), path=path)


@dataclass(frozen=True, eq=False)
class _Ruler:
    """A space, and the reference in it."""

    plan: Plan
    space: FeatureSpace
    reference: Reference
    progress: Progress

    def see(self, source: Source, rows: list[int]) -> Images:
        """Images of a source, in this space."""
        return _real(self.plan, source, self.space, self.progress).see(rows, self.reference)


def _real(plan: Plan, source: Source, space: FeatureSpace, progress: Progress) -> RealImages:
    numbers = class_numbers(source.classes, plan.classes)
    return RealImages(source, plan.side, space, numbers, progress, plan.workspace)


def _rulers(plan: Plan, progress: Progress) -> tuple[_Ruler, _Ruler | None]:
    """The reference in the space that measures and, where it can be had, in the second.

    Raises:
        D2CError: statistics that were given are of another space than the one that measures.
    """
    first = open_space(plan.workspace, plan.scored, plan.side, plan.inception, plan.device, progress)
    name = plan.config.second
    other = open_second(name, plan.workspace, plan.scored, plan.side, plan.device, progress) if name else None
    reference = _reference(plan, first, progress)
    if reference is None:
        raise D2CError(
            "these statistics are of another feature space",
            where=plan.config.reference,
            found=plan.npz.space if plan.npz and plan.npz.space else "the space of the published Inception",
            expected=f"{first.name} ({first.digest})",
            hint="name the weights that they were computed with (--inception FILE), or make others with d2c fid-stats",
        )
    apart = _reference(plan, other, progress) if other else None
    return _Ruler(plan, first, reference, progress), _Ruler(plan, other, apart, progress) if other and apart else None


def _reference(plan: Plan, space: FeatureSpace, progress: Progress) -> Reference | None:
    if plan.source is not None:
        rows = _rows(plan, plan.source, "reference", plan.config.reference_images)
        return _real(plan, plan.source, space, progress).reference(rows, plan.device)
    if plan.npz is not None:
        return given(plan.npz, plan.pictures, space, progress)
    assert plan.pictures is not None
    return studied(plan.pictures, space, progress)


@dataclass(frozen=True, eq=False)
class _Table:
    """The rows of a report, one after the other."""

    plan: Plan
    ruler: _Ruler
    second: _Ruler | None
    yardstick: Yardstick
    contents: Array
    """Digests of the files that were trained on, as far as they are known."""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def seen(self, name: str, seen: Seen) -> Compared:
        """A row of images that were gone through as a whole."""
        compared = self._add(name, seen.images, seen.second, self.yardstick, None)
        known = self.ruler.reference.spatial
        if seen.spatial and known:
            self.rows[-1]["spatial_distance"] = round(metrics.frechet_distance(seen.spatial, known).value, 4)
        self.rows[-1]["inception_score"] = seen.inception_score and round(seen.inception_score, 4)
        return compared

    def random_real(self) -> None:
        """Rows of random images of the scored source, as many as the condensed set has."""
        plan, config = self.plan, self.plan.config
        if plan.workspace is None or plan.scored is None or plan.artifact is None:
            return
        for subset in range(1, config.subsets + 1):
            purpose = ("random real", config.seed, subset)
            chosen = scored_rows(plan.workspace, plan.scored, len(plan.artifact), *purpose)
            images = self.ruler.see(plan.scored, chosen)
            if len(images) > 1:
                other = self.second.see(plan.scored, chosen) if self.second else None
                self._add(f"random real {subset}", images, other, self.yardstick, None)

    def floor(self, source: Source, unseen: list[int]) -> bool:
        """The row of unseen real images, against the reference without them and their copies; whether there are any."""
        count = len(self.plan.judged)
        chosen = unseen[: count if self.plan.held_out else min(count, len(unseen) // FLOOR)]
        if len(chosen) < 2:
            return False
        images = self.ruler.see(source, chosen)
        # A copy of a training image under another name was seen.
        fresh = ~np.isin(images.digests, self.contents)
        images = images.take(fresh)
        kept = _without(self.ruler.reference, images.digests)
        if len(images) < 2 or kept is None:
            return False
        yardstick = self.yardstick
        if kept is not self.ruler.reference:
            yardstick = Yardstick.of(kept.stats, kept.images, self.contents)
        other = self.second.see(source, chosen).take(fresh) if self.second else None
        apart = _without(self.second.reference, images.digests) if self.second else None
        self._add("real", images, other, yardstick, apart)
        return True

    def _add(
        self, name: str, images: Images, other: Images | None, yardstick: Yardstick, apart: Reference | None
    ) -> Compared:
        # One definition of the distance of classes a report: two must not be compared.
        compared = yardstick.compare(images, self.rows[0]["class_covariance"] if self.rows else None)
        row = {**yardstick.row(name, compared), "spatial_distance": None, "inception_score": None}
        row["second_distance"] = None
        if other is not None and self.second is not None:
            reference = apart or self.second.reference
            distance = metrics.frechet_distance(metrics.statistics(other.features), reference.stats)
            row["second_distance"] = round(distance.value, 4)
        self.rows.append(row)
        return compared


def _without(reference: Reference, digests: Array) -> Reference | None:
    """The reference without some images; itself where it has none of them, None where too few are left."""
    if reference.images is None:
        return reference
    own = np.isin(reference.images.digests, digests[digests != ""])
    if np.sum(~own) < FEWEST:
        return None
    if not own.any():
        return reference
    images = reference.images.take(~own)
    return Reference(metrics.statistics(images.features), None, images)


def _measure(plan: Plan, progress: Progress) -> dict[str, Any]:
    config, folder = plan.config, plan.config.folder
    ruler, second = _rulers(plan, progress)
    spaces = (ruler.space, second.space if second else None)
    train = Seen.of(_chunks(plan.train), *spaces) if plan.train is not None else None
    contents = train.images.digests[train.images.digests != ""] if train else np.empty(0, "U32")
    yardstick = Yardstick.of(ruler.reference.stats, ruler.reference.images, contents if train else None)
    table = _Table(plan, ruler, second, yardstick, contents)
    start, shown = time.perf_counter(), list[Array]()
    judged = replace(plan.judged, progress=progress) if isinstance(plan.judged, Drawn) else plan.judged
    generated = Seen.of(_chunks(judged, shown, config.export_npz), *spaces)
    sampling = plan.drawing if plan.drawing is not None else round(time.perf_counter() - start, 1)
    if generated is None or len(generated) < 2:
        raise D2CError("too few images to measure", where=config.judged, expected="two at least, and readable")
    save_png(grid(np.concatenate(shown), 10, side=64), folder / GRID)
    compared = table.seen("generated", generated)
    if train is not None and len(train) > 1:
        table.seen("replay", train)
    table.random_real()
    source, unseen = _unseen(plan)
    floor = source is not None and table.floor(source, unseen)
    files, copying = [REPORT, GRID], None
    if source is not None and train is not None:
        numbers = class_numbers(source.classes, plan.classes)
        pictures = FromSource(source, unseen[:HELD_OUT], plan.side, numbers, frozenset(contents.tolist()))
        held_out = Seen.of(_chunks(pictures), ruler.space)
        if held_out and len(held_out) >= FEWEST:
            copying, closest, copied = copy_check(generated, train, held_out)
            table.rows[0]["copy_rate"] = copying[copying["worse"]]["rate"]
            _save_pairs(plan, generated.rows[closest].tolist(), train.rows[copied].tolist(), folder / CLOSEST)
            files.append(CLOSEST)
    spent = {
        **ledger.costs(plan.workspace, plan.artifact, config.judged if plan.generator else None, sampling),
        "device": plan.device.type,
    }
    rulers = ledger.rulers(plan.artifact, ruler.space.name, second.space.name if second else None)
    known = copying[copying["worse"]] if copying else None
    report = {
        "space": _space(ruler.space),
        "second": _space(second.space) if second else None,
        "reference": fid_report.reference_facts(plan, ruler.reference),
        "protocol": fid_report.protocol(plan, len(generated), ruler.reference),
        "rows": table.rows,
        "intervals": {**yardstick.intervals(compared, config.seed), "method": intervals.METHOD},
        "classes": yardstick.classes(compared, {row.id: row.name for row in plan.classes}),
        "copying": copying,
        "copy_rate": known["rate"] if known else None,
        "copy_rate_interval": known["interval"] if known else None,
        "copy_rate_held_out": known["held_out_rate"] if known else None,
        "copying_flagged": copying["flagged"] if copying else None,
        "rulers": rulers,
        "costs": spent,
        "payback": fid_report.payback(plan, spent),
        "files": files,
    }
    return {**report, "notes": fid_report.notes(plan, report, ruler.reference, floor=floor)}


def _chunks(
    pictures: Pictures, shown: list[Array] | None = None, export: Path | None = None
) -> Iterator[tuple[Array, Array, Array, Array]]:
    """Labels, pixels, digests and rows of a set; the first images are also ``shown``, all of them also exported."""
    chunks = list[Any]()

    def pixels() -> Iterator[Array]:
        for chunk in pictures.chunks():
            chunks.append(chunk)
            yield chunk.pixels

    stream = exported(export, pixels(), len(pictures), pictures.side) if export else pixels()
    kept = 0
    for images in stream:
        if shown is not None and kept < SHOWN:
            shown.append(images[: SHOWN - kept].copy())
            kept += len(shown[-1])
        chunk = chunks.pop()
        yield chunk.labels, images, chunk.digests, chunk.rows


def _save_pairs(plan: Plan, rows: list[int], copied: list[int], path: Path) -> None:
    assert plan.train is not None
    pairs = np.stack([plan.judged.pick(rows), plan.train.pick(copied)], axis=1)
    save_png(grid(pairs.reshape(-1, *pairs.shape[2:]), 16, side=64), path)


def _rows(plan: Plan, source: Source, purpose: str, limit: int) -> list[int]:
    """At most ``limit`` images, drawn at random; of the scored source, those that were scored."""
    if source is plan.scored and plan.workspace:
        return scored_rows(plan.workspace, source, limit, purpose)
    return drawn(len(source), limit, purpose)


def _unseen(plan: Plan) -> tuple[Source | None, list[int]]:
    """Real images, in random order, that nothing was trained on as far as their names say: those kept back, else of
    the reference, else of what an artifact was chosen from.
    """
    source = plan.held_out or plan.source or (plan.scored if plan.artifact else None)
    if source is None:
        return None, []
    rows = list(range(len(source))) if plan.held_out else _rows(plan, source, "unseen", len(source))
    if source is plan.scored and plan.artifact:
        keys = {plan.artifact.info(row)["source_key"] for row in range(len(plan.artifact))}
        rows = [row for row in rows if source.keys[row] not in keys]
    return source, [rows[i] for i in runtime.rng("unseen", plan.config.seed).permutation(len(rows))]


def _space(space: FeatureSpace) -> dict[str, str]:
    return {"name": space.name, "digest": space.digest, "distance": distance_name(space)}
