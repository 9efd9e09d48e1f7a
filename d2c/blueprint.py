"""What a recipe asks of those who rebuild it. It comes from somebody else: nothing in it is used unchecked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa

from d2c import tokens
from d2c.latents import LatentSpec, RgbCodec
from formats import Artifact, FormatError, IntegrityError
from formats.fields import Fields
from formats.schema import Column, View

HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
_PUBLIC = re.compile(
    r"dinov2|scorer(:[0-9]{0,4}(@[0-9.e-]{1,16})?)?|timm:[\w.-]{1,128}(:hf://\w[\w./-]{1,200})?|"
    r"open_clip:[\w-]{1,128}(:[\w.-]{1,128}|:hf://\w[\w./-]{1,200})?",
    re.ASCII,
)
TEXT_TABLES = ("text_embeds", "text_mask")
_SEED = 2**63 - 1
_SIDE, _GRID, _BATCH = 4096, 256, 4096
_PIXELS, _TOKENS = 2**28, 2**22
"""Of one batch: a gigabyte of bytes or less, where a false promise would ask for terabytes."""


@dataclass(frozen=True)
class Vision:
    """Vision tokens of a recipe: the encoder and its settings, and the column that they fill."""

    encoder: str
    weights_xxh3: str
    name: str
    grid: int
    batch_size: int
    precision: str
    seed: int
    column: Column
    class_token: bool

    @property
    def from_scorer(self) -> bool:
        return family(self.encoder) == "scorer"


@dataclass(frozen=True)
class Blueprint:
    """A recipe's settings, of the right kinds and within bounds."""

    seed: int
    size: int
    latent: LatentSpec
    views: tuple[View, ...]
    vision: Vision | None
    scorer: dict[str, str]
    """Model and weights_xxh3 of the scorer, where the vision tokens come from it."""
    objective: str | None
    text: bool
    licence: dict[str, str]
    picks: pa.Table
    """key, label, score, rank and xxh3 of the images, by key."""


def family(encoder: str) -> str:
    """The kind of a vision encoder; ``dinov2`` is one of timm's."""
    name = encoder.partition(":")[0]
    return "timm" if name == "dinov2" else name


