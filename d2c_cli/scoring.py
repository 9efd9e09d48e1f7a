"""``d2c score``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import typer

from d2c.errors import UsageError
from d2c.workspace import Workspace
from d2c_cli import options, plans, score_options
from d2c_cli.output import Output
from d2c_cli.paths import quoted

EXAMPLES = (
    "d2c score imagenet/ --gpus 8 --target-rank-corr 0.95",
    "d2c score imagenet/ --scorer DiT-XL-2-256x256.pt --part 3/64",
    "d2c score photos/ --device cpu --evals 16 --workspace photos-d2c",
)


def score(
    ctx: typer.Context,
    source: options.Source,
    workspace: options.Workspace = options.WORKSPACE,
    scorer: score_options.Scorer = None,
    scorer_model: score_options.ScorerModel = None,
    scorer_steps: score_options.ScorerSteps = None,
    objective: options.Objective = None,
    class_map: score_options.ClassMap = None,
    labels: score_options.Labels = "source",
    codec: score_options.Codec = None,
    size: score_options.Size = None,
    estimator: score_options.Estimator = "stratified",
    evals: score_options.Evals = 8,
    target_rank_corr: score_options.TargetRankCorr = None,
    batch_size: score_options.ScoreBatch = 64,
    precision: options.Precision = "auto",
    no_compile: options.NoCompile = False,
    device: options.Device = "auto",
    gpus: options.Gpus = 1,
    threads: options.Threads = 4,
    part: score_options.ArrayPart = None,
    duplicates: score_options.Duplicates = "report",
    keep: score_options.Keep = "first",
    held_out: score_options.HeldOut = None,
    max_bad: score_options.MaxBad = None,
    retry_bad: score_options.RetryBad = False,
    price: score_options.Price = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Judge how hard each image is for a diffusion model.

    In: images in class folders (or Parquet, or tar). Out: in the workspace, a score for every image with its standard
    error, bad_files.parquet with what could not be read and why, and duplicates.parquet with what is there twice.

    A finished scoring is not repeated; an interrupted one goes on where it stopped.
    """
    output = Output.open(ctx)
    from d2c.score_pipeline import ScoreRequest
    from d2c.score_pipeline import score as run
    from d2c.scoring import Share

    if max_bad is not None and max_bad < 0:
        raise UsageError("a number of images is not negative", found=f"--max-bad {max_bad:g}")
    if "keep" in output.typed and duplicates != "drop":
        raise UsageError("--keep says which duplicates stay when others go", hint="add --duplicates drop")
    _check_scorer_to_train(scorer, scorer_model, codec, size)
    request = ScoreRequest(
        source=source,
        workspace=workspace,
        scorer=scorer,
        objective=objective,
        class_map=class_map,
        labels=labels,
        codec=codec,
        size=size,
        estimator=estimator,
        evals=evals,
        scorer_model=scorer_model,
        scorer_steps=scorer_steps,
        seed=seed,
        precision=precision,
        compile=not no_compile,
        batch_size=batch_size,
        device=device,
        gpus=gpus,
        threads=threads,
        target_rank_corr=target_rank_corr,
        share=_share(part),
        duplicates=duplicates,
        keep=keep,
        held_out=held_out,
        max_bad=max_bad,
        retry_bad=retry_bad,
        overwrite=overwrite,
    )
    if target_rank_corr is not None and "evals" in output.typed:
        raise UsageError("--target-rank-corr chooses --evals", hint="leave one of them out")
    if dry_run:
        output.show(plans.score(request, price), dry_run=True)
        return
    result, steps = run(request, output.progress)
    if isinstance(result, Share):
        output.show({"scores": result.path, "parts": result.total, "parts_done": result.done})
        if result.done == result.total:
            # All that was typed but what is for one task: with other options nothing that is done would be used.
            kept = [name for name in output.typed if name not in ("source", "part", "overwrite", "retry_bad")]
            output.then(f"d2c score {quoted(source)}", *kept)
        return
    summary = result.record.summary
    output.show(
        {
            "scores": result.path,
            "images": summary["images"],
            "bad_files": summary["bad_files"],
            "classes": len(summary["classes"]),
            "duplicates": _counted(summary["duplicates"]),
            "leaks": summary["leaks"],
            "codec": summary["codec"]["name"],
            "size": summary["size"],
            "scorer": Workspace(workspace).recall(summary["scorer"]["spec"]),
            "rank_correlation": summary["rank_correlation"],
            "score": summary["score"],
            "worker_seconds": result.record.cost["seconds"],
            "steps": [asdict(step) for step in steps],
        }
    )
    output.then("d2c pack --ratio 0.008", "workspace", "device")


def _counted(found: dict[str, Any] | None) -> dict[str, int] | None:
    if found is None:
        return None
    # Records of an earlier state of this code call those removed that could be.
    removable = found.get("removable", found["removed"])
    removed = removable if found["then"] == "drop" else 0
    counts = {name: found[name] for name in ("groups", "images", "conflicts")}
    return {**counts, "removable": removable, "removed": removed}


def _share(part: str | None) -> tuple[int, int] | None:
    """``3/64`` -> (3, 64)."""
    if part is None:
        return None
    number, slash, of = part.partition("/")
    if not (slash and part.isascii() and number.isdigit() and of.isdigit()):
        raise UsageError("this is no share of the parts", found=part, expected="I/N, such as 3/64")
    return int(number), int(of)


def _check_scorer_to_train(scorer: str | None, model: str | None, codec: str | None, size: int | None) -> None:
    """Refuse a model that cannot be trained before the source is read and packed for it.

    Raises:
        D2CError: there is no such model, or its patches do not tile images of ``--size``.
        UsageError: it is no SiT.
    """
    from d2c import choices
    from d2c.sit import model_spec, parse_model

    if scorer not in (None, choices.TRAIN_SCORER):
        return
    if model is not None and parse_model(model)[0] != "sit":
        raise UsageError("a scorer is trained as a SiT", found=f"--scorer-model {model}", expected="a sit-... model")
    # Where the VAE is the codec, it checks the size itself when it is opened.
    if size is not None and (codec == "rgb" or (codec is None and size <= choices.SMALL)):
        model_spec(model or choices.choose_scorer_model("rgb", size), size, channels=3, num_classes=1)
