"""Pack: latents, labels and attachments into a versioned, hashed artifact (formats, format 1.0).

Each shard is one part: what a shard holds depends on the picks and the seed alone, so a killed pack resumes by shard
and any number of processes writes the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2c import __version__, readback, runtime
from d2c import picks as picked
from d2c.config import differences, execution, identity
from d2c.contents import Contents, check_own, packed_from
from d2c.errors import D2CError, UsageError
from d2c.latents import LatentCodec, open_codec
from d2c.picks import Picks
from d2c.progress import Bar, Progress, Silent
from d2c.runtime import Ranks
from d2c.sources import Source, open_source
from d2c.tokens import CODECS, TokenCodec, VisionTokens, seen, vision_facts
from d2c.workspace import Workspace
from formats import codecs, open_artifact
from formats.codecs import Fidelity
from formats.hashing import xxh3_json
from formats.layout import MANIFEST
from formats.licence import check_licence
from formats.schema import CONTAINERS, LATENT, RECIPE, RMS, Container, View, view_column
from formats.shards import Sample
from formats.swap import tidy
from formats.writer import ArtifactWriter

ENCODE_BATCH = 32
"""Images per codec call. Part of the bytes: another batch may round the VAE's sums another way."""


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """How to pack. ``selection``, ``text`` and ``vision`` are folder names in the workspace; None attaches nothing."""

    workspace: Path = execution()
    out: Path = execution()
    selection: str
    text: str | None = None
    vision: str | None = None
    views: tuple[View, ...] = ("orig",)
    """What is stored of each image: as it is, or also its mirror image, encoded anew."""
    tokens: TokenCodec = "int8"
    """How vision tokens are stored; what that costs is measured and written into the manifest."""
    container: Container = "tar"
    shards: int | None = None
    licence: str = ""
    """SPDX expression of the source's licence; publishing refuses an empty one."""
    source_terms: str = ""
    """Where the source's terms of use can be read; publishing refuses an empty one."""
    seed: int = 0
    device: str = execution("auto")
    gpus: int = execution(1)
    threads: int = execution(4)
    overwrite: bool = execution(False)

    def __post_init__(self) -> None:
        if self.container not in CONTAINERS:
            raise UsageError("unknown container", found=self.container, expected=", ".join(CONTAINERS))
        check_licence(self.licence, self.source_terms)
        if self.tokens not in CODECS:
            raise UsageError("unknown token codec", found=self.tokens, expected=", ".join(CODECS))
        if self.shards is not None and self.shards < 1:
            raise UsageError("an artifact needs at least one shard", found=self.shards)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `run` will write, and why; no reasons: the artifact is there already."""

    config: PackingConfig
    contents: Contents
    asked: dict[str, dict[str, Any]]
    """Options and digests of inputs that decide the artifact's bytes; kept in its manifest."""
    reasons: list[str]

    @property
    def shards(self) -> int:
        """Shards asked for, or 8, 16 or 64 by the number of samples, and never more than samples."""
        count = len(self.contents.picks)
        default = 8 if count < 5_000 else 16 if count <= 50_000 else 64
        return min(self.config.shards or default, count)


@dataclass(frozen=True)
class Result:
    """A finished artifact."""

    path: Path
    content_id: str
    samples: int
    bytes: int
    patch: int
    """Patch side of a model whose tokens lie on the stored vision tokens' grid; 2 where none are stored."""


@dataclass(frozen=True)
class _Job:
    plan: Plan
    progress: Progress


def plan(config: PackingConfig) -> Plan:
    """Join the selection with its attachments and compare the whole with what lies at ``config.out``.

    Raises:
        D2CError: a stage before this one has not finished, or ``out`` holds something else.
    """
    workspace = Workspace(config.workspace)
    scores = workspace.scores.require("d2c score DIR")
    chosen = workspace.selected(config.selection)
    text_stage = workspace.text(config.text) if config.text else None
    vision_stage = workspace.vision(config.selection, config.vision) if config.vision else None
    text = text_stage.require("d2c attach") if text_stage else None
    vision = vision_stage.require("d2c attach") if vision_stage else None
    tokens = VisionTokens.open(vision_stage) if vision_stage else None
    if tokens is not None and tokens.views < len(config.views):
        raise D2CError(
            "the vision tokens are not there for all views that the artifact is to hold",
            where=workspace.path,
            found="orig",
            expected=", ".join(config.views),
            hint=f"d2c attach --views {','.join(config.views)}",
        )
    summary = scores.summary
    fields = {
        "name": f"{summary['source']['name']}-{config.selection}",
        "latent": {key: value for key, value in summary["codec"].items() if key != "name"},
        "encoders": {
            "text": text.summary if text else None,
            "vision": vision_facts(vision.config, vision.summary) if vision else None,
        },
        "source": {key: summary["source"][key] for key in ("name", "kind", "files", "fingerprint", "labels")},
        "selection": {
            **chosen.config,
            **({"features": chosen.summary["features"]} if "features" in chosen.summary else {}),
            "scorer": summary["scorer"]["facts"],
            "scores": {**scores.config, "codec": summary["codec"]["encoder"] or "rgb"},
        },
        "seeds": {"pack": config.seed, "selection": chosen.config.get("seed"), "score": scores.config["seed"]},
    }
    contents = Contents(
        source=summary["source"]["path"],
        codec=scores.config["codec"],
        size=scores.config["size"],
        picks=picked.load(workspace, config.selection),
        classes=workspace.classes(),
        fields=fields,
        text=text_stage.path if text_stage else None,
        views=config.views,
        tokens=tokens,
        token_codec=CODECS[config.tokens],
    )
    records = {"scores": scores, "selection": chosen, "text": text, "vision": vision}
    inputs = {name: record.digest if record else None for name, record in records.items()}
    made = plan_contents(config, contents, inputs)
    if made.reasons and not config.overwrite:
        check_own(workspace, config.out, config.container)
    return made


