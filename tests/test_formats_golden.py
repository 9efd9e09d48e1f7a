"""Artifacts as each released format version wrote them: read for ever, with the ids and values of that day.

A failure here means that old artifacts are read differently. Never write these files anew; add those of a new version.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from formats import open_artifact, verify
from formats.hashing import xxh3_array
from formats.order import canonical, epoch_order

GOLDEN = Path(__file__).resolve().parent / "golden"
CASES = [
    pytest.param(folder / name, expected, id=f"{folder.name}-{name}")
    for folder in sorted(GOLDEN.iterdir())
    for name, expected in json.loads((folder / "expected.json").read_text()).items()
]


@pytest.mark.parametrize(("path", "expected"), CASES)
def test_an_old_artifact_reads_as_it_did(path: Path, expected: dict[str, object]) -> None:
    assert verify(path, "deep").faults == []
    artifact = open_artifact(path)
    assert artifact.content_id == expected["content_id"]
    assert artifact.keys[:3] == expected["keys"]
    assert artifact.index["sample_id"].to_pylist()[:2] == expected["sample_ids"]
    assert [canonical(artifact.index)[epoch_order(20, 0, epoch)].tolist() for epoch in range(3)] == expected["epochs"]
    if artifact.shards:
        tokens = artifact.values("tokens", range(20))
        np.testing.assert_allclose(tokens[7, 0], expected["tokens"], atol=1e-6)
        assert xxh3_array(tokens) == expected["tokens_xxh3"]
        assert xxh3_array(artifact.values("latent", range(20))) == expected["latent_xxh3"]
