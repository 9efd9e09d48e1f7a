"""What changed between two artifacts: samples by the image they came from, and the words of their manifests."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from formats.artifact import Artifact, open_artifact
from formats.encoding import parse_info
from formats.files import read_bounded
from formats.index import ROW_BYTES
from formats.layout import INDEX

_SHOWN, _BATCH = 20, 10_000
_COUNTED_ELSEWHERE = ("content_id", "files", "counts", "columns", "packed_from", "parents", "created")


def difference(old: str | Path, new: str | Path) -> dict[str, Any]:
    """What is in ``new`` and not in ``old``, the other way round, and what is in both but differs. JSON-ready.

    Samples are the same image where their fact ``source_key`` is; where some have none, or share one, where their key
    is. At most 20 of each kind are named; the counts are of all.

    Raises:
        FormatError, IntegrityError, VersionError: as `formats.open_artifact`.
    """
    first, second = open_artifact(old), open_artifact(new)
    before, after = _samples(first), _samples(second)
    place = pc.index_in(before["image"], after["image"]).to_numpy(zero_copy_only=False)
    known = np.flatnonzero(~np.isnan(place.astype(float)))
    matched = after.take(pa.array(place[known].astype(np.int64)))
    differs = {
        name: _differing(before, matched, known, name) for name in sorted({*before.column_names, *after.column_names})
    }
    changed = np.flatnonzero(np.logical_or.reduce([np.zeros(len(known), bool), *differs.values()]))
    added = after["image"].filter(pc.invert(pc.is_in(after["image"], before["image"])))
    removed = before["image"].filter(pc.invert(pc.is_in(before["image"], after["image"])))
    return {
        "same_content": first.content_id == second.content_id,
        "old": _facts(first),
        "new": _facts(second),
        "samples": {
            "in_both": len(known),
            "added": len(added),
            "removed": len(removed),
            "changed": len(changed),
            "changed_by_column": {name: int(d.sum()) for name, d in differs.items() if d.any()},
        },
        "added": added.slice(0, _SHOWN).to_pylist(),
        "removed": removed.slice(0, _SHOWN).to_pylist(),
        "changed": [
            {"sample": before["image"][known[i]].as_py(), "differs_in": [n for n, d in differs.items() if d[i]]}
            for i in changed[:_SHOWN].tolist()
        ],
        "classes": [
            {"id": i, "old": a and [a.name, a.prompt, a.count], "new": b and [b.name, b.prompt, b.count]}
            for i, (a, b) in enumerate(zip_longest(first.classes, second.classes))
            if a != b
        ][:_SHOWN],
        "manifest": list(_words("", _manifest(first), _manifest(second)))[: 5 * _SHOWN],
    }


def _samples(artifact: Artifact) -> pa.Table:
    """One row an image, sorted by it: ``image``, ``label``, and the digest of each column's array."""
    digests = [f"{column.name}.xxh3" for column in artifact.columns]
    table = read_bounded(artifact.path / INDEX, ["key", "label", "info", *digests], each=ROW_BYTES)
    batches = table.select(["info"]).to_batches(max_chunksize=_BATCH)
    images = pa.chunked_array(
        [pa.array(map(_source_key, batch.column(0).to_pylist()), pa.string()) for batch in batches]
    )
    if images.null_count or pc.count_distinct(images).as_py() < len(images):
        images = table["key"]
    columns = {"image": images, "label": table["label"]}
    columns |= {name.removesuffix(".xxh3"): table[name] for name in digests}
    return pa.table(columns).sort_by("image").combine_chunks()


def _source_key(info: str) -> str | None:
    key = parse_info(info, "").get("source_key")
    return key if isinstance(key, str) else None


def _differing(before: pa.Table, after: pa.Table, known: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Which of the images in both have another value of ``name``; one that only one side has differs everywhere."""
    if name not in before.column_names or name not in after.column_names:
        return np.ones(len(known), bool)
    return np.asarray(pc.not_equal(before[name].take(pa.array(known)), after[name]).to_numpy(), bool)


def _facts(artifact: Artifact) -> dict[str, Any]:
    return {
        "path": str(artifact.path),
        "content_id": artifact.content_id,
        "images": len(artifact),
        "classes": len(artifact.classes),
        "bytes": artifact.bytes,
    }


def _manifest(artifact: Artifact) -> dict[str, Any]:
    words = {name: value for name, value in artifact.manifest.items() if name not in _COUNTED_ELSEWHERE}
    return {**words, "columns": {column.name: column.to_dict() for column in artifact.columns}}


def _words(place: str, old: Any, new: Any) -> Iterator[dict[str, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _words(f"{place}.{name}".lstrip("."), old.get(name), new.get(name))
    elif old != new:
        yield {"field": place, "old": old, "new": new}
