"""What the tests of rebuilding share: a recipe, a receiver with an own copy of the images, and one call."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import pack_request

from d2c import pipeline, rebuilding
from d2c.progress import Progress
from d2c.rebuilding import RebuildRequest
from formats import open_artifact


def send(folder: Path, scored: Path) -> Path:
    """A recipe of four picks a class, in ``folder``."""
    shutil.copytree(scored, folder / "workspace")
    request = pack_request(folder / "workspace", folder / "recipe", per_class=4, container="recipe", licence="MIT")
    pipeline.pack(request)
    shutil.rmtree(folder / "workspace")
    return request.out


def receive(recipe: Path, folder: Path, images: Path, scorer: Path) -> RebuildRequest:
    """A receiver in ``folder``, with an own copy of recipe and images."""
    return RebuildRequest(
        recipe=Path(shutil.copytree(recipe, folder / "recipe")),
        source=Path(shutil.copytree(images, folder / "own" / "pets")),
        workspace=folder / "rebuild",
        out=folder / "rebuilt",
        scorer=str(scorer),
        device="cpu",
        shards=3,
    )


def rebuild(request: RebuildRequest, progress: Progress | None = None) -> rebuilding.Result:
    return rebuilding.run(rebuilding.plan(request), progress)


def spoil(request: RebuildRequest, *rows: int) -> list[str]:
    """Change these images of the receiver's copy; returns their names."""
    keys = [open_artifact(request.recipe).info(row)["source_key"] for row in rows]
    for key in keys:
        (request.source / key).write_bytes((request.source / key).read_bytes() + b"\0")
    return keys


def other_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens as another machine might make them: nearly the same."""
    from d2c.scorer_tokens import ScorerTokens

    encode: Any = ScorerTokens.encode
    monkeypatch.setattr(ScorerTokens, "encode", lambda *args: (encode(*args) * 1.01).astype("f2"))
