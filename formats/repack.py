"""Rewrite an artifact: another container, other shards, a coarser token codec, another licence note.

What a sample is decides the content id, so a change of container or shards keeps it; a change of codec gives another
one, and the new artifact names the old as its parent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from formats import codecs
from formats.artifact import Artifact, open_artifact
from formats.card import card
from formats.codecs import Fidelity
from formats.encoding import Encoded
from formats.errors import FormatError, VersionError
from formats.hashing import canonical_json, parse_json, xxh3_json
from formats.layout import MANIFEST, README, licence_text
from formats.licence import check_licence
from formats.schema import CODECS, RAW, RECIPE, RMS, Column, Container, parse_manifest
from formats.shards import Sample
from formats.version import FORMAT_VERSION
from formats.writer import OWN_FIELDS, ArtifactWriter

Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What to change; None keeps what is there."""

    container: Container | None = None
    shards: int | None = None
    tokens: str | None = None
    """A codec for the token columns: those with a codec, and raw f2 columns of two dimensions."""
    licence: Mapping[str, str] | None = None
    """Fields of the manifest's ``licence`` to replace."""


def repack(
    source: str | Path,
    out: str | Path,
    changes: Changes,
    progress: Callable[[int], None] | None = None,
    *,
    overwrite: bool = False,
) -> Artifact:
    """Write the artifact ``source`` to ``out`` with ``changes``; every array's hash is checked on the way.

    A killed call goes on by shard; a finished one is not repeated. ``progress`` is told the samples written. Storage
    order and the manifest's fields that do not follow from what was written are kept, unknown ones included. Of a
    recipe the licence note can change, since all that it lacks are the arrays. A LICENSE comes along; the card is
    generated anew (`edited_card`).

    Raises:
        FormatError: ``out`` holds something else (another artifact: unless ``overwrite``) or lies in ``source``;
            anything but the licence note of a recipe is to change; or a codec is asked for that cannot bring back
            what another one took.
        VersionError: ``source`` has a newer minor version, of which this code may lose something.
        IntegrityError: the source is damaged.
    """
    artifact, place = open_artifact(source), Path(out)
    if not overwrite and (there := finished(artifact, place, changes)):
        return there
    wanted = _wanted(artifact, place, changes)
    container, count, recoded, columns = wanted.container, wanted.shards, wanted.recoded, wanted.columns
    digest = xxh3_json({"source": artifact.manifest, **asdict(changes)})
    licence = licence_text(artifact.path)
    with ArtifactWriter(place, container, columns, count, digest, licence=licence) as writer:
        rms = {
            column.name: writer.codec_array(column.name, RMS, partial(_rms, artifact, column.name))
            for column in columns
            if column.codec != RAW
        }
        done = writer.done_shards()
        for shard in range(count):
            first, last = len(artifact) * shard // count, len(artifact) * (shard + 1) // count
            if shard not in done:
                costs = {name: Fidelity(against=_column(artifact, name).codec) for name in recoded}
                samples = _samples(artifact, recoded, rms, costs, range(first, last))
                writer.write(shard, samples, costs)
            if progress:
                progress(last - first)
        tables = {record["name"]: artifact.table(record["name"]) for record in artifact.manifest["class_tables"]}
        kept = {column.name: column.fidelity for column in artifact.columns if column.fidelity is not None}
        writer.finish(wanted.fields, artifact.classes, tables, artifact.selection, fidelity=kept)
    return open_artifact(place)


def finished(artifact: Artifact, place: Path, changes: Changes) -> Artifact | None:
    """The artifact at ``place``, where it is what `repack` would write there; None where there is none.

    Raises:
        FormatError: it is another one; or as `repack`.
        VersionError: as `repack`.
    """
    wanted = _wanted(artifact, place, changes)
    if not (place / MANIFEST).exists():
        return None
    there = open_artifact(place)
    same = (
        there.manifest["container"]["kind"] == wanted.container
        and (len(there.shards) or 1) == wanted.shards
        and [replace(column, codec_arrays={}, fidelity=None) for column in there.columns] == wanted.columns
        # What was recoded has an id of its own, and names its parent among the fields.
        and (bool(wanted.recoded) or there.content_id == artifact.content_id)
        and {n: v for n, v in there.manifest.items() if n not in OWN_FIELDS}
        == parse_json(canonical_json(wanted.fields))
    )
    if same:
        return there
    raise FormatError(
        "another artifact is here already",
        where=place,
        hint="choose another folder, or replace it with --overwrite",
    )


def edited_card(artifact: Artifact) -> Path | None:
    """The artifact's card, where it is not the one that is generated for it: `repack` generates another."""
    path = artifact.path / README
    generated = card(parse_manifest(artifact.manifest, artifact.path / MANIFEST)).encode()
    return path if path.is_file() and path.read_bytes() != generated else None


@dataclass(frozen=True)
class _Wanted:
    container: Container
    shards: int
    recoded: dict[str, str]
    columns: list[Column]
    fields: dict[str, Any]


