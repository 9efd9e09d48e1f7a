"""Rebuild a data set from a recipe and an own copy of its images, and check every array against the recipe's hashes.

The recipe becomes a workspace in which the images are scored and selected already, and the stages behind that run as
they always do. Equal hashes prove that the receiver has what the sender had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2c import __version__, attachment, packing, runtime
from d2c import picks as picked
from d2c.attachment import AttachmentConfig
from d2c.contents import Contents
from d2c.errors import D2CError, UsageError
from d2c.packing import PackingConfig
from d2c.progress import Progress, Silent
from d2c.scorers import load_denoiser
from d2c.sources import Source, open_source
from d2c.tokens import VisionTokens, save_array
from d2c.workspace import CLASSES, SCORES, SELECTION, Workspace
from formats import Artifact, IntegrityError, open_artifact
from formats.files import write_json, write_table
from formats.schema import RECIPE, RMS, Container
from formats.writer import OWN_FIELDS

_NAME = "recipe"
"""Of the selection and the text in the rebuilt workspace."""


@dataclass(frozen=True, kw_only=True)
class RebuildRequest:
    """What a user asks of `rebuild`.

    ``scorer``, ``vision`` and ``codec`` name local weights where the recipe's encoders need some. ``approximate`` keeps
    arrays that differ from the recipe's, as another device or library rounds them, under a content id of their own.
    """

    recipe: Path
    source: Path
    workspace: Path
    out: Path
    scorer: str | None = None
    vision: str | None = None
    codec: str | None = None
    approximate: bool = False
    container: Container = "tar"
    shards: int | None = None
    device: str = "auto"
    gpus: int = 1
    threads: int = 4


@dataclass(frozen=True)
class Plan:
    """What `run` will do."""

    request: RebuildRequest
    recipe: Artifact
    source: Source
    vision: str | None
    """The encoder to run, None where the recipe has no vision tokens."""


@dataclass(frozen=True)
class Result:
    """A rebuilt artifact. ``identical``: it has the recipe's content id."""

    path: Path
    content_id: str
    identical: bool
    samples: int
    bytes: int


def plan(request: RebuildRequest) -> Plan:
    """Open recipe and source, and check that the source has the recipe's classes and images by name.

    Raises:
        D2CError: it has not, or the recipe's encoder needs weights that nobody named.
        UsageError: this is no recipe.
    """
    recipe = open_artifact(request.recipe)
    if recipe.manifest["container"]["kind"] != RECIPE:
        raise UsageError(
            "this artifact is no recipe: its arrays are there already",
            where=request.recipe,
            hint=f"use it as it is: d2c verify {request.recipe}",
        )
    source = open_source(request.source)
    ours, theirs = [c.source_id for c in source.classes], [c.source_id for c in recipe.classes]
    if ours != theirs:
        raise D2CError(
            "the source has other classes than the recipe",
            where=request.source,
            found=_few(sorted(set(ours) - set(theirs)) or ours),
            expected=_few(sorted(set(theirs) - set(ours)) or theirs),
            hint="give the whole data set that the recipe names: d2c inspect RECIPE",
        )
    have = set(source.keys)
    lost = [key for key in (recipe.info(i)["source_key"] for i in range(len(recipe))) if key not in have]
    if lost:
        raise D2CError(
            "images of the recipe are not in the source",
            where=request.source,
            found=f"{len(lost)} of {len(recipe)} are missing: {_few(lost)}",
            hint="names are relative to the source's folder; the recipe's own is called "
            f"{recipe.manifest['source'].get('name')}",
        )
    return Plan(request, recipe, source, _vision(request, recipe))


def run(plan: Plan, progress: Progress | None = None) -> Result:
    """Encode the images again and write the artifact; resumable like `pack`.

    Raises:
        D2CError: an image is not, byte for byte, the one that the recipe was made from.
        IntegrityError: arrays differ from the recipe's, and ``approximate`` is off; nothing is left at ``out``.
    """
    progress = progress or Silent()
    request, recipe = plan.request, plan.recipe
    workspace = Workspace(request.workspace)
    runtime.once(lambda: _fill(workspace, plan))
    vision = None
    if plan.vision is not None:
        vision = attachment.run(attachment.plan(_attachment(plan, plan.vision)), progress).vision
    contents = _contents(plan, workspace, vision)
    packed = packing.run(packing.plan_contents(_packing(request), contents, {"recipe": recipe.content_id}), progress)
    return Result(
        path=packed.path,
        content_id=packed.content_id,
        identical=packed.content_id == recipe.content_id,
        samples=packed.samples,
        bytes=packed.bytes,
    )