def plan_source(config: PackingConfig, source: Source, picks: Picks, codec: str, size: int) -> Plan:
    """Plan to pack images that were not scored, without attachments: what a scorer is trained on."""
    spec = open_codec(codec, size, torch.device("cpu")).spec
    fields = {
        "name": f"{source.name}-{config.selection}",
        "latent": spec.to_dict(),
        "encoders": {"text": None, "vision": None},
        "source": {"name": source.name, "kind": source.kind, "files": len(source), "fingerprint": None},
        "selection": {"method": config.selection, "images": len(picks)},
        "seeds": {"pack": config.seed},
    }
    classes = [{"id": c.id, "name": c.name, "source_id": c.source_id} for c in source.classes]
    contents = Contents(
        source=source.location, codec=codec, size=size, picks=picks, classes=classes, fields=fields, unscored=True
    )
    return plan_contents(config, contents, {"source": source.digest, "codec": spec.weights_xxh3, "size": size})


def run(plan: Plan, progress: Progress | None = None) -> Result:
    """Write every shard that is not written yet, then the manifest; read the whole back as another team would.

    Raises:
        IntegrityError: another reader sees other bytes; nothing is put at ``out`` then.
    """
    progress = progress or Silent()
    config = plan.config
    if plan.reasons:
        device = runtime.resolve_device(config.device)
        # Of several ranks the first holds the lock; the others write shards beside it.
        writer = runtime.once(lambda: _open(plan))
        with writer or contextlib.nullcontext():
            runtime.launch(_write_shards, _Job(plan, progress), workers=min(config.gpus, plan.shards), device=device)
            runtime.once(lambda: _finish(writer, plan) if writer else None)
    else:
        runtime.once(lambda: tidy(config.out.resolve()))
    runtime.once(lambda: Workspace(config.workspace).note_packed(config.out / MANIFEST))
    artifact = open_artifact(config.out)
    vision = artifact.manifest["encoders"]["vision"]
    patch = artifact.manifest["latent"]["size"] // vision["grid"] if vision else 2
    return Result(
        path=config.out, content_id=artifact.content_id, samples=len(artifact), bytes=artifact.bytes, patch=patch
    )


def plan_contents(config: PackingConfig, contents: Contents, inputs: dict[str, Any]) -> Plan:
    """Plan to pack what was gathered elsewhere; ``inputs`` are digests of all that it depends on.

    Raises:
        D2CError: there is nothing to pack, or ``out`` holds something else.
    """
    if not len(contents.picks):
        raise D2CError("there is nothing to pack", where=contents.source, hint="select at least one image")
    asked = {"options": identity(config), "inputs": inputs}
    before = None if config.overwrite else packed_from(config.out)
    foreign = not (config.out / MANIFEST).exists() and config.out.exists()
    if foreign and (not config.out.is_dir() or any(config.out.iterdir())):
        raise D2CError(
            "there is something else where the artifact should go",
            where=config.out,
            expected="a new or empty folder, or a d2c artifact",
            hint="choose another folder with --out",
        )
    if before is None:
        reasons = ["not packed yet"]
    else:
        reasons = differences(before.get("options", {}), asked["options"])
        reasons += [f"{line.split(':')[0]} changed" for line in differences(before.get("inputs", {}), inputs)]
    return Plan(config=config, contents=contents, asked=asked, reasons=["--overwrite"] if config.overwrite else reasons)


def _open(plan: Plan) -> ArtifactWriter:
    writer, contents = _writer(plan), plan.contents
    if contents.tokens is not None and contents.coded:
        rms, tokens = contents.rms, contents.tokens
        # The same for every view: a mirror image has the same statistics.
        measured = cache(lambda: tokens.rms() if rms is None else rms)
        for view in contents.views:
            writer.codec_array(view_column(contents.token_column, view), RMS, measured)
    return writer


