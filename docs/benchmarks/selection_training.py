"""Write selection_training.md from what selection_training.sh left: every figure is read, none is typed.

PYTHONPATH=. python docs/benchmarks/selection_training.py OUT > docs/benchmarks/selection_training.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from first_run import read, spread, table
from machine import machine

METHODS = ("random", "random-window", "interval", "facility-location", "kernel", "match")
SEEDS = 3
MEASURES = ("distance", "class_distance", "precision", "recall")
T = 2.78
"""The 5 % point of Student's t with 4 degrees of freedom, which two arms of 3 seeds have."""
TEXT = """# Selections of CIFAR-10, trained

[selection_training.sh](selection_training.sh) made the figures, [selection_training.py](selection_training.py) this
page: {images} images ({share:.1%}), no attachments, {model}, recipe `{recipe}`, {steps} steps of {batch}:
{passes:.0f} passes an image. {samples:,} samples a run, {sampler}, {sampling} steps, guidance {guidance}, against
{reference:,} real images; the measuring classifier is right on {accuracy:.0%} of held-out images, so this is not FID.

{table}

Mean ± standard deviation over {seeds} runs. Rules without randomness differ in the training seed alone; random draws
differ in both. A copy rate of 0.01 is what unseen real images have by construction. Against `random`, in mean distance
per class:

{verdicts}

With {seeds} runs an arm a difference counts from {t} standard errors (5 %, Student's t), and of {compared} comparisons
one in {odds:.0f} is expected to look like one by chance. Scores of pixels are mostly texture, and {passes:.0f} passes
are few: the paper's regime is about 1,000 in a latent space.

{machine}
"""


def main(out: Path) -> None:
    """Read the reports and print the page."""
    runs = out / "runs"
    paths = {name: [runs / f"{name}-{seed}" / "fid" / "fid.json" for seed in range(SEEDS)] for name in METHODS}
    reports = {method: [read(path) for path in found if path.exists()] for method, found in paths.items()}
    reports = {method: found for method, found in reports.items() if len(found) == SEEDS}
    judge = read(out / "workspace" / "judge" / "stage.json")["summary"]
    protocol = reports["random"][0]["protocol"]
    rows = [
        [
            method,
            *(spread([report["rows"][0][measure] for report in found], 3) for measure in MEASURES),
            spread([report["copying"]["features"]["rate"] for report in found], 4),
        ]
        for method, found in reports.items()
    ]
    compared = [method for method in reports if method != "random"]
    print(
        TEXT.format(
            images=protocol["images"], share=protocol["images"] / 50_000, model=protocol["model"],
            recipe=protocol["recipe"], steps=protocol["steps"], batch=protocol["batch_size"],
            passes=protocol["passes_per_image"], samples=protocol["samples"], sampler=protocol["sampler"]["method"],
            sampling=protocol["sampler"]["steps"], guidance=protocol["sampler"]["guidance"],
            reference=protocol["reference_images"], accuracy=judge["accuracy"], seeds=SEEDS, t=T,
            table=table(["method", reports["random"][0]["space"]["distance"], "mean per class", "precision", "recall",
                         "copy rate"], rows),
            verdicts="\n".join(verdict(method, reports) for method in compared), compared=len(compared),
            odds=20 / max(1, len(compared)), machine=machine(("torch", "numpy")),
        ),
        end="",
    )  # fmt: skip


def verdict(method: str, reports: dict[str, list[dict[str, Any]]]) -> str:
    """One line: how far a method's runs are from the random ones."""
    one, other = (
        np.array([report["rows"][0]["class_distance"] for report in reports[name]]) for name in (method, "random")
    )
    gap = one.mean() - other.mean()
    size = abs(gap) / np.sqrt(one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other))
    word = "within the noise" if size < T else "beyond the noise"
    return f"- {method}: {abs(gap):.2f} {'lower' if gap < 0 else 'higher'}, {size:.1f} standard errors: {word}."


if __name__ == "__main__":
    main(Path(sys.argv[1]))
