"""How long measuring takes at full size, and beside torch-fidelity's own functions: `metrics_scale.md` on stdout.

Features are seeded clusters, since only their number and width matter. Each measurement runs in a process of its own,
so that its peak memory is its own. The k-NN metrics are compared at a smaller size, on the same features, in turns.

    python docs/benchmarks/metrics_scale.py > docs/benchmarks/metrics_scale.md
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from machine import machine, note

from d2c import intervals, metrics, neighbours

WIDTH = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--manifold", type=int, default=10_000, help="real images in the k-NN metrics")
    parser.add_argument("--compared", type=int, default=10_000, help="images on either side beside torch-fidelity")
    parser.add_argument("--one", choices=TASKS, help="measure this alone, as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(TASKS[options.one](options)))
        return
    found = {}
    for name in TASKS:
        note(name)
        command = [sys.executable, __file__, "--one", name]
        for option in ("images", "manifold", "compared"):
            command += [f"--{option}", str(getattr(options, option))]
        found[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(page(options, found))


def features(seed: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(64, WIDTH)).astype(np.float32)
    noise = rng.standard_normal((count, WIDTH), dtype=np.float32)
    noise *= np.linspace(1.5, 0.05, WIDTH, dtype=np.float32)
    noise += centres[rng.integers(0, len(centres), count)]
    return np.maximum(noise, 0, out=noise)


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    start = time.perf_counter()
    value = work()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return value, {"seconds": seconds, "peak_gib": peak}


def distance(options: argparse.Namespace) -> dict[str, float]:
    real, fake = metrics.statistics(features(1, 4 * WIDTH)), features(2, options.images)
    return timed(lambda: metrics.frechet_distance(metrics.statistics(fake), real).value)[1]


def interval(options: argparse.Namespace) -> dict[str, float]:
    real, fake = metrics.statistics(features(1, 4 * WIDTH)), features(2, options.images)
    return timed(lambda: intervals.distance_interval(fake, real, 1.0, np.random.default_rng(0)))[1]


def near(options: argparse.Namespace) -> dict[str, float]:
    real, fake = features(1, options.manifold), features(2, options.images)
    return timed(lambda: neighbours.manifold(real, fake))[1]


def beside(options: argparse.Namespace) -> dict[str, float]:
    from torch_fidelity.metric_prc import calculate_precision_recall_full, calculate_precision_recall_part

    real, fake = features(1, options.compared), features(2, options.compared)
    tensors = torch.from_numpy(fake), torch.from_numpy(real)
    ours, first = timed(lambda: neighbours.manifold(real, fake))
    theirs, part = timed(lambda: calculate_precision_recall_part(*tensors))
    _, full = timed(lambda: calculate_precision_recall_full(*tensors))
    _, second = timed(lambda: neighbours.manifold(real, fake))
    mine = (first["seconds"] + second["seconds"]) / 2
    return {
        "ours": mine,
        "part": part["seconds"],
        "full": full["seconds"],
        "precision": ours.precision - theirs[0],
        "recall": ours.recall - theirs[1],
    }


TASKS = {"distance": distance, "interval": interval, "near": near, "beside": beside}


TEXT = """# Measuring at full size

[metrics_scale.py](metrics_scale.py) made this page; features have {width:,} dimensions, threads: {threads}. The peak is
of the whole process, with the features themselves (float32) and the libraries. Sums are float64; distances between
images are float32 products, those near an edge computed again in float64.

| measurement | images | seconds | peak GiB |
|---|---|---|---|
{rows}

Beside torch-fidelity, precision and recall of {compared:,} images against as many, on the same features: ours
{ours:.1f} s (with density and coverage; the mean of a run before and one after), its function for little
memory {part:.1f} s (ratio {to_part:.2f}), its default {full:.1f} s (ratio {to_full:.2f}), both in float32
throughout. Our precision differs by {precision:+.1e}, recall by {recall:+.1e}.

{machine}"""


def page(options: argparse.Namespace, found: dict[str, dict[str, float]]) -> str:
    count = f"{options.images:,}"
    rows = [
        ("statistics and distance", count, found["distance"]),
        ("interval of the distance", count, found["interval"]),
        ("precision, recall, density, coverage", f"{count} against {options.manifold:,} real", found["near"]),
    ]
    both = found["beside"]
    return TEXT.format(
        width=WIDTH,
        threads=torch.get_num_threads(),
        rows="\n".join(f"| {name} | {n} | {one['seconds']:.1f} | {one['peak_gib']:.2f} |" for name, n, one in rows),
        compared=options.compared,
        to_part=both["part"] / both["ours"],
        to_full=both["full"] / both["ours"],
        machine=machine(("numpy", "scipy", "torch", "torch-fidelity")),
        **both,
    )


if __name__ == "__main__":
    main()
