"""Rebuild a data set from a recipe and an own copy of its images, and check every array against the recipe's hashes.

The recipe becomes a workspace in which the images are scored and selected already, and the stages behind that run as
they always do. Equal hashes prove that the receiver has what the sender had.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from d2c import attachment, blueprint, packing, proof, runtime
from d2c.attachment import AttachmentConfig
from d2c.blueprint import HUB_ID, TEXT_TABLES, Blueprint, Vision, family
from d2c.contents import Contents
from d2c.errors import D2CError, UsageError
from d2c.labelling import OWN, assign
from d2c.latents import LatentSpec
from d2c.packing import PackingConfig
from d2c.picks import Picks
from d2c.progress import Progress, Silent
from d2c.sources import Source, open_source
from d2c.tokens import VisionTokens, save_array
from d2c.workspace import BEGUN, CLASSES, RECORD, SCORES, SELECTION, Stage, Workspace
from formats import Artifact, FormatError, open_artifact
from formats.files import read_json, write_json, write_table
from formats.layout import MANIFEST
from formats.schema import RAW, RECIPE, RMS, Container
from formats.writer import OWN_FIELDS

_NAME = "recipe"
"""Of the selection and the text in the rebuilt workspace."""


@dataclass(frozen=True, kw_only=True)
class RebuildRequest:
    """What a user asks of `rebuild`.

    ``scorer``, ``vision`` and ``codec`` name local weights where the recipe's encoders need some. ``approximate`` keeps
    arrays that differ from the recipe's, as another device or library rounds them, under a content id of their own.
    ``overwrite`` rebuilds anew and replaces another artifact at ``out``.
    """

    recipe: Path
    source: str
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
    overwrite: bool = False


@dataclass(frozen=True)
class Plan:
    """What `run` will do."""

    request: RebuildRequest
    recipe: Artifact
    blueprint: Blueprint
    source: Source
    codec: str
    vision: str | None
    """The encoder to run, None where the recipe has no vision tokens."""
    packing: packing.Plan
    """Without the attachments, which are made first."""
    replaced: str | None
    """Content id of the artifact at ``out``, "unreadable" where it tells none."""

    @property
    def reasons(self) -> list[str]:
        """Why it must run; none: the rebuilt artifact is there already, and `run` proves that it is the recipe's."""
        return self.packing.reasons


@dataclass(frozen=True)
class Result:
    """A rebuilt artifact. ``identical``: it has the recipe's content id. ``bytes``: of the files in its manifest."""

    path: Path
    content_id: str
    identical: bool
    samples: int
    bytes: int


def plan(request: RebuildRequest) -> Plan:
    """Open recipe and source, and check the recipe's settings, and that the source has its classes and images by name.

    Raises:
        D2CError: it has not, the recipe's encoder needs weights that nobody named, or something else is at ``out``.
        IntegrityError: the recipe is damaged, or its settings cannot be meant.
        UsageError: this is no recipe, or an option contradicts it.
    """
    recipe = open_artifact(request.recipe)
    if recipe.manifest["container"]["kind"] != RECIPE:
        raise UsageError(
            "this artifact is no recipe: its arrays are there already",
            where=request.recipe,
            hint=f"use it as it is: d2c verify {request.recipe}",
        )
    replaced = _occupant(request, recipe)
    settings = blueprint.read(recipe)
    codec, vision = _codec(request, settings.latent), _vision(request, settings)
    source = _source(request, recipe, settings)
    proof.check_names(source, recipe, settings)
    contents = _contents(request, recipe, settings, source, codec)
    # Not `approximate`: the shards are the same with it.
    inputs = {"recipe": recipe.content_id, "source": source.digest}
    packed = packing.plan_contents(_packing(request, settings), contents, inputs)
    if not packed.reasons and not request.approximate and proof.differs(request.out, recipe):
        packed = replace(packed, reasons=["approximate changed"])
    return Plan(request, recipe, settings, source, codec, vision, packed, replaced)


