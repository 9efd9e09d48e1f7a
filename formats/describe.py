"""What an artifact is, in numbers: for people before they use it, and for programs as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from formats.artifact import Artifact, open_artifact
from formats.errors import FormatError
from formats.hashing import sha256_file
from formats.layout import SUMS
from formats.schema import Column

_PROVENANCE = (
    "encoders",
    "latent",
    "licence",
    "order",
    "parents",
    "preprocess",
    "seeds",
    "selection",
    "source",
    "tool",
)


def describe(path: str | Path) -> dict[str, Any]:
    """Facts of the artifact at ``path``: ids, counts, class histogram, bytes, provenance, memory need. JSON-ready.

    ``root`` is the sha256 of SHA256SUMS: who knows it can prove every byte. Bytes are plain counts.

    Raises:
        FormatError, IntegrityError, VersionError: as `formats.open_artifact`.
    """
    artifact = open_artifact(path)
    manifest, samples = artifact.manifest, len(artifact)
    columns = [
        {
            "name": column.name,
            "codec": column.codec,
            "dtype": column.dtype,
            "shape": list(column.shape),
            "bytes_per_sample": column.nbytes,
            "bytes": column.nbytes * samples,
        }
        for column in artifact.columns
    ]
    tables = {table["name"]: {"dtype": table["dtype"], "shape": table["shape"]} for table in manifest["class_tables"]}
    per_sample = sum(column.nbytes for column in artifact.columns)
    return {
        "path": str(path),
        "name": manifest["name"],
        "format": manifest["format"],
        "content_id": artifact.content_id,
        "root": sha256_file(Path(path) / SUMS),
        "container": manifest["container"],
        "shards": len(artifact.shards),
        "bytes": artifact.bytes,
        "counts": manifest["counts"],
        "columns": columns,
        "fidelity": {column.name: dict(column.fidelity) for column in artifact.columns if column.fidelity},
        "class_tables": tables,
        "memory": {"bytes_per_sample": per_sample, "resident_bytes": per_sample * samples},
        "provenance": {name: manifest[name] for name in _PROVENANCE if name in manifest},
        "classes": [
            {"id": row.id, "name": row.name, "source_id": row.source_id, "count": row.count} for row in artifact.classes
        ],
    }


def describe_sample(path: str | Path, key: str) -> dict[str, Any]:
    """One sample of the artifact at ``path``: its facts, and per column place, hash and range of values. JSON-ready.

    ``minimum``, ``maximum`` and ``mean`` are of the decoded values. A recipe knows hashes only.

    Raises:
        FormatError: no sample has this key; or as `formats.open_artifact`.
        IntegrityError: the sample's bytes are not those that were written.
    """
    artifact = open_artifact(path)
    try:
        i = artifact.position(key)
    except KeyError:
        keys = artifact.keys
        raise FormatError(
            "no sample has this key",
            where=path,
            found=key,
            expected=f"one of {len(keys)} keys such as {', '.join(keys[:3])}",
            hint="keys and what they stand for are in meta/samples.parquet",
        ) from None
    row = artifact.index.slice(i, 1).to_pylist()[0]
    label = int(artifact.labels[i])
    return {
        "key": key,
        "sample_id": row["sample_id"],
        "label": label,
        "class": artifact.classes[label].name,
        "facts": artifact.info(i),
        "arrays": [_array(artifact, i, column, row) for column in artifact.columns],
    }


def _array(artifact: Artifact, i: int, column: Column, row: dict[str, Any]) -> dict[str, Any]:
    facts = {"column": column.name, "codec": column.codec, "bytes": column.nbytes, "xxh3": row[f"{column.name}.xxh3"]}
    if not artifact.shards:
        return facts
    values = artifact.values(column.name, [i])[0].astype(np.float64)
    return {
        **facts,
        "shape": list(values.shape),
        "minimum": float(values.min()),
        "maximum": float(values.max()),
        "mean": float(values.mean()),
        "shard": row["shard"],
        "offset": row[f"{column.name}.offset"],
    }
