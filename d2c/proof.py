"""What shows that the receiver of a recipe has, and makes, what its sender had: hashes, each compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from d2c import __version__, picks
from d2c.blueprint import Blueprint, Vision, few
from d2c.errors import D2CError
from d2c.latents import open_codec
from d2c.picks import Picks
from d2c.progress import Progress
from d2c.scorers import load_denoiser
from d2c.sources import Source
from formats import Artifact, IntegrityError, open_artifact, verify


def check_names(source: Source, recipe: Artifact, blueprint: Blueprint) -> None:
    """The source has the recipe's classes, and its images by name.

    Raises:
        D2CError: it has not.
    """
    ours, theirs = [c.source_id for c in source.classes], [c.source_id for c in recipe.classes]
    if ours != theirs:
        raise D2CError(
            "the source has other classes than the recipe",
            where=source.location,
            found=few(sorted(set(ours) - set(theirs)) or ours),
            expected=few(sorted(set(theirs) - set(ours)) or theirs),
            hint="give the whole data set that the recipe names: d2c inspect RECIPE",
        )
    have = set(source.keys)
    lost = [key for key in blueprint.picks["key"].to_pylist() if key not in have]
    if lost:
        raise D2CError(
            "images of the recipe are not in the source",
            where=source.location,
            found=f"{len(lost)} of {len(recipe)} are missing: {few(lost)}",
            hint="names are relative to the source's folder; the recipe's own is called "
            f"{recipe.manifest['source'].get('name')}",
        )


def check_images(source: Source, blueprint: Blueprint, progress: Progress, *, threads: int) -> None:
    """The source's images are, byte for byte, those that the recipe was made from.

    Raises:
        IntegrityError: they are not.
    """
    wanted = Picks(blueprint.picks)
    with progress.bar("check", len(wanted), "image") as bar:
        wrong = picks.changed(source, wanted, bar, threads=threads)
    if wrong:
        which = "this image is not the one" if len(wrong) == 1 else "these images are not those"
        raise IntegrityError(
            f"{which} that the recipe was made from",
            where=source.location,
            found=f"{len(wrong)} of {len(wanted)} cannot be read or have another xxh3: {few(wrong)}",
            expected="the sender's files, byte for byte",
            hint="give an unchanged copy of the data set that the recipe names with --source",
        )


def check_codec(codec: str, blueprint: Blueprint) -> None:
    """The latent codec is the recipe's, wherever its weights come from.

    Raises:
        IntegrityError: it is not.
    """
    expected = blueprint.latent
    if expected.codec == "rgb":
        return
    found = open_codec(codec, blueprint.size, torch.device("cpu")).spec
    if replace(found, encoder=expected.encoder, revision=expected.revision) != expected:
        raise IntegrityError(
            "this VAE is not the recipe's",
            where=codec,
            found=f"weights {found.weights_xxh3}",
            expected=f"{expected.encoder}, weights {expected.weights_xxh3}",
            hint="name the right one with --codec",
        )


def check_scorer(name: str, blueprint: Blueprint) -> None:
    """The scorer ``name`` is the recipe's.

    Raises:
        IntegrityError: it is not.
    """
    found = load_denoiser(name, device="cpu", objective=blueprint.objective).origin["weights_xxh3"]
    expected = blueprint.scorer["weights_xxh3"]
    if found != expected:
        raise IntegrityError(
            "this scorer is not the recipe's",
            where=name,
            found=f"weights {found}",
            expected=f"weights {expected}",
            hint="ask the recipe's sender for the model",
        )


def check_encoder(found: dict[str, Any], shape: tuple[int, ...], expected: Vision) -> None:
    """The encoder that made tokens of ``shape`` is the recipe's; ``found`` is what it says of itself.

    Raises:
        IntegrityError: it is not.
    """
    if found["weights_xxh3"] != expected.weights_xxh3:
        raise IntegrityError(
            "this vision encoder is not the recipe's",
            found=f"{found['name']}, weights {found['weights_xxh3']}",
            expected=f"{expected.name}, weights {expected.weights_xxh3}",
            hint="name the right weights: --vision ENCODER:MODEL:FILE",
        )
    if shape != expected.column.values_shape or bool(found.get("class_token")) != expected.class_token:
        raise IntegrityError(
            "this vision encoder makes other tokens than the recipe has",
            where=found["name"],
            found=list(shape),
            expected=list(expected.column.values_shape),
            hint="ask the recipe's sender for another one",
        )


def compare(recipe_path: str, approximate: bool, index: pa.Table) -> dict[str, Any]:
    """Compare an artifact's index with the recipe's; returns the manifest fields that say what differs.

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


def differs(rebuilt: Path, recipe: Artifact) -> bool:
    """Whether the artifact ``rebuilt`` says itself that it is the recipe's but for values that differ."""
    parents = open_artifact(rebuilt).manifest["parents"]
    return any((one.get("content_id"), one.get("operation")) == (recipe.content_id, "rebuild") for one in parents)


def check_rebuilt(rebuilt: Path, recipe: Artifact, progress: Progress, *, approximate: bool) -> None:
    """The artifact ``rebuilt`` is sound down to every array, and the recipe's (or says itself what differs).

    Raises:
        IntegrityError: it is not.
    """
    size = open_artifact(rebuilt).bytes
    with progress.bar("verify", size, "byte") as bar:
        # Deep: its hashes of arrays are worth something only where the arrays have them.
        report = verify(rebuilt, "deep", bar.advance)
    hint = "replace it with --overwrite"
    if not report.ok:
        raise IntegrityError(
            "the artifact that was rebuilt here before is damaged",
            where=rebuilt,
            found=f"{len(report.faults)} faults: {report.faults[0]}",
            hint=hint,
        )
    artifact = open_artifact(rebuilt)
    if [c.name for c in artifact.columns] != [c.name for c in recipe.columns]:
        raise IntegrityError("the artifact that is there has other columns than the recipe", where=rebuilt, hint=hint)
    noted = compare(str(recipe.path), approximate, artifact.index)
    if not noted and artifact.content_id != recipe.content_id:
        raise IntegrityError(
            "the artifact that is there is not the recipe's",
            where=rebuilt,
            found=artifact.content_id,
            expected=recipe.content_id,
            hint=hint,
        )