def run(plan: Plan, progress: Progress | None = None) -> Result:
    """Encode the images again and write the artifact; resumable like `pack`. What is there already is verified.

    Raises:
        IntegrityError: an image is not, byte for byte, the one that the recipe was made from; or arrays differ from
            the recipe's and ``approximate`` is off. Nothing is put at ``out`` then.
    """
    progress = progress or Silent()
    request, settings = plan.request, plan.blueprint
    if plan.reasons:
        workspace = Workspace(request.workspace)
        runtime.once(lambda: proof.check_images(plan.source, settings, progress, threads=request.threads))
        runtime.once(lambda: proof.check_codec(plan.codec, settings))
        runtime.once(lambda: _fill(workspace, plan))
        contents = plan.packing.contents
        if settings.text:
            text = workspace.text(_NAME).path
            runtime.once(lambda: _fill_text(text, plan.recipe))
            contents = replace(contents, text=text)
        if plan.vision is not None and settings.vision is not None:
            config = _attachment(plan, plan.vision, settings.vision)
            name = attachment.run(attachment.plan(config), progress).vision
            contents = _with_tokens(contents, workspace.vision(_NAME, str(name)), plan.recipe, settings.vision)
        packing.run(replace(plan.packing, contents=contents), progress)
    else:
        check = partial(proof.check_rebuilt, request.out, plan.recipe, progress, approximate=request.approximate)
        runtime.once(check)
    rebuilt = open_artifact(request.out)
    return Result(
        path=request.out,
        content_id=rebuilt.content_id,
        identical=rebuilt.content_id == plan.recipe.content_id,
        samples=len(rebuilt),
        bytes=rebuilt.bytes,
    )


def _occupant(request: RebuildRequest, recipe: Artifact) -> str | None:
    """What the artifact would replace, where that may be."""
    out = request.out.resolve()
    kept_folders = {"recipe": request.recipe, "source": Path(request.source), "workspace": request.workspace}
    for what, path in kept_folders.items():
        # A URL resolves to a place where nothing lies.
        kept = path.resolve()
        if kept.is_relative_to(out) or (what == "recipe" and out.is_relative_to(kept)):
            raise UsageError(
                f"the artifact would take the place of the {what}, or lie in the recipe",
                where=request.out,
                found=f"{what} {path}",
                hint="choose another folder with --out",
            )
    scores = Workspace(request.workspace).scores.path
    records = [read_json(scores / name) for name in (RECORD, BEGUN) if (scores / name).exists()]
    if any("recipe" not in record["inputs"] for record in records):
        raise D2CError(
            "this workspace holds scores of your own, which a recipe's would replace",
            where=request.workspace,
            hint="choose another folder with --workspace",
        )
    if not (out / MANIFEST).exists():
        return None
    made_from, content_id = None, "unreadable"
    try:
        manifest = read_json(out / MANIFEST)
        content_id = manifest["content_id"]
        made_from = manifest["packed_from"]["inputs"]["recipe"]
    except (FormatError, KeyError, TypeError):
        pass
    if made_from != recipe.content_id and not request.overwrite:
        raise D2CError(
            "there is an artifact here that was not rebuilt from this recipe",
            where=request.out,
            found=content_id,
            hint="choose another folder with --out, or replace it with --overwrite",
        )
    return str(content_id)


def _source(request: RebuildRequest, recipe: Artifact, settings: Blueprint) -> Source:
    if recipe.manifest["source"].get("labels", OWN) == OWN:
        return open_source(request.source)
    picks = settings.picks
    names = [row.name for row in recipe.classes]
    return assign(open_source(request.source, labels="none"), picks["key"], picks["label"].to_numpy(), names)


def _codec(request: RebuildRequest, latent: LatentSpec) -> str:
    given, own = request.codec, latent.encoder
    if latent.codec == "rgb" or given == "rgb":
        if given not in (None, latent.codec):
            raise UsageError(
                f"the recipe's codec is {latent.codec}",
                where=request.recipe,
                found=f"--codec {given}",
                hint="leave --codec out" if latent.codec == "rgb" else "leave --codec out, or name the VAE's folder",
            )
        return "rgb"
    if given is None:
        if not HUB_ID.fullmatch(own) or Path(own).exists():
            raise D2CError(
                "the recipe's VAE comes from a folder, which a recipe must not name",
                where=request.recipe,
                found=f"{own[:80]}, weights {latent.weights_xxh3}",
                hint="name it yourself: --codec FOLDER (saved by diffusers' AutoencoderKL)",
            )
        return own
    if given != "vae" and not HUB_ID.fullmatch(given) and not Path(given).expanduser().exists():
        raise UsageError(
            "there is no such VAE", found=f"--codec {given}", expected=f"vae, a hub id or a folder that holds {own}"
        )
    return given


def _vision(request: RebuildRequest, settings: Blueprint) -> str | None:
    recipe = settings.vision
    if recipe is None:
        return None
    given = request.vision or recipe.encoder
    if family(given) != family(recipe.encoder):
        raise UsageError(
            "the recipe has vision tokens that must be rebuilt, with their own encoder",
            where=request.recipe,
            found=f"--vision {given}",
            expected=recipe.encoder,
            hint="leave --vision out, or name the same encoder with local weights: --vision ENCODER:MODEL:FILE",
        )
    if recipe.from_scorer and request.scorer is None:
        raise D2CError(
            "the recipe's vision tokens come from its scorer",
            where=request.recipe,
            found=f"{settings.scorer['model']}, weights {settings.scorer['weights_xxh3']}",
            hint="name that model with --scorer: a run's folder or a weight file",
        )
    return given