def few(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read(recipe: Artifact) -> Blueprint:
    """Check everything of a recipe that rebuilding relies on.

    Raises:
        IntegrityError: a field is missing, of another kind or out of bounds, columns do not fit the settings, an image
            is named twice, or an encoder is a file.
    """
    where = recipe.path
    try:
        return _read(recipe, where)
    except IntegrityError:
        raise
    except FormatError as error:
        raise IntegrityError(
            f"this recipe cannot be rebuilt: {error.what}",
            where=error.where or where,
            found=error.found,
            expected=error.expected,
            hint="ask its sender for another one",
        ) from error


def _read(recipe: Artifact, where: Path) -> Blueprint:
    manifest = recipe.manifest
    top = Fields(manifest, where, "")
    size = _whole(_inside(top, "preprocess"), "size", 1, _SIDE)
    latent = _latent(_inside(top, "latent"), size)
    encoders = _inside(top, "encoders")
    vision = None if encoders.record.get("vision") is None else _vision(recipe, _inside(encoders, "vision"), size)
    views = tuple(_one_of(_inside(top, "container"), "views", [list(some) for some in tokens.VIEWS]))
    columns = tokens.columns(latent, views, _stored(vision) if vision else None)
    if [_kind(column) for column in recipe.columns] != [_kind(column) for column in columns]:
        raise IntegrityError(
            "the recipe's columns do not fit its settings",
            where=where,
            found=", ".join(map(_kind, recipe.columns)),
            expected=", ".join(map(_kind, columns)),
        )
    tables = {record["name"] for record in manifest["class_tables"]}
    if tables and tables != set(TEXT_TABLES):
        raise FormatError("class_tables are not those of text", where=where, found=sorted(tables), expected=TEXT_TABLES)
    selection = _inside(top, "selection")
    scorer, objective = {}, None
    if vision is not None and vision.from_scorer:
        facts = _inside(selection, "scorer")
        scorer = {name: facts.text(name) for name in ("model", "weights_xxh3")}
        objective = _one_of(_inside(selection, "scores"), "objective", (None, "velocity", "eps"))
    licence = _inside(top, "licence")
    return Blueprint(
        seed=_whole(_inside(top, "seeds"), "pack", -_SEED, _SEED),
        size=size,
        latent=latent,
        views=views,
        vision=vision,
        scorer=scorer,
        objective=objective,
        text=bool(tables),
        licence={name: licence.text(name) if name in licence.record else "" for name in ("spdx", "source_terms")},
        picks=_picks(recipe, where),
    )


def _latent(fields: Fields, size: int) -> LatentSpec:
    latent = LatentSpec(
        codec=_one_of(fields, "codec", ("rgb", "vae")),
        dtype=fields.text("dtype"),
        moments=tuple(fields.texts("moments")),
        channels=_whole(fields, "channels", 1, 1024),
        size=_whole(fields, "size", 1, _SIDE),
        downsample=_whole(fields, "downsample", 1, _SIDE),
        scale=fields.real("scale"),
        shift=fields.real("shift"),
        encoder=fields.text("encoder"),
        revision=fields.text("revision"),
        weights_xxh3=fields.text("weights_xxh3"),
    )
    if latent.pixels != size:
        _wrong(fields, "size", latent.size, f"{size} pixels / {latent.downsample}")
    if latent.codec == "rgb" and latent != RgbCodec(size).spec:
        _wrong(fields, "codec", latent, RgbCodec(size).spec)
    return latent


def _vision(recipe: Artifact, fields: Fields, size: int) -> Vision:
    asked = _inside(fields, "asked")
    encoder, name = asked.text("vision"), fields.text("column")
    if not _PUBLIC.fullmatch(encoder) or any(Path(part).exists() for part in encoder.split(":")[1:]):
        raise IntegrityError(
            "the recipe's vision encoder may be a file of this machine, which a recipe must not name",
            where=fields.where,
            found=encoder[:80],
            expected="dinov2, scorer[:BLOCK[@TIME]], timm:MODEL or open_clip:MODEL:TAG",
            hint="if you trust it, name the encoder yourself: --vision ENCODER:MODEL:FILE",
        )
    grid = _whole(asked, "grid", 1, _GRID)
    batch = _whole(asked, "batch_size", 1, min(_BATCH, _PIXELS // size**2, _TOKENS // grid**2))
    column = next((column for column in recipe.columns if column.name == name), None)
    if column is None or len(column.shape) != 2 or column.shape[0] != grid**2:
        _wrong(fields, "column", name, f"a column of {grid} x {grid} tokens")
    if _whole(fields, "grid", 1, _GRID) != grid:
        _wrong(fields, "grid", fields.record["grid"], grid)
    return Vision(
        encoder=encoder,
        weights_xxh3=fields.text("weights_xxh3"),
        name=fields.text("name"),
        grid=grid,
        batch_size=batch,
        precision=_one_of(asked, "precision", ("fp32", "bf16", "fp16")),
        seed=_whole(asked, "seed", -_SEED, _SEED) if "seed" in asked.record else 0,
        column=column,
        class_token=f"{name}_cls" in {other.name for other in recipe.columns},
    )


def _stored(vision: Vision) -> tuple[str, str, tuple[int, int], bool]:
    rows, dim = vision.column.values_shape
    return vision.column.name, vision.column.codec, (rows, dim), vision.class_token


def _picks(recipe: Artifact, where: Path) -> pa.Table:
    rows: dict[str, dict[str, Any]] = {}
    for i, label in enumerate(recipe.labels.tolist()):
        facts = Fields(recipe.info(i), f"{where}: {recipe.keys[i]}", "info")
        key, known = facts.text("source_key"), facts.record
        if key in rows:
            _wrong(facts, "source_key", key, "every image once")
        rows[key] = {
            "key": key,
            "label": label,
            "score": facts.real("score") if "score" in known else None,
            "rank": _whole(facts, "selection_rank", 0, 2**31 - 1) if "selection_rank" in known else None,
            "xxh3": facts.digest("source_xxh3", 32),
        }
    kinds = {"key": pa.string(), "label": pa.int32(), "score": pa.float64(), "rank": pa.int32(), "xxh3": pa.string()}
    return pa.Table.from_pylist(list(rows.values()), schema=pa.schema(list(kinds.items()))).sort_by("key")


def _kind(column: Column) -> str:
    return f"{column.name} {column.codec} {column.dtype} {list(column.shape)}"


def _inside(fields: Fields, name: str) -> Fields:
    prefix = f"{fields.prefix}.{name}" if fields.prefix else name
    return Fields(fields.mapping(name), fields.where, prefix)


def _whole(fields: Fields, name: str, least: int, most: int) -> int:
    value = fields.record.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        _wrong(fields, name, value, f"a whole number from {least} to {most}")
    return value


def _wrong(fields: Fields, name: str, found: object, expected: object) -> NoReturn:
    raise FormatError(
        f"the field {fields.prefix}.{name} is wrong", where=fields.where, found=str(found)[:80], expected=expected
    )


def _one_of(fields: Fields, name: str, values: Sequence[Any]) -> Any:
    value = fields.record.get(name)
    if value not in values:
        _wrong(fields, name, value, f"one of {', '.join(map(str, values))}")
    return value
