"""The `ot` selector: seconds a class, and against GADC's own code (arXiv 2606.05883): `selection.md` on stdout.

Without a clone of GADC's repository only the seconds are measured. With one, its greedy and its refinement run in this
process, on as many threads, in turns with ours, on the same features, with the settings of its own `main`; its own
function judges both.

    git clone https://github.com/2018cx/GADC
    python docs/benchmarks/selection.py --gadc GADC --data cifar10-train.parquet > docs/benchmarks/selection.md
    python docs/benchmarks/selection.py --gadc GADC --json
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
import textwrap
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine, note

from d2c import batches, runtime
from d2c.selectors.base import Candidates
from d2c.selectors.ot import PartialTransport, Search, Weights, ot
from d2c.sources import open_source

THREADS = 1
WEIGHTS = Weights()
SCALE = 15
"""Median squared distance of the features, in epsilons."""
CLASSES, SMALL, BUDGET = 3, (300, 512), 10
LARGE, BUDGETS = (1300, 2048), (10, 50, 100)
REFINE = 30
PARTLY = 64
"""Candidates of the large class that GADC's code evaluates: a full round is 12,900."""
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gadc", type=Path, help="a clone of GADC's repository")
    parser.add_argument("--data", type=Path, help="images with labels; without it, features are seeded clusters")
    parser.add_argument("--json", action="store_true", help="one line of JSON in place of the page")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    found: dict[str, Any] = {}
    if options.gadc:
        rival = load(options.gadc)
        small = [features(options.data, label, *SMALL) for label in range(CLASSES)]
        found["classes"] = [whole(rival, one) for one in small]
        found["speedup"] = min(row["speedup"] for row in found["classes"])
        found["objective_ratio"] = max(row["objective_ratio"] for row in found["classes"])
    large = features(options.data, 0, *LARGE)
    if options.gadc:
        found["candidate"] = per_candidate(rival, large)
    found["seconds"] = {str(budget): choose(large, budget)[1] for budget in BUDGETS}
    print(json.dumps(found) if options.json else render(options, found))


