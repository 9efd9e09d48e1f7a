"""What an artifact is, in numbers: for people before they use it, and for programs as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from formats.artifact import open_artifact
from formats.hashing import sha256_file
from formats.layout import SUMS

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
        {**column.to_dict(), "bytes_per_sample": column.nbytes, "bytes": column.nbytes * samples}
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
        "shards": sum("samples" in record for record in manifest["files"]),
        "bytes": sum(record["bytes"] for record in manifest["files"]),
        "counts": manifest["counts"],
        "columns": columns,
        "class_tables": tables,
        "memory": {"bytes_per_sample": per_sample, "resident_bytes": per_sample * samples},
        "provenance": {name: manifest[name] for name in _PROVENANCE if name in manifest},
        "classes": [
            {"id": row.id, "name": row.name, "source_id": row.source_id, "count": row.count} for row in artifact.classes
        ],
    }
