"""Write flips.md from what flips.sh left: every figure is read, none is typed.

PYTHONPATH=.:docs/benchmarks python docs/benchmarks/flips.py OUT > docs/benchmarks/flips.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from attach import mirror
from machine import machine
from tables import read, table
from training_runs import MEASURES, SEEDS, T, reports, row, verdict

from d2c.tokens import VisionTokens
from d2c.workspace import Workspace

ARMS = {"none": "never", "grid": "latents and token grid together", "stored": "as encoded from the mirror image"}
COMPARED = ("FD", "mean FD of classes", "held-out loss")
TEXT = """# Mirror images: none, mirrored tokens, or tokens of the mirror image

[flips.sh](flips.sh) made the figures, [flips.py](flips.py) this page: {images} random images of CIFAR-10 at {side} px
with text and the scorer's tokens on a {grid} x {grid} grid, {model}, recipe `{recipe}`, {steps:,} steps of {batch}. An
image is mirrored half of the time: never, its latent (exact in pixels) and its stored tokens' grid together, or with
the tokens that the encoder made of the mirror image. {samples:,} samples a run against {reference:,} real images,
measured by a classifier: not FID.

{table}

Mean ± standard deviation over {seeds} runs, which differ in the draw of images and in the training seed. Against never:

{verdicts}

With {seeds} runs an arm a difference counts from {t} standard errors (5 %, Student's t).

How close mirrored tokens are to the encoder's own of the mirror image (mean cosine over tokens; *centred*: without the
token that all have in common): {mirrored} mirrored and {straight} as they are, centred {mirrored_c} and {straight_c}.
For other encoders see [attach.md](attach.md).

{machine}
"""


def main(out: Path) -> None:
    """Read the reports and print the page."""
    found = reports(out, [f"flip-{arm}" for arm in ARMS])
    named = {name: found[f"flip-{arm}"] for arm, name in ARMS.items() if f"flip-{arm}" in found}
    protocol = named["never"][0]["protocol"]
    workspace = Workspace(out / "workspace")
    stages = sorted(workspace.path.glob("attachments/random-*/*/encoder.json"))
    tokens = [VisionTokens.open(workspace.vision(path.parts[-3], path.parts[-2])) for path in stages]
    grid = round(tokens[0].shape[0] ** 0.5)
    close = mirror(next(one for one in tokens if one.views == 2), grid)
    scores = read(workspace.scores.path / "stage.json")
    print(
        TEXT.format(
            images=protocol["images"], side=scores["config"]["size"], grid=grid, model=protocol["model"],
            recipe=protocol["recipe"], steps=protocol["steps"], batch=protocol["batch_size"],
            samples=protocol["samples"], reference=protocol["reference_images"], seeds=SEEDS, t=T,
            table=table(["mirrored", *MEASURES], [row(arm, runs) for arm, runs in named.items()]),
            verdicts="\n".join(verdict(arm, "never", named, COMPARED) for arm in named if arm != "never"),
            mirrored=close[0], straight=close[1], mirrored_c=close[2], straight_c=close[3],
            machine=machine(("torch", "numpy")),
        ),
        end="",
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
