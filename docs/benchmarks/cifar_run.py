"""Write cifar-run.md and its pictures from what cifar_run.sh left: every figure is read, none is typed.

PYTHONPATH=.:docs/benchmarks python docs/benchmarks/cifar_run.py OUT > docs/benchmarks/cifar-run.md
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from machine import machine
from tables import read, table

HERE = Path(__file__).parent
PICTURES = {"samples/grid.png": "cifar-run-samples.png", "curves.png": "cifar-run-curves.png"}
TEXT = """# A run to look at: 2 % of CIFAR-10

[cifar_run.sh](cifar_run.sh) made the run, [cifar_run.py](cifar_run.py) this page: {images:,} random images of CIFAR-10
with hashed text and the scorer's tokens, {model} ({parameters}) on plain pixels, {steps:,} steps of {batch},
{passes:.0f} passes an image, {hours:.1f} core-hours with other work beside. A model of this size draws colours,
horizons and blobs; what it is for is to show that all parts work together, and what a person sees on the way.

![100 samples, ten of each class, a column a class](cifar-run-samples.png)

100 samples, a column a class (airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck), 50 Euler steps,
guidance 1.5.

![Losses, and the memorisation clock](cifar-run-curves.png)

`curves.png` as the run leaves it. The memorisation clock (`--held-out`) at {passes:.0f} passes:

{table}

{machine}
"""


def main(out: Path) -> None:
    """Read the run, copy its pictures, and print the page."""
    run = out / "run"
    for name, copy in PICTURES.items():
        shutil.copyfile(run / name, HERE / copy)
    identity, spec = read(run / "run.json")["identity"], read(run / "model.json")
    recipe = identity["recipe"]
    lines = [json.loads(line) for line in (run / "memorisation.jsonl").read_text(encoding="utf-8").splitlines()]
    costs = [json.loads(line) for line in (run / "cost.jsonl").read_text(encoding="utf-8").splitlines()]
    images = sum(row["count"] for row in read(run / "run.json")["classes"])
    rows = [
        [f"{line['step']:,}", *(f"{line[name]:.4f} ± {line[f'{name}_stderr']:.4f}" for name in ("train", "held_out"))]
        for line in (lines[0], lines[len(lines) // 2], lines[-1])
    ]
    print(
        TEXT.format(
            images=images, model=identity["model"], parameters=f"{spec['depth']} blocks, {spec['width']} wide",
            steps=recipe["steps"], batch=recipe["batch_size"], passes=recipe["steps"] * recipe["batch_size"] / images,
            hours=sum(line["seconds"] for line in costs) / 3600,
            table=table(["step", "loss of 256 images that are trained on", "of 256 that are not"], rows),
            machine=machine(("torch", "numpy")),
        ),
        end="",
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
