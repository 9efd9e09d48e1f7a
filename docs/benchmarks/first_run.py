"""Write first-run.md from what first_run.sh left: every figure is read, none is typed.

python docs/benchmarks/first_run.py OUT > docs/benchmarks/first-run.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from tables import read, spread, table

ARMS = {
    "interval": "interval + text + vision (D2C)",
    "random": "random + text + vision",
    "random-plain": "random, no attachments",
}
MEASURES = ("distance", "class_distance", "precision", "recall")
TEXT = """# First run: CIFAR-10, 2 %, on a CPU

The whole path through the public commands, on 50,000 real images of 32 px: [first_run.sh](first_run.sh) made the
figures, [first_run.py](first_run.py) this page. The scorer was trained by `d2c score` itself; the measuring network is
another one, trained on the same images (so this is not FID). Interval sampling has no randomness, so its runs differ in
the training seed alone; random draws differ in both.
"""


def compare(name: str, one: list[float], other: list[float]) -> str:
    gap = np.mean(other) - np.mean(one)
    error = np.sqrt(np.var(one, ddof=1) / len(one) + np.var(other, ddof=1) / len(other))
    size = abs(gap) / error
    # The 5 % point of Student's t with 4 degrees of freedom, which two arms of 3 seeds have.
    verdict = "within the noise" if size < 2.78 else "beyond the noise"
    return f"- {name}: {abs(gap):.2f} {'lower' if gap > 0 else 'higher'}, {size:.1f} standard errors: {verdict}."


def main(out: Path) -> None:
    scores = read(out / "workspace" / "scores" / "stage.json")
    reports = {arm: [read(out / "runs" / f"{arm}-{seed}" / "fid" / "fid.json") for seed in range(3)] for arm in ARMS}
    first = reports["interval"][0]
    protocol, rows = first["protocol"], {row["name"]: row for row in first["rows"]}
    trust = scores["summary"]["rank_correlation"]
    judge = read(out / "workspace" / "judge" / "stage.json")["summary"]
    space = first["space"]["distance"]
    print(TEXT)
    print("## Results\n")
    body = [
        [
            name,
            *(spread([report["rows"][0][measure] for report in reports[arm]], 3) for measure in MEASURES),
            spread([report["copying"]["features"]["rate"] for report in reports[arm]], 4),
        ]
        for arm, name in ARMS.items()
    ]
    print(table(["arm", space, "mean per class", "precision", "recall", "copy rate"], body))
    print(f"\nMean ± standard deviation over {len(reports['interval'])} seeds. A copy rate of 0.01 is what unseen real")
    print(f"images have by construction; flagged runs: {flagged(reports)}. In {space}:\n")
    distances = {arm: [report["rows"][0]["distance"] for report in reports[arm]] for arm in ARMS}
    print(compare("attaching (random with against random without)", distances["random"], distances["random-plain"]))
    print(compare("selecting (interval against random, both attached)", distances["interval"], distances["random"]))
    print("\nWith 3 seeds an arm, a difference counts from 2.8 standard errors (5 %, Student's t). Scores of")
    print("pixels are mostly texture: this says little about interval sampling in a latent space.")
    print("\nHow to read the distance, from rows that need no model:\n")
    anchors = [[name, f"{row['n']:,}", f"{row['distance']:.3f}"] for name, row in rows.items() if name != "generated"]
    print(table(["images", "n", space], anchors))
    print("\n## Protocol\n")
    print(
        f"- {scores['summary']['images']:,} images scored with {trust['evaluations']} stratified evaluations each by a"
    )
    print(
        f"  {scores['summary']['scorer']['facts']['model']} trained on them; split-half rank correlation inside a class"
    )
    print(f"  {trust['split_half']:.3f}, expected between two full scorings {trust['expected']:.3f}.")
    print(
        f"- {protocol['images']} images packed; {protocol['model']}, recipe `{protocol['recipe']}`, {protocol['steps']}"
    )
    print(f"  steps of {protocol['batch_size']}: {protocol['passes_per_image']} passes per image. This is far from")
    print("  convergence: it measures the speed of early learning, not the best that a subset can do.")
    sampler = protocol["sampler"]
    print(f"- {protocol['samples']:,} samples an arm and seed, {sampler['method']}, {sampler['steps']} steps, guidance")
    print(f"  {sampler['guidance']}, balanced labels; {protocol['reference_images']:,} real images as reference; the")
    print(f"  measuring classifier is right on {judge['accuracy']:.0%} of held-out images.")
    print("\n## Cost\n")
    costs = first["costs"]
    print("Seconds of one CPU process, interval arm, seed 0, on 2 shared cores with other work beside it:\n")
    stages = [[name, f"{value:,.0f}"] for name, value in costs.items() if isinstance(value, int | float)]
    print(table(["stage", "seconds"], stages))


def flagged(reports: dict[str, list[dict[str, Any]]]) -> str:
    names = [f"{arm}-{seed}" for arm in ARMS for seed, r in enumerate(reports[arm]) if r["copying"]["flagged"]]
    return ", ".join(names) or "none"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
