"""What ``--dry-run`` says: which stages would run and why, and how much there is to do. Nothing is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from d2c.workspace import Workspace

if TYPE_CHECKING:
    from d2c.pipeline import PackRequest, SelectRequest
    from d2c.sampling import SamplerConfig
    from d2c.score_pipeline import ScoreRequest
    from d2c.selection import Plan as SelectionPlan
    from d2c.sources import Source

Facts = dict[str, Any]


def step(stage: str, reasons: Sequence[str], facts: Facts | None = None) -> Facts:
    """One stage of a plan, in the shape that a finished step has."""
    return {"stage": stage, "would_run": bool(reasons), "reasons": list(reasons), "facts": facts or {}}


def score(request: ScoreRequest, price: float | None = None) -> Facts:
    """The choices that the data makes, the scorer, and time and money where a scorer is there to be timed."""
    from d2c import choices, labelling, score_pipeline, scoring
    from d2c.batches import probe
    from d2c.sources import open_source

    workspace = Workspace(request.workspace)
    due = labelling.clustering_due(request.source, request.labels, workspace, request.seed)
    if due:
        source = open_source(request.source, labels="none")
    else:
        source = labelling.open_labelled(request.source, request.labels, workspace, seed=request.seed)
    codec, size = choices.choose_codec(source, request.codec, request.size)
    chosen = choices.choose_scorer(source, request.scorer, codec)
    facts: Facts = {
        "source": {
            "path": request.source,
            "labels": request.labels,
            "kind": source.kind,
            "images": len(source),
            "classes": len(source.classes),
            "bad_files": len(source.bad),
            "imagenet": source.is_imagenet,
            "notes": source.notes,
            "bytes": round(probe(source).mean_bytes * len(source)),
        },
        "codec": codec,
        "size": size,
        "scorer": chosen,
        "evaluations": len(source) * request.evals if request.target_rank_corr is None else None,
        "estimated_seconds": None,
    }
    if due:
        later = ["the clusters that serve as classes are not found yet"]
        return {**facts, "steps": [step("cluster", due, {"images": len(source)}), *_unknown(request, source, later)]}
    steps = []
    if chosen == choices.TRAIN_SCORER:
        scorer = score_pipeline.plan_scorer(request, source, codec, size)
        training = {
            "model": scorer.model,
            "images": len(scorer.images),
            "steps": scorer.recipe.steps,
            "passes_per_image": round(scorer.recipe.steps * scorer.recipe.batch_size / len(scorer.images), 1),
        }
        steps.append(step("train the scorer", scorer.reasons, training))
        if not scorer.done:
            after = ["the scorer is not trained yet, so the time is not known"]
            return {**facts, "steps": [*steps, *_unknown(request, source, after)]}
        facts["scorer"] = chosen = str(scorer.run)
    config = score_pipeline.scoring_config(request, codec, size, chosen)
    if request.target_rank_corr is not None:
        evals = score_pipeline.plan_evals(config, source, request.target_rank_corr)
        if evals.reasons:
            return {**facts, "steps": [*steps, *_unknown(request, source, evals.reasons)]}
        config = replace(config, evals=evals.found["evals"])
        steps.append(step("choose the evaluations", [], {"evals": config.evals, "tried": evals.found["tried"]}))
        facts["evaluations"] = len(source) * config.evals
    plan = scoring.plan(config, source)
    if plan.reasons:
        seconds = scoring.estimate_seconds(plan)
        facts["estimated_seconds"] = seconds / _workers(request.device, request.gpus)
        facts["worker_hours"] = round(seconds / 3600, 3)
        if request.share is not None:
            number, of = request.share
            facts["this_share"] = {"share": f"{number}/{of}", "worker_hours": round(seconds / 3600 / of, 3)}
        facts["price"] = None if price is None else round(price * seconds / 3600, 2)
    return {**facts, "steps": [*steps, step("score", plan.reasons, {"images": len(source)})]}


def _unknown(request: ScoreRequest, source: Source, reasons: list[str]) -> list[Facts]:
    """The last steps of `score` where what comes before them decides how long they take."""
    facts = {"images": len(source)}
    if request.target_rank_corr is None:
        return [step("score", reasons, facts)]
    after = ["the number of evaluations is not chosen yet, so the time is not known"]
    chosen = step("choose the evaluations", reasons, {"target": request.target_rank_corr})
    return [chosen, step("score", after, facts)]


def _workers(device: str, gpus: int) -> int:
    from d2c import runtime

    on_cpu = runtime.resolve_device(device).type == "cpu"
    return min(gpus, os.cpu_count() or 1) if on_cpu else gpus


def select(request: SelectRequest) -> list[Facts]:
    """The features that would be computed, and each selection as far as that allows to know."""
    from d2c import confidence, embedding, selection

    steps, features, due = [], None, False
    given = [int(selection.check(config).given.sum()) for config in request.configs(None)]
    if request.embedding is not None:
        embed = embedding.plan(request.embedding)
        features, due = embed.stage.path.name, bool(embed.reasons)
        steps.append(step("embed", embed.reasons, {"encoder": request.encoder, "images": embed.images}))
    configs, before = request.configs(features), "embed"
    if request.embedding is not None and configs[0].needs_confidence:
        reasons = ["after embed"]
        if not due:
            judge = confidence.plan(
                confidence.ConfidenceConfig(workspace=request.workspace, features=embed.stage.path.name)
            )
            reasons = judge.reasons
        steps.append(step("classify", reasons, {"images": embed.images}))
        due, before = bool(reasons), "classify"
    for config, images in zip(configs, given, strict=True):
        if due:
            steps.append(step("select", [f"after {before}"], {"selection": config.name, "images": images}))
        else:
            steps.append(selection_step(selection.plan(config)))
    return steps


def selection_step(plan: SelectionPlan) -> Facts:
    """What `select` would choose."""
    facts = {
        "selection": plan.config.name,
        "images": plan.images,
        "per_class": plan.per_class,
        "classes": len(plan.names),
        "classes_with_picks": int((plan.quotas.given > 0).sum()),
        "classes_short_of_budget": len(plan.shortfalls),
    }
    return step("select", plan.reasons, facts)


def attachment_steps(request: PackRequest, name: str, *, overwrite: bool = False) -> tuple[list[Facts], bool]:
    """What `attach` would do to a finished selection, and whether all of it is done already."""
    from d2c import attachment, pipeline

    config = replace(pipeline.attachment_config(request, name), overwrite=overwrite)
    plan = attachment.plan(config)
    text = {"encoder": config.text, "prompts": len(Workspace(request.workspace).classes())}
    vision = {"encoder": config.vision, "images": plan.images, "grid": config.grid}
    steps = [step("attach text", plan.text_reasons, text), step("attach vision", plan.vision_reasons, vision)]
    return steps, not (plan.text_reasons or plan.vision_reasons)


def pack(request: PackRequest) -> Facts:
    """Select, attach and pack, each as far as the stages before it allow to know."""
    from d2c import attachment, packing, pipeline

    steps: list[Facts] = []
    images: int | None = None
    name = request.finished
    if name is None:
        steps = select(request.wanted)
        name, images = steps[-1]["facts"]["selection"], int(steps[-1]["facts"]["images"])
    attachments = pipeline.attachment_config(request, name)
    latent = _latent_bytes(request, len(attachments.views))
    if images is not None and steps[-1]["would_run"]:
        wanted = {
            "text": attachments.text,
            "vision": attachments.vision,
            "grid": attachments.grid,
            "images": images,
        }
        later = [
            step("attach", ["after select"], wanted),
            step("pack", ["after attach"], {"images": images, "latent_bytes": images * latent}),
        ]
        return {"selection": name, "out": request.out, "payload_bytes": None, "steps": [*steps, *later]}
    attach, attached = attachment_steps(request, name)
    steps += attach
    if not attached:
        count = images if images is not None else attach[1]["facts"]["images"]
        later = [step("pack", ["after attach"], {"images": count, "latent_bytes": count * latent})]
        return {"selection": name, "out": request.out, "payload_bytes": None, "steps": [*steps, *later]}
    done = attachment.plan(attachments)
    plan = packing.plan(pipeline.packing_config(request, name, done.result))
    steps.append(step("pack", plan.reasons, {"images": len(plan.contents.picks), "shards": plan.shards}))
    return {"selection": name, "out": request.out, "payload_bytes": plan.contents.bytes, "steps": steps}


def _latent_bytes(request: PackRequest, views: int) -> int:
    """Bytes of one image's latents as the scored codec stores them."""
    codec = Workspace(request.workspace).scores.require("d2c score DIR").summary["codec"]
    values = len(codec["moments"]) * int(codec["channels"]) * int(codec["size"]) ** 2
    return values * int(codec["dtype"][1:]) * views


def evaluations(sampler: SamplerConfig, images: int) -> int | None:
    """Model evaluations that ``images`` take, both guidance branches counted; None where only the run will tell."""
    per_image = sampler.evaluations()
    return None if per_image is None else images * per_image
