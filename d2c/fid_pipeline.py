"""Measure: what is judged is drawn first, where it is a run, and by several processes where that is asked for."""

from __future__ import annotations

from dataclasses import replace

from d2c import fid, generation
from d2c.fid import FidConfig, Plan, Result
from d2c.generation import ARRAYS, GenerationConfig
from d2c.npz import open_npz
from d2c.pictures import FromRun
from d2c.progress import Progress

SAMPLES = "samples"
"""Folder of a run's samples in that of its measurement."""


def drawing(config: FidConfig, gpus: int) -> GenerationConfig:
    """How a run's images are drawn: resumable, and the same for any number of processes."""
    return GenerationConfig(
        run=config.judged,
        out=config.folder / SAMPLES,
        count=config.samples,
        sampler=config.sampler,
        labels=config.labels,
        seed=config.seed,
        npz=True,
        codec=config.codec,
        device=config.device,
        gpus=gpus,
        batch_size=config.batch_size,
        overwrite=config.overwrite,
    )


def measure(plan: Plan, gpus: int, progress: Progress) -> Result:
    """Draw the images of a run that are not drawn yet, then measure them; images of others are measured as they are."""
    if plan.generator is not None and not plan.done:
        found = generation.run(generation.plan(drawing(plan.config, gpus)), progress)
        judged = FromRun(open_npz(found.path / ARRAYS), "", len(plan.classes), plan.generator.path.name)
        plan = replace(plan, judged=judged, drawing=found.seconds)
    return fid.run(plan, progress)
