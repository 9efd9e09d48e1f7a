"""Write selection_training.md from what selection_training.sh left: every figure is read, none is typed.

PYTHONPATH=.:docs/benchmarks python docs/benchmarks/selection_training.py OUT > docs/benchmarks/selection_training.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from machine import machine
from tables import read, table
from training_runs import MEASURES, SEEDS, T, reports, row, verdict

METHODS = (
    "random", "random-window", "interval", "match", "kernel", "moments", "facility-location", "ot", "min", "max",
)  # fmt: skip
COMPARED = ("mean FD of classes", "held-out loss")
TEXT = """# Selections of CIFAR-10, trained

[selection_training.sh](selection_training.sh) made the figures, [selection_training.py](selection_training.py) this
page: {images} images of {side} px ({share:.1%}), nothing attached or mirrored, {model}, recipe `{recipe}`, {steps:,}
steps of {batch}: {passes:.0f} passes an image, about as many as in the paper's headline run. {samples:,} samples a run,
{sampler}, {sampling} steps, guidance {guidance}, against {reference:,} real images; the measuring classifier is right
on {accuracy:.0%} of held-out images, so this is not FID. *Held-out loss* is the averaged weights' denoising loss on 256
images that nobody chose.

{table}

Mean ± standard deviation over {seeds} runs. Rules without randomness differ in the training seed alone; random draws
differ in both. A copy rate of 0.01 is what unseen real images have by construction. Against `random`:

{verdicts}

With {seeds} runs an arm a difference counts from {t} standard errors (5 %, Student's t). Of {compared} comparisons
{expected:.1f} are expected to look like one by chance. Scores of pixels are mostly texture: in a latent space rules may
rank otherwise.

{machine}
"""


def main(out: Path) -> None:
    """Read the reports and print the page."""
    found = reports(out, METHODS)
    protocol = found["random"][0]["protocol"]
    judge = read(out / "workspace" / "judge" / "stage.json")["summary"]
    scores = read(out / "workspace" / "scores" / "stage.json")
    others = [method for method in found if method != "random"]
    print(
        TEXT.format(
            images=protocol["images"], side=scores["config"]["size"], share=protocol["images"] / 50_000,
            model=protocol["model"], recipe=protocol["recipe"], steps=protocol["steps"], batch=protocol["batch_size"],
            passes=protocol["passes_per_image"], samples=protocol["samples"], sampler=protocol["sampler"]["method"],
            sampling=protocol["sampler"]["steps"], guidance=protocol["sampler"]["guidance"],
            reference=protocol["reference_images"], accuracy=judge["accuracy"], seeds=SEEDS, t=T,
            table=table(["method", *MEASURES], [row(method, runs) for method, runs in found.items()]),
            verdicts="\n".join(verdict(method, "random", found, COMPARED) for method in others),
            compared=len(others) * len(COMPARED), expected=0.05 * len(others) * len(COMPARED),
            machine=machine(("torch", "numpy")),
        ),
        end="",
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