def _vision(request: RebuildRequest, recipe: Artifact) -> str | None:
    asked = (recipe.manifest["encoders"].get("vision") or {}).get("asked")
    if asked is None:
        return None
    if asked["vision"].partition(":")[0] == "scorer" and request.scorer is None:
        scorer = recipe.manifest["selection"]["scorer"]
        raise D2CError(
            "the recipe's vision tokens come from its scorer",
            where=request.recipe,
            found=f"{scorer['model']}, weights {scorer['weights_xxh3']}",
            hint="name that model with --scorer: a run's folder or a weight file",
        )
    return request.vision or str(asked["vision"])


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _codec(request: RebuildRequest, recipe: Artifact) -> str:
    spec = recipe.manifest["latent"]
    return request.codec or ("rgb" if spec["codec"] == "rgb" else spec["encoder"])


def _packing(request: RebuildRequest) -> PackingConfig:
    return PackingConfig(
        workspace=request.workspace,
        out=request.out,
        selection=_NAME,
        container=request.container,
        shards=request.shards,
        seed=_seed(open_artifact(request.recipe)),
        device=request.device,
        gpus=request.gpus,
        threads=request.threads,
    )


def _seed(recipe: Artifact) -> int:
    return int(recipe.manifest["seeds"]["pack"])


def _attachment(plan: Plan, vision: str) -> AttachmentConfig:
    request, asked = plan.request, plan.recipe.manifest["encoders"]["vision"]["asked"]
    return AttachmentConfig(
        workspace=request.workspace,
        selection=_NAME,
        text=None,
        vision=vision,
        grid=asked["grid"],
        batch_size=asked["batch_size"],
        precision=asked["precision"],
        seed=asked.get("seed", 0),
        device=request.device,
        gpus=request.gpus,
        threads=request.threads,
    )


def _fill(workspace: Workspace, plan: Plan) -> None:
    """Leave in the workspace what scoring and selecting would have left."""
    request, recipe = plan.request, plan.recipe
    facts = [recipe.info(i) for i in range(len(recipe))]
    picks = pa.table(
        {
            "key": [fact["source_key"] for fact in facts],
            "label": pa.array(recipe.labels, pa.int32()),
            "score": pa.array([fact.get("score") for fact in facts], pa.float64()),
            "rank": pa.array([fact.get("selection_rank") for fact in facts], pa.int32()),
            "xxh3": [fact["source_xxh3"] for fact in facts],
            "bytes": pa.array([fact["source_bytes"] for fact in facts], pa.int64()),
            "width": pa.array([fact["width"] for fact in facts], pa.int32()),
            "height": pa.array([fact["height"] for fact in facts], pa.int32()),
        }
    ).sort_by("key")
    picks = picks.add_column(3, "class_rank", picks["rank"])
    scorer: dict[str, Any] = {"spec": "", "facts": recipe.manifest["selection"].get("scorer")}
    if request.scorer is not None:
        scorer["spec"] = workspace.remember(request.scorer)
        _check_scorer(request.scorer, scorer["facts"])
    settings = recipe.manifest["selection"].get("scores", {})
    config = {
        "codec": _codec(request, recipe),
        "size": recipe.manifest["preprocess"]["size"],
        "objective": settings.get("objective"),
    }
    inputs = {"recipe": recipe.content_id, "source": plan.source.digest}
    classes = [{"id": c.id, "name": c.name, "source_id": c.source_id, "count": c.count} for c in recipe.classes]
    summary = {
        "source": {**recipe.manifest["source"], "path": str(plan.source.path.resolve())},
        "scorer": scorer,
        "classes": classes,
    }
    scores, selection = workspace.scores, workspace.selection(_NAME)
    if scores.stale(config, inputs) or selection.stale({}, inputs):
        with scores.locked():
            scores.begin(config, inputs)
            write_table(scores.path / SCORES, picks)
            write_json(scores.path / CLASSES, classes)
            scores.finish([SCORES, CLASSES], summary, device="cpu")
            selection.begin({}, inputs)
            write_table(selection.path / SELECTION, picks.select(["key", "label", "score", "class_rank", "rank"]))
            selection.finish([SELECTION], {"images": len(recipe)}, device="cpu")
    scores.refresh(**summary)