def _packing(request: RebuildRequest, settings: Blueprint) -> PackingConfig:
    return PackingConfig(
        workspace=request.workspace,
        out=request.out,
        selection=_NAME,
        container=request.container,
        shards=request.shards,
        seed=settings.seed,
        device=request.device,
        gpus=request.gpus,
        threads=request.threads,
        overwrite=request.overwrite,
    )


def _attachment(plan: Plan, encoder: str, vision: Vision) -> AttachmentConfig:
    request = plan.request
    return AttachmentConfig(
        workspace=request.workspace,
        selection=_NAME,
        text=None,
        vision=encoder,
        views=plan.blueprint.views,
        grid=vision.grid,
        batch_size=vision.batch_size,
        precision=vision.precision,
        seed=vision.seed,
        device=request.device,
        gpus=request.gpus,
        threads=request.threads,
    )


def _fill(workspace: Workspace, plan: Plan) -> None:
    """Leave in the workspace what scoring and selecting would have left."""
    request, recipe, settings = plan.request, plan.recipe, plan.blueprint
    scorer: dict[str, Any] = {"spec": "", "facts": recipe.manifest["selection"].get("scorer")}
    if settings.scorer and request.scorer is not None:
        proof.check_scorer(request.scorer, settings)
        scorer["spec"] = workspace.remember(request.scorer)
    config = {"codec": plan.codec, "size": settings.size, "objective": settings.objective}
    inputs = {"recipe": recipe.content_id, "source": plan.source.digest}
    classes = [{"id": c.id, "name": c.name, "source_id": c.source_id, "count": c.count} for c in recipe.classes]
    summary = {
        "source": {**recipe.manifest["source"], "path": plan.source.location},
        "scorer": scorer,
        "classes": classes,
    }
    picks = _picks(settings).table
    scores, selection = workspace.scores, workspace.selection(_NAME)
    if scores.stale(config, inputs):
        with scores.locked():
            scores.begin(config, inputs)
            write_table(scores.path / SCORES, picks)
            write_json(scores.path / CLASSES, classes)
            scores.finish([SCORES, CLASSES], summary, device="cpu")
    chosen = {"scores": scores.require("d2c rebuild RECIPE").digest}
    if selection.stale({}, chosen):
        with selection.locked():
            selection.begin({}, chosen)
            write_table(selection.path / SELECTION, picks.select(["key", "label", "score", "class_rank", "rank"]))
            selection.finish([SELECTION], {"images": len(recipe)}, device="cpu")
    scores.refresh(**summary)


def _picks(settings: Blueprint) -> Picks:
    table = settings.picks.append_column("class_rank", settings.picks["rank"])
    # Only packing could use these, and it takes them from the images.
    kinds = {"bytes": pa.int64(), "width": pa.int32(), "height": pa.int32()}
    for name, kind in kinds.items():
        table = table.append_column(name, pa.nulls(len(table), kind))
    return Picks(table)


def _contents(request: RebuildRequest, recipe: Artifact, settings: Blueprint, source: Source, codec: str) -> Contents:
    dropped = (*OWN_FIELDS, "packed_from", "order", "preprocess", "licence", "tool")
    return Contents(
        source=source.location,
        codec=codec,
        size=settings.size,
        views=settings.views,
        picks=_picks(settings),
        classes=[{"id": c.id, "name": c.name, "source_id": c.source_id} for c in recipe.classes],
        fields={name: value for name, value in recipe.manifest.items() if name not in dropped},
        licence=settings.licence,
        judge=partial(proof.compare, str(request.recipe), request.approximate),
    )


def _fill_text(folder: Path, recipe: Artifact) -> None:
    write_json(folder / "prompts.json", [row.prompt for row in recipe.classes])
    for name in TEXT_TABLES:
        save_array(folder / f"{name}.npy", recipe.table(name))


def _with_tokens(contents: Contents, stage: Stage, recipe: Artifact, vision: Vision) -> Contents:
    tokens = VisionTokens.open(stage)
    proof.check_encoder(stage.require("d2c rebuild").summary, tokens.shape, vision)
    column = vision.column
    rms = None if column.codec == RAW else recipe.codec_array(column.name, RMS)
    return replace(contents, tokens=tokens, token_codec=column.codec, rms=rms)
