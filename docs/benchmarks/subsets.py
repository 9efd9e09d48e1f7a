"""Write subsets.md: every selection method on a scored CIFAR-10, against the full set and random draws; no training.

PYTHONPATH=. python docs/benchmarks/subsets.py WORKSPACE > docs/benchmarks/subsets.md

The selectors' features come from one classifier (the teacher), the distances from another (the judge: other seed, other
image size), so that no method is measured by what it optimised.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine, note
from tables import table

from d2c import batches, runtime
from d2c.classifier import Classifier, train_classifier
from d2c.labelling import reopen
from d2c.selection import SelectionConfig, select
from d2c.selectors import METHODS
from d2c.sources import Source
from d2c.subsets import FullSet
from d2c.workspace import SCORES, Workspace
from formats.files import read_table

Array = np.ndarray[Any, Any]
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS if name != "random"},
    "interval by gradient": {"method": "interval", "score": "gradient"},
    "match by gradient": {"method": "match", "score": "gradient"},
    "match, easiest half": {"method": "match", "easiest": 0.5},
}
TEXT = """# Subsets of CIFAR-10, without training

[subsets.py](subsets.py) made this page from a workspace in which `d2c score` had scored {images:,} images of {classes}
classes ({evals} evaluations, {scorer}). Features for the selectors: the teacher, a classifier trained on these images
({teacher:.0%} of held-out images right). Distances: the judge, another one ({judge:.0%}, other seed, {judge_px} px).
*FD*: Frechet distance of the subset to all images. *class FD*: its mean over classes, of means and standard deviations
alone. *coverage*: images that have a pick among their nearest. *rank*: mean rank of the picks by score, 0 easiest, 1
hardest. In brackets, distance from random in standard deviations of its {draws} draws. *s*: seconds on one thread, all
classes.

{tables}

How to read it: fewer than about 3 deviations are noise, and a method that only looks at scores can match no features.
What a distance of subsets says about a trained model is another question.

{machine}
"""


def main() -> None:
    """Measure and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--per-class", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--judge-size", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    workspace = Workspace(args.workspace)
    record = workspace.scores.require("d2c score DIR")
    scores, source = read_table(workspace.scores.output(SCORES)), reopen(workspace)
    labels = scores["label"].to_numpy()
    teacher, features = seen(source, scores["key"].to_pylist(), labels, int(record.config["size"]), seed=1)
    judge, judged = seen(source, scores["key"].to_pylist(), labels, args.judge_size, seed=2)
    judged /= np.sqrt(judged.var(axis=0).sum())
    classes, tables = len(record.summary["classes"]), []
    row_of = {key: row for row, key in enumerate(scores["key"].to_pylist())}

    def choose(budget: int, options: dict[str, Any]) -> tuple[Array, float, float]:
        start = time.perf_counter()
        config = SelectionConfig(workspace=args.workspace, per_class=budget, **options)
        picks = select(scores, config, classes, features if config.needs_features else None)
        seconds = time.perf_counter() - start
        sizes = np.bincount(labels)[picks["label"].to_numpy()]
        rank = float(np.mean(picks["class_rank"].to_numpy() / (sizes - 1))) if "score" not in options else float("nan")
        return np.array([row_of[key] for key in picks["key"].to_pylist()]), seconds, rank

    for budget in args.per_class:
        full = FullSet.of(judged, labels, classes, budget * classes)
        draws = [
            measured(full, judged, labels, *choose(budget, {"method": "random", "seed": seed}))
            for seed in range(args.draws)
        ]
        mean, sd = np.nanmean(draws, axis=0), np.nanstd(draws, axis=0, ddof=1)
        rows = [
            [
                "random",
                *(f"{m:.4f} ± {s:.4f}" for m, s in zip(mean[:3], sd[:3], strict=True)),
                f"{mean[3]:.2f}",
                f"{mean[4]:.1f}",
            ]
        ]
        for name, options in VARIANTS.items():
            note(f"{budget} per class: {name}")
            found = measured(full, judged, labels, *choose(budget, options))
            cells = [f"{v:.4f} ({(v - m) / s:+.1f})" for v, m, s in zip(found[:3], mean[:3], sd[:3], strict=True)]
            rows.append([name, *cells, "" if np.isnan(found[3]) else f"{found[3]:.2f}", f"{found[4]:.1f}"])
        share = budget * classes / len(labels)
        head = ["method", "FD", "class FD", "coverage", "rank", "s"]
        tables.append(f"## {budget} images a class ({share:.1%})\n\n{table(head, rows)}")
    facts = record.summary["scorer"]["facts"]
    print(
        TEXT.format(
            images=len(labels), classes=classes, evals=record.config["evals"], scorer=facts["model"],
            teacher=teacher, judge=judge, judge_px=args.judge_size, draws=args.draws, tables="\n\n".join(tables),
            machine=machine(("torch", "numpy", "scipy", "scikit-learn")),
        ),
        end="",
    )  # fmt: skip


def measured(full: FullSet, features: Array, labels: Array, rows: Array, seconds: float, rank: float) -> list[float]:
    """FD, class FD, coverage, mean rank and seconds of one subset."""
    found = full.measure(features[rows], labels[rows])
    assert found.coverage is not None
    return [found.distance, float(np.nanmean(found.by_class)), found.coverage, rank, seconds]


def seen(source: Source, keys: list[str], labels: Array, size: int, *, seed: int) -> tuple[float, Array]:
    """Accuracy and features [N, D] of a classifier trained on at most 20,000 of the images at ``size`` px."""
    note(f"classifier {seed}: reading {len(keys):,} images at {size} px")
    place = {key: index for index, key in enumerate(source.keys)}
    pixels = np.empty((len(keys), size, size, 3), np.uint8)
    start = 0
    for batch in batches.load(source, [place[key] for key in keys], size, batch=256):
        pixels[start : start + len(batch)] = batch.pixels
        start += len(batch)
    chosen = np.sort(runtime.rng("benchmark", seed).permutation(len(keys))[:20_000])
    classifier: Classifier = train_classifier(pixels[chosen], labels[chosen], device=torch.device("cpu"), seed=seed)
    return classifier.info.accuracy, classifier(pixels).astype(np.float32)


if __name__ == "__main__":
    main()
