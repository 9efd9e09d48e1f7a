"""Statistics of real images in a feature space, written once to be measured against often."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2c import batches, runtime
from d2c.config import execution
from d2c.errors import D2CError
from d2c.features import inception_file, no_inception
from d2c.judge import open_space, studied
from d2c.labelling import reopen
from d2c.npz import PARTS, write_stats
from d2c.pictures import FromSource, Pictures, decoded, is_artifact, is_npz, open_images, samples_of
from d2c.progress import Progress, Silent
from d2c.sources import Source
from d2c.workspace import Workspace
from formats import open_artifact


@dataclass(frozen=True, kw_only=True)
class StatsConfig:
    """Which images; ``size``: side in pixels of the crop, None for the images' own, if all have one."""

    source: str
    out: Path = execution()
    size: int | None = None
    inception: Path | None = None
    workspace: Path = execution()
    codec: str | None = execution(None)
    device: str = execution("auto")


@dataclass(frozen=True)
class Plan:
    """Opened inputs; ``scored``: of the workspace, where a classifier measures."""

    config: StatsConfig
    pictures: Pictures
    inception: Path | None
    scored: Source | None
    device: torch.device


def plan(config: StatsConfig) -> Plan:
    """Open the images.

    Raises:
        D2CError: there are none, they have several sizes and none was asked for, or there is no space to see them in.
    """
    if config.out.suffix != ".npz":
        raise D2CError("statistics go into an .npz", where=config.out, hint="--out stats.npz")
    device, pictures = runtime.resolve_device(config.device), _pictures(config)
    weights, workspace = inception_file(config.inception), Workspace(config.workspace)
    use = weights if config.inception or weights.is_file() else None
    scored = reopen(workspace) if use is None and workspace.scores.record() else None
    if use is None and scored is None:
        raise no_inception(weights)
    return Plan(config, pictures, use, scored, device)


def run(plan: Plan, progress: Progress | None = None) -> dict[str, Any]:
    """Go through the images and write the file. Returns what it holds."""
    progress, config = progress or Silent(), plan.config
    workspace = Workspace(config.workspace) if plan.scored else None
    space = open_space(workspace, plan.scored, plan.pictures.side, plan.inception, plan.device, progress)
    found = studied(plan.pictures, space, progress)
    parts = {"features": found.stats} | ({"spatial": found.spatial} if found.spatial else {})
    runtime.once(lambda: write_stats(config.out, parts, space.digest))
    names = [name for part in parts for name in PARTS[part]]
    return {
        "path": config.out,
        "space": space.name,
        "digest": space.digest,
        "arrays": names,
        "images": found.stats.n,
        "side": plan.pictures.side,
        "rank_deficient": found.stats.rank_deficient,
    }


def _pictures(config: StatsConfig) -> Pictures:
    device = runtime.resolve_device(config.device)
    if is_npz(config.source):
        return samples_of(Path(config.source), 0)
    if is_artifact(config.source):
        return decoded(open_artifact(config.source), [], config.codec, device)
    source = open_images(config.source)
    probed = batches.probe(source)
    if config.size is None and not probed.same_square:
        raise D2CError(
            "these images have several sizes",
            where=config.source,
            found=f"short sides around {probed.median_side} px",
            hint="--size 256 says to which square they are cropped, as the images to be measured are",
        )
    numbers = np.full(len(source.classes), -1, np.int64)
    return FromSource(source, range(len(source)), config.size or probed.max_side, numbers)