def _writer(plan: Plan, *, lock: bool = True) -> ArtifactWriter:
    config = plan.config
    return ArtifactWriter(
        config.out,
        config.container,
        plan.contents.columns,
        plan.shards,
        config_digest=xxh3_json(plan.asked),
        lock=lock,
    )


def _write_shards(ranks: Ranks, job: _Job) -> None:
    plan, config, contents = job.plan, job.plan.config, job.plan.contents
    device = runtime.resolve_device(config.device)
    order = contents.storage_order(config.seed)
    bounds = [len(order) * i // plan.shards for i in range(plan.shards + 1)]
    with runtime.one_thread(device):
        # The picks know their labels: whatever labels the images have here is no matter.
        source = open_source(contents.source, labels="none")
        codec = open_codec(contents.codec, contents.size, device)
        # Where the weights lie, and what they are called there, is no matter.
        if replace(codec.spec, encoder=contents.latent.encoder, revision=contents.latent.revision) != contents.latent:
            raise D2CError(
                "the latent codec is not the one that the images were scored with",
                where=contents.codec,
                found=f"weights {codec.spec.weights_xxh3 or 'none'}",
                expected=f"weights {contents.latent.weights_xxh3 or 'none'}",
                hint="put the old weights back, or run d2c score again",
            )
        writer = _writer(plan, lock=False)
        rms = _rms(writer, contents)
        finished = writer.done_shards()
        shown = job.progress if ranks.main else Silent()
        done = sum(bounds[i + 1] - bounds[i] for i in finished)
        with shown.bar("pack", len(order), "image", done=done) as bar:
            for shard in range(ranks.rank, plan.shards, ranks.world):
                if shard not in finished:
                    rows = order[bounds[shard] : bounds[shard + 1]]
                    coded = [view_column(contents.token_column, v) for v in contents.views] if contents.coded else []
                    costs = {name: Fidelity() for name in coded}
                    writer.write(
                        shard, _samples(plan, source, codec, rms, costs, rows, bounds[shard], bar, ranks.world), costs
                    )


def _rms(writer: ArtifactWriter, contents: Contents) -> np.ndarray[Any, Any] | None:
    return writer.codec_array(contents.token_column, RMS) if contents.coded else None


def _samples(
    plan: Plan,
    source: Source,
    codec: LatentCodec,
    rms: np.ndarray[Any, Any] | None,
    costs: Mapping[str, Fidelity],
    rows: list[int],
    first: int,
    bar: Bar,
    world: int,
) -> Iterator[Sample]:
    contents = plan.contents
    place = {row: first + offset for offset, row in enumerate(rows)}
    for batch in picked.read(
        source,
        contents.picks,
        rows,
        contents.size,
        batch=ENCODE_BATCH,
        threads=plan.config.threads,
        keep_bad=contents.unscored,
    ):
        raw = {view: codec.encode(seen(batch.pixels, view)) for view in contents.views}
        table = contents.picks.table.take(batch.indices).to_pylist()
        for i, (row, facts) in enumerate(zip(batch.indices, table, strict=True)):
            arrays: dict[str, np.ndarray[Any, Any]] = {}
            for number, view in enumerate(contents.views):
                arrays[view_column(LATENT, view)] = raw[view][i]
                if (tokens := contents.tokens) is not None:
                    name = view_column(contents.token_column, view)
                    cost = costs.get(name, Fidelity())
                    arrays |= codecs.stored(name, contents.token_codec, tokens.patches(int(row), number), rms, cost)
                    if tokens.class_token:
                        whole = view_column(f"{contents.token_column}_cls", view)
                        arrays[whole] = tokens.class_vector(int(row), number)
            info = {
                "source_key": facts["key"],
                "class_id": facts["label"],
                "source_xxh3": batch.digests[i],
                "source_bytes": batch.sizes[i],
                "width": batch.crops[i][0],
                "height": batch.crops[i][1],
                "score": facts["score"],
                "selection_rank": facts["rank"],
            }
            yield Sample(f"{place[int(row)]:08d}", facts["label"], arrays, info)
        bar.advance(len(table) * world)


def _finish(writer: ArtifactWriter, plan: Plan) -> None:
    contents, config = plan.contents, plan.config
    fields = {
        **contents.fields,
        "preprocess": {"crop": "adm-center-crop", "size": contents.size},
        "licence": {
            "spdx": config.licence,
            "source_terms": config.source_terms,
            **contents.licence,
            "images_included": contents.codec == "rgb" and config.container != RECIPE,
        },
        "tool": {"d2c": __version__},
        "packed_from": plan.asked,
        **(contents.judge(writer.index()) if contents.judge else {}),
    }
    chosen = contents.picks.table.select(["key", "label", "rank"]).to_pylist()
    rows, tables = contents.class_rows(writer.labels()), contents.class_tables()
    # Before it takes its place: what fails here, or is killed, is not packed yet.
    writer.finish(fields, rows, tables, chosen, check=None if config.container == RECIPE else readback.check)
