"""Overview: one page about a finished selection, with pictures and with measurements beside random selections.

Everything is read: scores, picks, features, and the images, of which the page keeps small copies. Nothing stays in the
workspace but what `d2c fid` leaves there too: the judging classifier, and real images seen by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2c import contact_sheets, overview_page, report, runtime
from d2c.config import execution
from d2c.contact_sheets import Chosen, Sheet
from d2c.judge import RealImages, open_space, scored_rows
from d2c.labelling import reopen
from d2c.overview_page import MEASURES, ClassSheets, Overview, Sheets, Space
from d2c.progress import Progress, Silent
from d2c.report import Thumbnail
from d2c.selectors import METHODS
from d2c.sources import Source
from d2c.subsets import Clusters, FullSet, beside, random_like
from d2c.workspace import FEATURES, SCORES, SELECTION, Record, Workspace
from formats.files import read_table

Array: TypeAlias = np.ndarray[Any, Any]
REFERENCE = 50_000
"""Images that stand for the full set in the classifier's space, at most: the same that `d2c fid` measures against."""
SHOWN, PAIRS = 60, 30
"""Pictures of a sheet, and pairs of borderline images, of the whole selection."""
CLASSES, OF_CLASS, PAIRS_OF_CLASS = 20, 24, 8
"""Classes that are shown one by one, and how much of each."""
_MADE_BY = "d2c select --ratio R"


@dataclass(frozen=True, kw_only=True)
class OverviewConfig:
    """What the page is about. ``features``: finished ones to measure in; ``inside``: smaller selections to list."""

    workspace: Path = execution()
    selection: str
    out: Path = execution()
    features: str | None = None
    inside: tuple[str, ...] = ()
    subsets: int = 5
    seed: int = 0
    device: str = execution("auto")
    threads: int = execution(4)


@dataclass(frozen=True)
class Plan:
    """The finished stages that the page is made from."""

    config: OverviewConfig
    scores: Record
    selection: Record
    features: Record | None


@dataclass(frozen=True)
class Result:
    """The page, and what was measured: rows of space, measure, value, random_mean, random_sd, z."""

    path: Path
    measured: list[dict[str, Any]]


def plan(config: OverviewConfig) -> Plan:
    """Check that the stages are there and belong together.

    Raises:
        D2CError: one is missing, or the images were scored again after they were selected.
    """
    workspace = Workspace(config.workspace)
    scores = workspace.scores.require("d2c score DIR")
    selection = workspace.selected(config.selection)
    features = None if config.features is None else workspace.features(config.features).require(_MADE_BY)
    return Plan(config, scores, selection, features)


def run(plan: Plan, progress: Progress | None = None) -> Result:
    """Measure, choose pictures, and write the page.

    Raises:
        D2CError: the images are no longer where they were, or cannot be read.
    """
    progress, config = progress or Silent(), plan.config
    chosen, source = _chosen(plan), reopen(Workspace(config.workspace))
    subsets = [chosen.rows]
    subsets += [random_like(chosen.labels, chosen.quotas, config.seed + number) for number in range(config.subsets)]
    spaces, distances, clusters = _in_features(plan, chosen, subsets)
    notes = list(plan.selection.summary.get("confidence", {}).get("notes", []))
    if np.count_nonzero(chosen.sizes) < 2 or len(chosen.labels) < 20:
        notes.append("A classifier to judge by needs two classes and 20 images: there is none.")
    else:
        space, found = _in_classifier(plan, chosen, subsets, source, progress)
        spaces.append(space)
        distances = found if distances is None else distances
    sheets = _sheets(plan, chosen, distances)
    rows = [row for sheet in sheets for row in sheet.rows]
    size = int(plan.scores.config["size"])
    known = contact_sheets.thumbnails(chosen, rows, source, size, threads=config.threads, progress=progress)
    classes = _worst_first(chosen, distances)
    overview = Overview(
        name=config.selection,
        asked=_asked(plan),
        costs=_costs(plan),
        inside=[(name, _images(plan, name)) for name in config.inside],
        shortfalls=plan.selection.summary["shortfalls"],
        score=str(plan.selection.config["score"]),
        scores=chosen.scores,
        picked=chosen.scores[chosen.rows],
        tenths=_tenths(chosen),
        per_class=chosen.quotas,
        sizes=chosen.sizes,
        spaces=spaces,
        subsets=config.subsets,
        clusters=clusters,
        near="in features" if _looks_at_images(plan) else "in rank by score",
        sheets=_pictures(sheets[0], known),
        classes=[
            ClassSheets(
                name=chosen.names[label],
                images=int(chosen.sizes[label]),
                picks=int(chosen.quotas[label]),
                distance=None if distances is None or np.isnan(distances[label]) else float(distances[label]),
                sheets=_pictures(sheet, known),
            )
            for label, sheet in zip(classes, sheets[1:], strict=True)
        ],
        confident="confidence" in plan.selection.summary,
        notes=notes,
    )
    report.write(config.out, overview_page.page(overview))
    measured = [
        {"space": space.name, "measure": name, **found} for space in spaces for name, found in space.rows.items()
    ]
    if clusters is not None:
        measured.append({"space": spaces[0].name, "measure": "clusters", **clusters[1]})
    return Result(config.out, measured)


