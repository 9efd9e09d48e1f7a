"""Rewrite an artifact: another container, other shards, other token codecs, another licence note.

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
from formats.errors import FormatError
from formats.hashing import xxh3_json
from formats.schema import CODECS, RAW, RECIPE, RMS, Column, Container
from formats.shards import Sample
from formats.writer import OWN_FIELDS, ArtifactWriter

_MEASURED = 2048
"""Samples whose tokens give a new codec its rms and its fidelity, spread evenly."""


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
    source: str | Path, out: str | Path, changes: Changes, progress: Callable[[int], None] | None = None
) -> Artifact:
    """Write the artifact ``source`` to ``out`` with ``changes``; every array's hash is checked on the way.

    A killed call goes on by shard. ``progress`` is told the samples written. Storage order and everything in the
    manifest that is not about files are kept, fields unknown to this code included.

    Raises:
        FormatError: ``out`` holds something else or is ``source``, or ``source`` is a recipe.
        IntegrityError: the source is damaged.
    """
    artifact, place = open_artifact(source), Path(out)
    if place.resolve() == artifact.path.resolve():
        raise FormatError("an artifact cannot be repacked into itself", where=place, hint="name another folder")
    container = artifact.manifest["container"]["kind"]
    if container == RECIPE:
        raise FormatError(
            "a recipe holds no arrays to repack",
            where=artifact.path,
            hint=f"make them from your own copy of the images: d2c rebuild {artifact.path} --source DIR",
        )
    recoded = _recoded(artifact, changes.tokens)
    count = min(changes.shards or len(artifact.shards), len(artifact))
    digest = xxh3_json({"source": artifact.manifest, **asdict(changes)})
    with ArtifactWriter(place, changes.container or container, _columns(artifact, recoded), count, digest) as writer:
        arrays = _writer_arrays(artifact, recoded, writer)
        finished = writer.done_shards()
        for shard in range(count):
            first, last = len(artifact) * shard // count, len(artifact) * (shard + 1) // count
            if shard not in finished:
                writer.write(shard, _samples(artifact, recoded, arrays, range(first, last)))
            if progress:
                progress(last - first)
        rms = {name: arrays[name] for name, codec in recoded.items() if codec != RAW}
        fidelity = {c.name: c.fidelity for c in artifact.columns if c.fidelity and c.name not in recoded}
        lost = {name: _fidelity(artifact, name, recoded[name], rms[name]) for name in rms}
        writer.finish(
            _fields(artifact, changes, recoded),
            artifact.classes,
            {record["name"]: artifact.table(record["name"]) for record in artifact.manifest["class_tables"]},
            artifact.selection,
            fidelity={**fidelity, **lost},
        )
    return open_artifact(place)


def _recoded(artifact: Artifact, codec: str | None) -> dict[str, str]:
    """Token columns whose codec changes -> the new one."""
    if codec is None:
        return {}
    if codec not in CODECS:
        raise FormatError("unknown codec", found=codec, expected=", ".join(CODECS))
    tokens = [c for c in artifact.columns if c.codec != RAW or (c.dtype == "f2" and len(c.shape) == 2)]
    if not tokens:
        raise FormatError("there are no tokens in this artifact", where=artifact.path, hint="leave --tokens out")
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


def _writer_arrays(
    artifact: Artifact, recoded: Mapping[str, str], writer: ArtifactWriter
) -> dict[str, np.ndarray[Any, Any]]:
    """The rms of every coded column, kept in the new artifact: the old one's where there is one, else measured."""
    arrays = {}
    for column in writer.columns:
        if column.codec != RAW:
            arrays[column.name] = writer.codec_array(column.name, RMS, partial(_rms, artifact, column.name))
    return arrays


def _rms(artifact: Artifact, name: str) -> np.ndarray[Any, Any]:
    column = next(column for column in artifact.columns if column.name == name)
    if column.codec_arrays:
        return artifact.codec_array(name, RMS)
    return codecs.channel_rms(artifact.array(i, name) for i in _measured(artifact))


def _measured(artifact: Artifact) -> list[int]:
    count = min(len(artifact), _MEASURED)
    return [len(artifact) * i // count for i in range(count)]


def _fidelity(artifact: Artifact, name: str, codec: str, rms: np.ndarray[Any, Any]) -> dict[str, object]:
    found = []
    for i in _measured(artifact):
        before = artifact.values(name, [i])[0]
        codes, scale = codecs.encode(codec, before, rms)
        found.append(codecs.cosines(before, codecs.decode(codec, codes, scale, rms)))
    return codecs.fidelity(np.stack(found))


def _samples(
    artifact: Artifact, recoded: Mapping[str, str], rms: Mapping[str, np.ndarray[Any, Any]], rows: range
) -> Iterator[Sample]:
    dropped = {c.scale_column for c in artifact.columns if c.name in recoded}
    kept = [c.name for c in artifact.columns if c.name not in recoded and c.name not in dropped]
    for i in rows:
        arrays = {name: artifact.array(i, name) for name in kept}
        for name, codec in recoded.items():
            arrays |= codecs.stored(name, codec, artifact.values(name, [i])[0], rms.get(name))
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
