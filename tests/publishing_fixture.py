"""What the tests of publishing share: an artifact that may be published, and one call for each direction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from formats_fixture import write_artifact

from d2c import fetching, publishing
from d2c.fetching import FetchingConfig
from d2c.publishing import PublishingConfig
from d2c.remotes import Transfer
from formats.files import read_json
from formats.hashing import sha256_file

LICENCE = {"spdx": "CC0-1.0", "source_terms": "https://example.org/terms", "images_included": False}


def artifact(out: Path, container: str = "tar", **fields: Any) -> Path:
    return write_artifact(out, container, 4, **{"licence": LICENCE, **fields})


def push(source: Path, destination: str | Path, **options: Any) -> Transfer:
    config = PublishingConfig(artifact=source, destination=str(destination), **options)
    return publishing.run(publishing.plan(config))


def pull(source: str | Path, out: Path, **options: Any) -> Transfer:
    return fetching.run(fetching.plan(FetchingConfig(source=str(source), out=out, **options)))


def flip(path: Path, at: int = 700) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def resign(root: Path) -> None:
    """Make SHA256SUMS vouch for a manifest that was changed, as an attacker would."""
    files = {record["path"]: record["sha256"] for record in read_json(root / "manifest.json")["files"]}
    files["manifest.json"] = sha256_file(root / "manifest.json")
    (root / "SHA256SUMS").write_text("".join(f"{files[name]}  {name}\n" for name in sorted(files)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