def load(clone: Path) -> types.ModuleType:
    """GADC's selection for ResNet-50 as it is; only its readers of ImageNet, which it imports, are left out."""
    for name, function in (("dataload", "get_by_id"), ("feature", "get_features")):
        stub = types.ModuleType(name)
        setattr(stub, function, None)
        sys.modules[name] = stub
    spec = importlib.util.spec_from_file_location("gadc", clone / "selection" / "resnet50" / "select.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def features(data: Path | None, label: int, count: int, width: int) -> Candidates:
    """Of one class: of images by a seeded convolutional network without training, or seeded clusters."""
    note(f"features of class {label}: {count} x {width}")
    rng = np.random.default_rng([label, count])
    values = convolved(data, label, count, width) if data else clusters(rng, count, width)
    norms = np.square(values).sum(axis=1)
    distances = norms[:, None] + norms - 2 * values @ values.T
    values *= np.sqrt(SCALE * WEIGHTS.epsilon / np.median(distances[np.triu_indices(count, 1)]))
    confusion = rng.exponential(size=count)
    keys = [f"{row:05d}" for row in range(count)]
    return Candidates(keys, confusion, values.astype(np.float32), confusion)


def clusters(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Eight clusters in a space of a quarter of the width, seen through a random matrix and a rectifier."""
    inner = width // 4
    points = rng.normal(size=(8, inner))[rng.integers(0, 8, count)] + rng.normal(size=(count, inner))
    return np.maximum(points @ rng.normal(size=(inner, width)) / np.sqrt(inner) + 0.3, 0)


def convolved(data: Path, label: int, count: int, width: int) -> np.ndarray:
    source = open_source(data)
    rows = np.flatnonzero(source.labels == label)[:count].tolist()
    generator = runtime.generator("benchmark", width)
    kernels, channels = [], 3
    for out in (64, 128, 256, width):
        kernels.append(torch.randn(out, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5)
        channels = out
    found = []
    with torch.inference_mode():
        for batch in batches.load(source, rows, 32, batch=64):
            values = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2) / 127.5 - 1
            for number, kernel in enumerate(kernels):
                values = torch.nn.functional.conv2d(values, kernel, padding=1, stride=2 if number else 1).relu()
            found.append(values.mean((2, 3)))
    return torch.cat(found).double().numpy()


def choose(candidates: Candidates, budget: int) -> tuple[list[int], float]:
    note(f"ours, {len(candidates)} images, budget {budget}")
    start = time.perf_counter()
    rows = ot(candidates, budget, np.zeros(0, dtype=np.int64), weights=WEIGHTS)
    return rows.tolist(), time.perf_counter() - start


@dataclass
class Rival:
    """GADC's functions on the features of one class, in the single precision that its code runs in."""

    module: types.ModuleType
    candidates: Candidates
    batch: int = 256
    precision: torch.dtype = torch.float32

    def settings(self) -> dict[str, Any]:
        """Its main()'s, and the statistics of the class by its own function."""
        mean, variance = self.module.compute_target_stats_on_the_fly(self.features, prefer_fp32=False)
        return {
            "epsilon": WEIGHTS.epsilon,
            "sinkhorn_iter": WEIGHTS.iterations,
            "batch_size": self.batch,
            "capacity_scale": WEIGHTS.capacity,
            "moment_weight": 1.0,
            "mu_t": mean,
            "var_t": variance,
            "scale_match": WEIGHTS.moments,
            "ce_all": torch.from_numpy(self.candidates.confusion).to(self.precision),
            "ce_weight": WEIGHTS.confusion,
        }

    @property
    def features(self) -> torch.Tensor:
        return torch.from_numpy(self.candidates.features).to(self.precision)

    def choose(self, budget: int) -> tuple[list[int], float]:
        note(f"GADC, {len(self.candidates)} images, budget {budget}")
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            rows = self.module.greedy_sinkhorn_selection_batch(self.features, budget, **self.settings())
            rows = self.module.global_refine_with_chunks(self.features, rows, max_iter=REFINE, **self.settings())
        return rows, time.perf_counter() - start

    def costs(self, subsets: np.ndarray) -> np.ndarray:
        return (
            self.module.compute_costs_in_batches(self.features, torch.from_numpy(subsets), **self.settings())
            .double()
            .numpy()
        )


def whole(module: types.ModuleType, candidates: Candidates) -> dict[str, float]:
    """Greedy and refinement; ours once before and once after."""
    before = choose(candidates, BUDGET)[1]
    theirs, seconds = Rival(module, candidates).choose(BUDGET)
    ours, after = choose(candidates, BUDGET)
    judge = Rival(module, candidates, precision=torch.float64)
    costs = judge.costs(np.array([ours, theirs]))
    own = PartialTransport(candidates.features, candidates.confusion, np.arange(len(candidates)), WEIGHTS).value(
        np.array(theirs)
    )
    return {
        "seconds": (before + after) / 2,
        "seconds_gadc": seconds,
        "speedup": 2 * seconds / (before + after),
        "objective": costs[0],
        "objective_gadc": costs[1],
        "objective_ratio": costs[0] / costs[1],
        "difference_of_objectives": abs(own / costs[1] - 1),
    }


def per_candidate(module: types.ModuleType, candidates: Candidates) -> dict[str, float]:
    """Milliseconds for a swap's candidate beside picks already good: GADC's for some, ours for all of every place."""
    count, empty = len(candidates), np.zeros(0, dtype=np.int64)
    search = Search(
        PartialTransport(candidates.features, candidates.confusion, np.arange(count), WEIGHTS), count, empty
    )
    for _ in range(BUDGET):
        search.add()
    search.swap()
    others = np.setdiff1d(np.arange(count), search.rows)
    subsets = np.repeat(search.rows[None], PARTLY, axis=0)
    subsets[:, 0] = others[:PARTLY]
    rival = Rival(module, candidates, batch=PARTLY)
    rival.costs(subsets[:8])
    ours, gadc = [], []
    for number in range(ROUNDS):
        note(f"per candidate, round {number}")
        gadc.append(timed(lambda: rival.costs(subsets)) / PARTLY)
        ours.append(timed(search.swap) / (BUDGET * len(others)))
    return {"ms": 1e3 * float(np.median(ours)), "ms_gadc": 1e3 * float(np.median(gadc))}


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def render(options: argparse.Namespace, found: dict[str, Any]) -> str:
    origin = f"a convolutional network without training on {options.data.name}" if options.data else "seeded clusters"
    lines = [
        "# What a choice by partial transport costs",
        "",
        filled(
            f"[selection.py](selection.py) made this page. Features: {origin}, scaled to a median squared distance of "
            f"{SCALE * WEIGHTS.epsilon:g} ({SCALE} epsilon); cross-entropies are seeded draws. {THREADS} thread."
        ),
        "",
        f"One class of {LARGE[0]:,} images x {LARGE[1]:,} dimensions, by `ot` from nothing:",
        "",
        "| budget | seconds a class | hours for 1,000 classes, one after the other |",
        "|---|---|---|",
    ]
    lines += [f"| {n} | {seconds:.1f} | {seconds / 3.6:.1f} |" for n, seconds in found["seconds"].items()]
    if "classes" in found:
        lines += ["", "## Against GADC's own code", "", *against(found)]
    return "\n".join([*lines, "", machine(("torch", "numpy"))])


def against(found: dict[str, Any]) -> list[str]:
    candidate, classes = found["candidate"], found["classes"]
    difference = max(row["difference_of_objectives"] for row in classes)
    return [
        filled(
            f"{CLASSES} classes of {SMALL[0]} images x {SMALL[1]} dimensions, budget {BUDGET}, greedy and refinement "
            f"(at most {REFINE} rounds), with the settings of its ResNet-50 script: epsilon {WEIGHTS.epsilon:g}, "
            f"{WEIGHTS.iterations} iterations, capacity {WEIGHTS.capacity:g}, moments {WEIGHTS.moments:g}, "
            f"cross-entropy {WEIGHTS.confusion:g}. Both in one process, in turns. The objective is by GADC's function "
            "in float64; smaller is better."
        ),
        "",
        "| class | seconds GADC | ours | times faster | objective GADC | ours | ratio |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {number} | {row['seconds_gadc']:.1f} | {row['seconds']:.2f} | {row['speedup']:.0f} | "
            f"{row['objective_gadc']:.3f} | {row['objective']:.3f} | {row['objective_ratio']:.4f} |"
            for number, row in enumerate(classes)
        ),
        "",
        filled(
            f"**At least {found['speedup']:.0f} times faster, objective at most {found['objective_ratio']:.4f} of "
            "theirs** (the worst class of each). On the same picks our value and that of their function differ by "
            f"{difference:.0e} of it at most."
        ),
        "",
        filled(
            f"A candidate for a swap at {LARGE[0]:,} x {LARGE[1]:,} with {BUDGET} picks, median of {ROUNDS} rounds in "
            f"turns: GADC {candidate['ms_gadc']:.1f} ms ({PARTLY} in a batch), ours {candidate['ms']:.4f} ms (a round "
            f"over all {BUDGET * (LARGE[0] - BUDGET):,}, most of which it need not evaluate): "
            f"{candidate['ms_gadc'] / candidate['ms']:,.0f} times less."
        ),
    ]


def filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    main()
