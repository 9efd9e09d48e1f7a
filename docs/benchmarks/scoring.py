"""How many evaluations a score needs, Algorithm 2 against ours, and what they cost: `scoring.md` on stdout.

Two independent scorings of the same images are compared in rank, inside a class. Then the plain loop of Algorithm 2
(time and noise drawn for every image, batch after batch) is timed beside our scorer, in turns, with the same model,
batch and device.

    python docs/benchmarks/scoring.py cifar10-train.parquet --scorer d2c-workspace/scorer/0123abcd/run
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from machine import machine, note

from d2c import batches, runtime
from d2c.difficulty import Difficulty, Settings
from d2c.estimator import agreement
from d2c.latents import to_model
from d2c.sources import Source, open_source

TARGET = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--scorer", required=True)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--codec", default="rgb")
    parser.add_argument("--per-class", type=int, default=50, help="images of each class")
    parser.add_argument("--ours", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--paper", type=int, nargs="+", default=[8, 16, 32, 64, 128, 192])
    parser.add_argument("--rounds", type=int, default=5, help="of the timing")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    settings = Settings(
        scorer=options.scorer,
        objective=None,
        class_map=None,
        codec=options.codec,
        size=options.size,
        estimator="stratified",
        evals=8,
        batch_size=64,
        compile=False,
        precision=runtime.resolve_precision("auto", runtime.resolve_device(options.device)),
        seed=0,
        device=options.device,
        threads=2,
    )
    source = open_source(options.source)
    judge = Difficulty.open(settings, source)
    rng = runtime.rng("benchmark")
    labels = source.labels
    chosen = np.sort(
        np.concatenate([rng.permutation(np.flatnonzero(labels == c))[: options.per_class] for c in np.unique(labels)])
    )
    loaded = list(batches.load(source, chosen.tolist(), options.size, batch=64))
    with runtime.one_thread(judge.device):
        ours = {n: reliability(judge, loaded, "stratified", n) for n in options.ours}
        paper = {n: reliability(judge, loaded, "paper", n) for n in options.paper}
        needs = {name: needed(table) for name, table in (("ours", ours), ("paper", paper))}
        # Where Algorithm 2 does not get there, the most that was tried gives a lower bound of its cost.
        counts = {"paper": needs["paper"] or max(paper), "ours": needs["ours"]}
        speed = timing(judge, loaded, {name: round(n) for name, n in counts.items() if n}, options.rounds)
    print(render(options, judge, source, len(chosen), ours, paper, needs, speed))


def scores(judge: Difficulty, loaded: list[batches.Batch], settings: Settings) -> np.ndarray:
    other = replace(judge, settings=settings)
    found = []
    for batch in loaded:
        keys = [judge.source.keys[i] for i in batch.indices]
        found.append(
            other.losses(batch.pixels, keys, judge.labels[judge.source.labels[batch.indices]])[0].numpy().mean(axis=1)
        )
    return np.concatenate(found)


def reliability(judge: Difficulty, loaded: list[batches.Batch], estimator: str, evals: int) -> float:
    note(f"{estimator}: {evals} evaluations")
    seeds = (101, 202)
    one, other = (
        scores(judge, loaded, replace(judge.settings, estimator=estimator, evals=evals, seed=seed)) for seed in seeds
    )
    labels = judge.source.labels[np.concatenate([batch.indices for batch in loaded])]
    return agreement(one, other, labels)[0]


def needed(table: dict[int, float]) -> float | None:
    """Evaluations at which the target is reached, between the measured ones by the logarithm; None: not reached."""
    before = None
    for evals, found in sorted(table.items()):
        if found >= TARGET:
            if before is None:
                return float(evals)
            share = (TARGET - before[1]) / (found - before[1])
            return float(np.exp(np.log(before[0]) + share * (np.log(evals) - np.log(before[0]))))
        before = (evals, found)
    return None


def plain_loop(judge: Difficulty, batch: batches.Batch, evals: int) -> None:
    """Algorithm 2 as it is written: for each image and each draw its own time and noise."""
    latents = to_model(torch.from_numpy(judge.codec.encode(batch.pixels)), judge.codec.spec)
    classes = torch.from_numpy(judge.labels[judge.source.labels[batch.indices]])
    total = torch.zeros(len(latents))
    with torch.inference_mode():
        for _ in range(evals):
            total += judge.denoiser.loss(latents, torch.randn_like(latents), torch.rand(len(latents)), classes)


def timing(
    judge: Difficulty, loaded: list[batches.Batch], evals: dict[str, int], rounds: int
) -> dict[str, list[float]]:
    """Images per second of each, in turns."""
    if len(evals) < 2:
        return {}
    batch = loaded[0]
    keys = [judge.source.keys[i] for i in batch.indices]
    labels = judge.labels[judge.source.labels[batch.indices]]
    own = replace(judge, settings=replace(judge.settings, evals=evals["ours"]))
    found: dict[str, list[float]] = {"ours": [], "paper": []}
    for number in range(rounds + 1):
        note(f"timing, round {number}")
        for name, rates in found.items():
            start = time.perf_counter()
            if name == "ours":
                own.losses(batch.pixels, keys, labels)[0].numpy()
            else:
                plain_loop(judge, batch, evals["paper"])
            if number:
                rates.append(len(batch) / (time.perf_counter() - start))
    return found


def render(
    options: argparse.Namespace,
    judge: Difficulty,
    source: Source,
    images: int,
    ours: dict[int, float],
    paper: dict[int, float],
    needs: dict[str, float | None],
    speed: dict[str, list[float]],
) -> str:
    lines = [
        "# How many evaluations a score needs",
        "",
        "[scoring.py](scoring.py) made this page: Spearman correlation, inside a class, between two independent",
        f"scorings of {images} images of {source.name} ({options.per_class} a class, {options.size} px) by",
        f"{judge.denoiser.spec.name}. *Algorithm 2*: time and noise drawn for every image (`--estimator paper`).",
        "*Ours*: one time from each stratum and the same noise for all images (the default).",
        "",
        "| evaluations an image | Algorithm 2 | ours |",
        "|---|---|---|",
    ]
    for evals in sorted({*ours, *paper}):
        cells = [f"{table[evals]:.3f}" if evals in table else "" for table in (paper, ours)]
        lines.append(f"| {evals} | {cells[0]} | {cells[1]} |")
    at_least = "" if needs["paper"] else "at least "
    shown = {"paper": f"{needs['paper']:.1f}" if needs["paper"] else f"not reached with {max(paper)}"}
    shown["ours"] = f"{needs['ours']:.1f}" if needs["ours"] else "not reached"
    lines += ["", f"Evaluations at {TARGET}: Algorithm 2 {shown['paper']}, ours {shown['ours']}"]
    fewer = (needs["paper"] or max(paper)) / needs["ours"] if needs["ours"] else None
    lines[-1] += f": {at_least}**{fewer:.1f} times** fewer." if fewer else "."
    if speed:
        ratios = sorted(a / b for a, b in zip(speed["ours"], speed["paper"], strict=True))
        lines += [
            "",
            f"Images a second with so many, in turns, {len(ratios)} rounds: the plain loop of Algorithm 2",
            f"{np.median(speed['paper']):.1f}, ours {np.median(speed['ours']):.1f}:",
            f"{at_least}**{np.median(ratios):.1f} times** [{ratios[0]:.1f}, {ratios[-1]:.1f}].",
        ]
    return "\n".join([*lines, "", machine(("torch", "numpy"))])


if __name__ == "__main__":
    main()