def _check_scorer(name: str, facts: dict[str, Any] | None) -> None:
    found = load_denoiser(name, device="cpu").origin["weights_xxh3"]
    expected = (facts or {}).get("weights_xxh3")
    if found != expected:
        raise IntegrityError(
            "this scorer is not the recipe's",
            where=name,
            found=f"weights {found}",
            expected=f"weights {expected}",
            hint="ask the recipe's sender for the model",
        )


def _contents(plan: Plan, workspace: Workspace, vision: str | None) -> Contents:
    request, recipe = plan.request, plan.recipe
    dropped = (*OWN_FIELDS, "packed_from", "order", "preprocess", "licence", "tool")
    fields = {name: value for name, value in recipe.manifest.items() if name not in dropped}
    text = None
    if recipe.manifest["class_tables"]:
        text = workspace.text(_NAME).path
        runtime.once(lambda: _fill_text(text, recipe))
    tokens, codec, rms = None, "raw", None
    if vision is not None:
        stage = workspace.vision(_NAME, vision)
        _check_encoder(stage.require("d2c rebuild").summary, recipe.manifest["encoders"]["vision"])
        tokens = VisionTokens.open(stage)
        column = next(c for c in recipe.columns if c.name == recipe.manifest["encoders"]["vision"]["column"])
        codec, rms = column.codec, recipe.codec_array(column.name, RMS) if column.codec_arrays else None
    return Contents(
        source=plan.source.path,
        codec=_codec(request, recipe),
        size=int(recipe.manifest["preprocess"]["size"]),
        picks=picked.load(workspace, _NAME),
        classes=[{"id": c.id, "name": c.name, "source_id": c.source_id} for c in recipe.classes],
        fields=fields,
        text=text,
        tokens=tokens,
        token_codec=codec,
        rms=rms,
        licence={name: recipe.manifest["licence"].get(name, "") for name in ("spdx", "source_terms")},
        judge=partial(compare, str(request.recipe), request.approximate),
    )


def _fill_text(folder: Path, recipe: Artifact) -> None:
    write_json(folder / "prompts.json", [row.prompt for row in recipe.classes])
    for record in recipe.manifest["class_tables"]:
        save_array(folder / f"{record['name']}.npy", recipe.table(record["name"]))


def _check_encoder(found: dict[str, Any], expected: dict[str, Any]) -> None:
    if found["weights_xxh3"] != expected["weights_xxh3"]:
        raise IntegrityError(
            "this vision encoder is not the recipe's",
            found=f"{found['name']}, weights {found['weights_xxh3']}",
            expected=f"{expected['name']}, weights {expected['weights_xxh3']}",
            hint="name the right weights: --vision ENCODER:MODEL:FILE",
        )


def compare(recipe_path: str, approximate: bool, index: pa.Table) -> dict[str, Any]:
    """Compare a new artifact's index with the recipe's; returns the manifest fields that say what differs.

    Raises:
        IntegrityError: arrays differ, and ``approximate`` is off.
    """
    recipe = open_artifact(recipe_path)
    where = pc.index_in(recipe.index["key"], index["key"].combine_chunks())
    differing = {}
    for column in recipe.columns:
        name = f"{column.name}.xxh3"
        same = pc.equal(index[name].take(where), recipe.index[name])
        differing[column.name] = len(recipe) - int(np.count_nonzero(same.to_numpy()))
    if not any(differing.values()):
        return {}
    counts = ", ".join(f"{name}: {count} of {len(recipe)}" for name, count in differing.items() if count)
    if not approximate:
        raise IntegrityError(
            "the arrays that were made here are not the recipe's",
            where=recipe_path,
            found=f"other values in {counts}",
            expected="the recipe's hashes",
            hint="another device or library may round another way: --approximate keeps the arrays, says what differs, "
            "and gives them a content id of their own",
        )
    parent = {"content_id": recipe.content_id, "operation": "rebuild", "differing": differing, "d2c": __version__}
    return {"parents": [*recipe.manifest["parents"], parent]}