def _chosen(plan: Plan) -> Chosen:
    workspace, config = Workspace(plan.config.workspace), plan.config
    column = str(plan.selection.config["score"])
    table = read_table(workspace.scores.output(SCORES), columns=["key", "label", column])
    picked = read_table(workspace.selection(config.selection).output(SELECTION), columns=["key"])["key"]
    features = None
    if config.features is not None:
        path = workspace.features(config.features).path / FEATURES
        features = np.load(path, mmap_mode="r", allow_pickle=False)
    return Chosen(
        keys=table["key"],
        labels=table["label"].to_numpy(),
        scores=table[column].to_numpy().astype(np.float64),
        features=features,
        names=[row["name"] for row in plan.scores.summary["classes"]],
        rows=pc.index_in(picked, value_set=table["key"].combine_chunks()).to_numpy().astype(np.int64),
    )


def _looks_at_images(plan: Plan) -> bool:
    """The selection was made in the features that are measured in."""
    method = METHODS.get(plan.selection.config["method"])
    return (method is None or method.features) and plan.selection.config.get("features") == plan.config.features


def _in_features(
    plan: Plan, chosen: Chosen, subsets: list[Array]
) -> tuple[list[Space], Array | None, tuple[int, dict[str, float | None]] | None]:
    """The rows of the features' space, the distances of the classes [C], and the clusters; nothing without features."""
    features = chosen.features
    if features is None or plan.features is None:
        return [], None, None
    full = FullSet.of(features, chosen.labels, len(chosen.names), len(chosen.rows))
    seen = ((features[rows], chosen.labels[rows]) for rows in subsets)
    name = f"Features of {_encoder(plan.features)}"
    space, distances = _space(name, full, seen, selectors_own=_looks_at_images(plan))
    groups = Clusters(features, full.stats, len(chosen.rows))
    covered = [groups.covered(features[rows]) for rows in subsets]
    return [space], distances, (groups.count, beside(covered[0], covered[1:]))


def _in_classifier(
    plan: Plan, chosen: Chosen, subsets: list[Array], source: Source, progress: Progress
) -> tuple[Space, Array]:
    """The rows of the classifier's space, for a random part of the full set, and the distances of the classes [C]."""
    workspace, size = Workspace(plan.config.workspace), int(plan.scores.config["size"])
    device = runtime.resolve_device(plan.config.device)
    judge = open_space(workspace, source, size, None, device, progress)
    real = RealImages(source, size, judge, np.arange(len(chosen.names)), progress, workspace)
    reference = real.reference(scored_rows(workspace, source, REFERENCE, "reference"), device)
    assert reference.images is not None
    places = chosen.places(source, np.unique(np.concatenate(subsets)))
    images = real.see(places[places >= 0].tolist(), reference)
    # Joined by content: what cannot be read, or is no longer what was scored, is left out.
    known, firsts = np.unique(images.digests, return_index=True)
    digests = read_table(workspace.scores.output(SCORES), columns=["xxh3"])["xxh3"]

    def seen(rows: Array) -> tuple[Array, Array]:
        own = np.array(digests.take(pa.array(rows)).to_pylist(), dtype=known.dtype)
        at = np.minimum(np.searchsorted(known, own), len(known) - 1)
        there = known[at] == own
        return images.features[firsts[at[there]]], chosen.labels[rows[there]]

    full = FullSet.of(reference.images.features, reference.images.labels, len(chosen.names), len(chosen.rows))
    return _space("A classifier of this data", full, map(seen, subsets), selectors_own=False)


def _space(
    name: str, full: FullSet, seen: Iterable[tuple[Array, Array]], *, selectors_own: bool
) -> tuple[Space, Array]:
    """Rows for the picks, which come first in ``seen``, beside the others; and the distances of the classes [C]."""
    picks, *random = [full.measure(features, labels) for features, labels in seen]
    rows = {measure: beside(getattr(picks, measure), [getattr(one, measure) for one in random]) for measure in MEASURES}
    return Space(name, full.stats.n, full.nearest, selectors_own, rows), picks.by_class


