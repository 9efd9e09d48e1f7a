"""What changed between two artifacts: samples by the image they came from, and the words of their manifests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from formats.artifact import Artifact, open_artifact
from formats.files import read_table
from formats.layout import INDEX

_SHOWN = 20
_COUNTED_ELSEWHERE = ("content_id", "files", "counts", "columns", "class_tables", "packed_from", "parents", "created")


def difference(old: str | Path, new: str | Path) -> dict[str, Any]:
    """What is in ``new`` and not in ``old``, the other way round, and what is in both but differs. JSON-ready.

    Samples are the same image where their fact ``source_key`` is, or, without it, their key. At most 20 of each kind
    are named; the counts are of all.

    Raises:
        FormatError, IntegrityError, VersionError: as `formats.open_artifact`.
    """
    first, second = open_artifact(old), open_artifact(new)
    before, after = _samples(first), _samples(second)
    columns: Counter[str] = Counter()
    changed = []
    for name in before.keys() & after.keys():
        differing = _differing(before[name], after[name])
        columns.update(differing)
        if differing:
            changed.append({"sample": name, "differs_in": sorted(differing)})
    added, removed = sorted(after.keys() - before.keys()), sorted(before.keys() - after.keys())
    return {
        "same_content": first.content_id == second.content_id,
        "old": _facts(first),
        "new": _facts(second),
        "samples": {
            "in_both": len(before.keys() & after.keys()),
            "added": len(added),
            "removed": len(removed),
            "changed": len(changed),
            "changed_by_column": dict(sorted(columns.items())),
        },
        "added": added[:_SHOWN],
        "removed": removed[:_SHOWN],
        "changed": sorted(changed, key=lambda one: str(one["sample"]))[:_SHOWN],
        "classes": [
            {"id": a.id, "old": [a.name, a.prompt, a.count], "new": [b.name, b.prompt, b.count]}
            for a, b in zip(first.classes, second.classes, strict=False)
            if a != b
        ][:_SHOWN],
        "manifest": list(_words("", _manifest(first), _manifest(second)))[: 5 * _SHOWN],
    }


def _samples(artifact: Artifact) -> dict[str, dict[str, Any]]:
    """Image -> label and, by column, the digest of its array."""
    wanted = ["key", "label", "info", *(f"{column.name}.xxh3" for column in artifact.columns)]
    rows = read_table(artifact.path / INDEX, wanted).to_pylist()
    found = {}
    for row in rows:
        key, info = row.pop("key"), row.pop("info")
        found[str(json.loads(info).get("source_key", key))] = {n.removesuffix(".xxh3"): row[n] for n in row}
    return found


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> set[str]:
    return {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}


def _facts(artifact: Artifact) -> dict[str, Any]:
    return {
        "path": str(artifact.path),
        "content_id": artifact.content_id,
        "images": len(artifact),
        "classes": len(artifact.classes),
        "bytes": sum(record["bytes"] for record in artifact.manifest["files"]),
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
