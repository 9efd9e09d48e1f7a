"""Write score_scale.md: index, plan and merge a scoring of 1,281,167 images, with losses faked at the model's place.

PYTHONPATH=. python docs/benchmarks/score_scale.py > docs/benchmarks/score_scale.md
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from machine import machine, note
from PIL import Image
from tables import table

from d2c import checkpoint, scoring, selection
from d2c.difficulty import Difficulty
from d2c.score_table import PART_SCHEMA
from d2c.selection import SelectionConfig
from d2c.sit import SiT, model_spec
from d2c.sources import Source, imagenet_classes, open_source
from formats.files import write_json

IMAGES, CLASSES, EVALS = 1_281_167, 1000, 8
LINKS = 50_000
"""Names that one file may have: file systems allow 65,000."""
PACKAGES = ("numpy", "pyarrow", "torch")
TEXT = """# Scale: the index, the plan and the merge of {images:,} images

[score_scale.py](score_scale.py) made this page: `PYTHONPATH=. python docs/benchmarks/score_scale.py`. A folder tree
as ImageNet's, {images:,} file names in {classes:,} synset folders (hard links to a few files, so that it fits on a
disk). Where a model would compute losses, {evals} random ones an image are made up, and random hashes; all else is the
code of `d2c score --duplicates off`, of `--duplicates report` (the default) after it, and of `d2c select`. One process,
one step after the other; *peak memory* is the kernel's high-water mark of resident memory up to the end of the step,
torch and all.

{table}

{verdict}

{machine}
"""


def main() -> None:
    """Run the steps and print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    args = parser.parse_args()
    steps: list[tuple[str, float, float]] = []

    def timed(name: str, action: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = action()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        steps.append((name, time.perf_counter() - start, peak))
        note(f"{name}: {steps[-1][1]:.1f} s, {peak:.0f} MiB")
        return result

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        timed("start: Python, torch and the imports", lambda: None)
        make_tree(root / "train", args.images)
        make_scorer(root / "scorer")
        config = scoring.ScoringConfig(
            source=str(root / "train"), workspace=root / "workspace", scorer=str(root / "scorer"), codec="rgb", size=8,
            evals=EVALS, device="cpu", duplicates="off",
        )  # fmt: skip
        source: Source = timed("index: list and sort the files", lambda: open_source(config.source))
        assert len(source) == args.images
        assert source.is_imagenet
        planned = timed("plan", lambda: scoring.plan(config, source))
        fake_losses(planned)
        timed("score, without decoding and model", lambda: scoring.run_share(share(planned)))
        resumed = timed("plan again, to resume", lambda: scoring.plan(config, source))
        result = timed("merge: one table, sorted, with errors", lambda: scoring.run(resumed))
        assert result.record.summary["images"] == args.images
        looking = scoring.plan(replace(planned.config, duplicates="report"), source)
        timed("merge, and look for duplicates", lambda: scoring.run(looking))
        chosen = SelectionConfig(workspace=config.workspace, ratio=0.008)
        timed("select: interval, 0.8 %", lambda: selection.run(selection.plan(chosen)))
    seconds = {name.partition(":")[0]: value for name, value, _ in steps}
    both, peak = seconds["plan"] + seconds["merge"], max(peak for _, _, peak in steps)
    looked = seconds["plan"] + seconds["merge, and look for duplicates"]
    rows = [[name, f"{value:.1f}", f"{peak:,.0f}"] for name, value, peak in steps]
    verdict = (
        f"Plan and merge: {both:.0f} s (asked for: under 60), with the index {both + seconds['index']:.0f} s; "
        f"with the search for duplicates, which is on unless turned off, {looked:.0f} s. Most memory {peak:,.0f} MiB "
        "(asked for: under 2,048)."
    )
    print(
        TEXT.format(
            images=args.images, classes=CLASSES, evals=EVALS, verdict=verdict,
            table=table(["step", "s", "peak memory, MiB"], rows), machine=machine(PACKAGES),
        ),
        end="",
    )  # fmt: skip


def make_tree(root: Path, images: int) -> None:
    """``images`` names over ImageNet's 1,000 synsets."""
    synsets = [known.source_id for known in imagenet_classes()]
    for synset in synsets:
        (root / synset).mkdir(parents=True)
    first = root.parent
    for number in range(images):
        if number % LINKS == 0:
            first = root.parent / f"picture-{number}"
            Image.new("RGB", (8, 8)).save(first, "PNG")
        synset = synsets[number % CLASSES]
        os.link(first, root / synset / f"{synset}_{number // CLASSES}.JPEG")


def make_scorer(folder: Path) -> None:
    """A tiny model with random weights for 1,000 classes, as a run folder."""
    folder.mkdir()
    spec = model_spec("sit-tiny/2", 8, 3, CLASSES)
    write_json(folder / "model.json", spec.to_dict())
    checkpoint.save_tensors(folder / "ema.safetensors", SiT(spec).state_dict())


def fake_losses(plan: scoring.Plan) -> None:
    """Make up what `Difficulty.tables` would compute."""
    rng = np.random.default_rng(0)
    source, spread = plan.source, rng.gamma(4.0, size=len(plan.source))

    def tables(_: Difficulty, indices: list[int]) -> Iterator[pa.Table]:
        rows = np.array(indices)
        losses = (spread[rows, None] + rng.normal(0, 0.2, (len(rows), EVALS))).astype(np.float32)
        prints = rng.bytes(32 * len(rows))
        yield pa.table(
            {
                "key": [source.keys[i] for i in indices],
                "label": source.labels[rows],
                "losses": pa.FixedSizeListArray.from_arrays(losses.reshape(-1), EVALS).cast(pa.list_(pa.float32())),
                "times": pa.nulls(len(rows), pa.list_(pa.float32())),
                "xxh3": [f"{i:032x}" for i in indices],
                "bytes": rows * 0 + 110_000,
                "width": pa.array(rows * 0 + 500, pa.int32()),
                "height": pa.array(rows * 0 + 375, pa.int32()),
                "gradient": spread[rows].astype(np.float32),
                "pixels_xxh3": [f"{i:032x}" for i in indices],
                "phash": [prints[32 * i : 32 * i + 32] for i in range(len(rows))],
                "reason": pa.nulls(len(rows), pa.string()),
            },
            schema=PART_SCHEMA,
        )

    Difficulty.tables = tables  # type: ignore[method-assign]
    torch.set_num_threads(1)


def share(plan: scoring.Plan) -> scoring.Plan:
    """All parts, as one task of a job array does them: without merging."""
    return replace(plan, config=replace(plan.config, share=(1, 1)))


if __name__ == "__main__":
    main()