def _wanted(artifact: Artifact, place: Path, changes: Changes) -> _Wanted:
    _check(artifact, place, changes)
    recoded = _recoded(artifact, changes.tokens)
    return _Wanted(
        container=changes.container or artifact.manifest["container"]["kind"],
        shards=min(changes.shards or len(artifact.shards) or 1, len(artifact)),
        recoded=recoded,
        columns=_columns(artifact, recoded),
        fields=_fields(artifact, changes, recoded),
    )


def _check(artifact: Artifact, place: Path, changes: Changes) -> None:
    licence = changes.licence or {}
    check_licence(licence.get("spdx", ""), licence.get("source_terms", ""))
    if place.resolve().is_relative_to(artifact.path.resolve()):
        raise FormatError("an artifact cannot be repacked into itself", where=place, hint="name another folder")
    if changes.container == RECIPE:
        raise FormatError(
            "a recipe is not made by repacking", where=place, hint="pack what was selected with --recipe-only"
        )
    if not artifact.shards and (changes.container or changes.shards or changes.tokens):
        raise FormatError(
            "a recipe holds no arrays to repack",
            where=artifact.path,
            expected="no change but of the licence note",
            hint=f"make them from your own copy of the images: d2c rebuild {artifact.path} --source DIR",
        )
    if (version := artifact.manifest["format"]["version"]) != FORMAT_VERSION:
        raise VersionError(
            "this artifact is newer than what can be rewritten without loss",
            where=artifact.path,
            found=f"format {version}",
            expected=f"format {FORMAT_VERSION}",
            hint="repack it with a newer release: pip install -U d2c-toolkit",
        )


def _column(artifact: Artifact, name: str) -> Column:
    return next(column for column in artifact.columns if column.name == name)


def _recoded(artifact: Artifact, codec: str | None) -> dict[str, str]:
    """Token columns whose codec changes -> the new one, which must be coarser."""
    if codec is None:
        return {}
    if codec not in CODECS:
        raise FormatError("unknown codec", found=codec, expected=", ".join(CODECS))
    tokens = [c for c in artifact.columns if c.codec != RAW or (c.dtype == "f2" and len(c.shape) == 2)]
    if not tokens:
        raise FormatError("there are no tokens in this artifact", where=artifact.path, hint="leave --tokens out")
    finer = [column for column in tokens if CODECS.index(column.codec) > CODECS.index(codec)]
    if finer:
        raise FormatError(
            "tokens that were encoded cannot be had back",
            where=artifact.path,
            found=f"{finer[0].name} in {finer[0].codec}",
            expected=f"a codec at least as coarse, not {codec}",
            hint="pack them anew with --tokens, or decode them as docs/format.md says",
        )
    return {column.name: codec for column in tokens if column.codec != codec}


def _columns(artifact: Artifact, recoded: Mapping[str, str]) -> list[Column]:
    dropped = {c.scale_column for c in artifact.columns if c.name in recoded}
    columns: list[Column] = []
    for column in artifact.columns:
        if column.name in recoded:
            columns += codecs.columns(column.name, recoded[column.name], column.values_shape)
        elif column.name not in dropped:
            columns.append(replace(column, codec_arrays={}, fidelity=None))
    return columns


def _rms(artifact: Artifact, name: str) -> np.ndarray[Any, Any]:
    """The old artifact's rms where it has one, else measured on every sample."""
    if _column(artifact, name).codec_arrays:
        return artifact.codec_array(name, RMS)
    return codecs.channel_rms(artifact.array(i, name) for i in range(len(artifact)))


def _samples(
    artifact: Artifact, recoded: Mapping[str, str], rms: Arrays, costs: Mapping[str, Fidelity], rows: range
) -> Iterator[Sample | Encoded]:
    if not artifact.shards:
        yield from map(artifact.known, rows)
        return
    dropped = {c.scale_column for c in artifact.columns if c.name in recoded}
    kept = [c.name for c in artifact.columns if c.name not in recoded and c.name not in dropped]
    for i in rows:
        arrays = {name: artifact.array(i, name) for name in kept}
        for name, codec in recoded.items():
            arrays |= codecs.stored(name, codec, artifact.values(name, [i])[0], rms[name], costs[name])
        yield Sample(artifact.index["key"][i].as_py(), int(artifact.labels[i]), arrays, artifact.info(i))


def _fields(artifact: Artifact, changes: Changes, recoded: Mapping[str, str]) -> dict[str, Any]:
    fields = {name: value for name, value in artifact.manifest.items() if name not in (*OWN_FIELDS, "packed_from")}
    if changes.licence:
        fields["licence"] = {**fields["licence"], **changes.licence}
    if recoded:
        before = [column.to_dict() for column in artifact.columns if column.name in recoded]
        lost = [{name: column[name] for name in ("name", "codec", "fidelity")} for column in before]
        parent = {"content_id": artifact.content_id, "operation": "recode", "columns": lost}
        fields["parents"] = [*fields["parents"], parent]
    return fields