def _worst_first(chosen: Chosen, distances: Array | None) -> list[int]:
    """At most `CLASSES` classes, by how badly the picks cover them; those without picks first."""
    share = chosen.quotas / np.maximum(chosen.sizes, 1)
    badness = -share if distances is None else np.where(np.isnan(distances), -1.0, distances)
    order = np.lexsort((np.arange(len(share)), -badness, chosen.quotas > 0))
    return [int(label) for label in order if chosen.sizes[label]][:CLASSES]


def _sheets(plan: Plan, chosen: Chosen, distances: Array | None) -> list[Sheet]:
    """Of the whole selection, then of the classes `_worst_first`."""
    seed, by_features = plan.config.seed, _looks_at_images(plan)
    whole = contact_sheets.draw(chosen, SHOWN, PAIRS, by_features=by_features, seed=seed)
    return [whole] + [
        contact_sheets.draw(chosen, OF_CLASS, PAIRS_OF_CLASS, by_features=by_features, seed=seed, label=label)
        for label in _worst_first(chosen, distances)
    ]


def _pictures(sheet: Sheet, known: dict[int, Thumbnail]) -> Sheets:
    return Sheets(
        picked=[known[row] for row in sheet.picked if row in known],
        rejected=[known[row] for row in sheet.rejected if row in known],
        borderline=[(known[one], known[pick]) for one, pick in sheet.borderline if {one, pick} <= known.keys()],
    )


def _tenths(chosen: Chosen) -> Array:
    """[10] Picks in each tenth of their class by difficulty, easiest first."""
    sizes = chosen.sizes[chosen.labels[chosen.rows]]
    return np.bincount(chosen.ranks[chosen.rows] * 10 // sizes, minlength=10)


def _asked(plan: Plan) -> list[tuple[str, str]]:
    """The options of the selection in words, without those left alone, and how far its scores can be trusted."""
    config = plan.selection.config
    method = METHODS.get(config["method"])
    told = [("method", config["method"] + (f": {method.goal}" if method else ""))]
    budgets = {"ratio": "budget as share of all", "per_class": "budget a class", "total": "budget in all"}
    told += [(words, f"{config[name]:,}") for name, words in budgets.items() if config.get(name) is not None]
    for name in ("interval", "easiest", "features", "seed"):
        if config.get(name) is not None:
            told.append((name, str(config[name])))
    told.append(
        ("balance of classes", config["balance"] + (", what small ones lack is spread" if config["spread"] else ""))
    )
    judged = plan.selection.summary.get("confidence")
    if judged is not None:
        told.append(("confidence", _confidence(judged)))
    told.append(("difficulty", config["score"]))
    agree = plan.scores.summary["rank_correlation"]["expected"]
    if agree is not None and config["score"] == "score":
        told.append(
            ("trust in the scores", f"ranks of two scorings would agree at Spearman {agree:.2f}, inside a class")
        )
    return told


def _confidence(judged: dict[str, Any]) -> str:
    """The weight of a classifier's cross-entropies, and whether the classifier knows anything."""
    weight = f"weight {judged['weight']:g}"
    if judged["accuracy"] is None:
        return f"{weight}; no image could be left for trying the classifier"
    return (
        f"{weight}; the classifier, linear in the features, is right for {judged['accuracy']:.1%} of images that "
        f"it was not fitted to (mean over classes; by chance {judged['chance']:.1%})"
    )


def _costs(plan: Plan) -> list[tuple[str, float, str]]:
    stages = [("score", plan.scores), ("select", plan.selection)]
    if plan.features is not None:
        used = "" if _looks_at_images(plan) else " (for this page only)"
        stages.insert(1, (f"features of {_encoder(plan.features)}{used}", plan.features))
    if plan.selection.summary.get("confidence") is not None:
        judged = Workspace(plan.config.workspace).confidence(str(plan.selection.config["features"])).require(_MADE_BY)
        stages.insert(-1, ("confidence", judged))
    return [(name, float(record.cost["seconds"]), str(record.cost["device"])) for name, record in stages]


def _encoder(features: Record) -> str:
    return "a Parquet file" if features.config["encoder"] == "parquet" else str(features.config["encoder"])


def _images(plan: Plan, name: str) -> int:
    return int(Workspace(plan.config.workspace).selection(name).require(_MADE_BY).summary["images"])
