"""Write selection_cost.md: what each selection method costs at ImageNet's size, in CPU seconds of one thread.

PYTHONPATH=. python docs/benchmarks/selection_cost.py > docs/benchmarks/selection_cost.md
"""

from __future__ import annotations

import resource
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from machine import machine, note
from tables import table
from threadpoolctl import threadpool_limits

from d2c.discriminant import FITTED, FOLDS, fit, judge
from d2c.selection import SelectionConfig, select
from d2c.selectors import METHODS, Candidates

IMAGES, CLASSES, SIZE, DIM = 1_281_167, 1000, 1300, 2048
BUDGETS = (10, 50, 100)
TEXT = """# What selecting costs at ImageNet's size

[selection_cost.py](selection_cost.py) made this page. CPU seconds of one thread. A process that selects needs no GPU;
`--gpus N` shares the classes among N processes.

## By scores: {images:,} images, {classes:,} classes, 0.8 %

{whole}

Most memory of the process, {dim:,}-dimensional features of a class below included: {peak:,.0f} MiB.

## By images: one class of {size:,} images, {dim:,} dimensions

Synthetic features of 20 clusters. In brackets, hours for 1,000 such classes on one thread.

{classwise}

## The classifier whose confidence `ot` weighs

{confidence}

{machine}
"""


def main() -> None:
    """Measure and print the page."""
    with threadpool_limits(1):
        scored, names = scores(), [name for name, method in METHODS.items() if not method.features]
        whole = []
        for name in names:
            config = SelectionConfig(workspace=Path(), method=name, ratio=0.008)
            seconds, picks = spent(lambda config=config: select(scored, config, CLASSES))
            assert picks.num_rows == 10 * CLASSES
            whole.append([name, f"{seconds:.2f}"])
            note(f"{name}: {seconds:.2f} s")
        one, rows = candidates(), []
        for name, method in METHODS.items():
            if not method.features:
                continue
            # The first call imports, and is not counted.
            method.select(small(one), 3, np.zeros(0, dtype=np.int64))
            found = [spent(lambda n=n, m=method: m.select(one, n, np.zeros(0, dtype=np.int64)))[0] for n in BUDGETS]
            rows.append([name, *(f"{s:.2f} ({s * CLASSES / 3600:.1f} h)" for s in found)])
            note(f"{name}: {found}")
        confidence = classified()
    print(
        TEXT.format(
            images=IMAGES, classes=CLASSES, size=SIZE, dim=DIM, whole=table(["method", "s"], whole),
            classwise=table(["method", *(f"{n} picks, s" for n in BUDGETS)], rows),
            peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
            confidence=confidence, machine=machine(("numpy", "scipy", "pyarrow")),
        ),
        end="",
    )  # fmt: skip


def spent(action: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of an action, and its result."""
    start = time.process_time()
    result = action()
    return time.process_time() - start, result


def scores() -> pa.Table:
    """A table of scores as `d2c score` writes it, in key order."""
    rng = np.random.default_rng(0)
    labels = np.sort(rng.integers(0, CLASSES, IMAGES)).astype(np.int32)
    keys = [f"n{label:08d}/n{label:08d}_{i:07d}.JPEG" for i, label in enumerate(labels.tolist())]
    return pa.table({"key": keys, "label": labels, "score": rng.gamma(2.0, size=IMAGES)})


def classified() -> str:
    """What the classifiers cost, as a sentence, with ImageNet's size projected from one fit and some judging."""
    with tempfile.TemporaryDirectory() as folder:
        features, labels = clustered(Path(folder), 100_000, 512, 100)
        whole, found = spent(lambda: judge(features, labels))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        note(f"classifier of 100,000: {whole:.1f} s")
        features, labels = clustered(Path(folder), FITTED, DIM, CLASSES)
        one, classifier = spent(lambda: fit(features, labels, np.arange(FITTED)))
        some = features[:2048].astype(np.float64)
        judging = spent(lambda: [classifier.log_posteriors(some) for _ in range(5)])[0] / 5 / len(some)
        note(f"one fit of {FITTED:,}: {one:.1f} s; an image: {1e6 * judging:.0f} us")
    return textwrap.fill(
        f"Once for all selections. 100,000 images of 512 dimensions in 100 classes: {whole:.1f} s, "
        f"{peak / 2**10:,.0f} MiB at most, all libraries included, right for {found.accuracy:.0%} of images. "
        f"{IMAGES:,} images of {DIM:,} dimensions in {CLASSES:,} classes, projected: {FOLDS} fits to {FITTED:,} images "
        f"of {one:.0f} s each, and {1e6 * judging:.0f} us for each image, "
        f"{(FOLDS * one + IMAGES * judging) / 60:.1f} minutes together.",
        120,
    )


def clustered(folder: Path, count: int, dim: int, classes: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Memory-mapped features f2 of overlapping classes, and labels."""
    rng = np.random.default_rng(0)
    labels = np.sort(rng.permutation(np.arange(count) % classes))
    centres = 0.15 * rng.standard_normal((classes, dim), dtype=np.float32)
    path = folder / f"{dim}.npy"
    found = np.lib.format.open_memmap(path, "w+", np.float16, (count, dim))
    for start in range(0, count, 4096):
        own = labels[start : start + 4096]
        found[start : start + 4096] = centres[own] + rng.standard_normal((len(own), dim), dtype=np.float32)
    found.flush()
    return np.load(path, mmap_mode="r"), labels


def candidates() -> Candidates:
    """One class, in 20 clusters."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, DIM))
    features = (centres[rng.integers(0, 20, SIZE)] + rng.normal(size=(SIZE, DIM))).astype(np.float32)
    return Candidates([f"{i:05d}" for i in range(SIZE)], rng.gamma(2.0, size=SIZE), features)


def small(one: Candidates) -> Candidates:
    """The first 30 of them."""
    assert one.features is not None
    return Candidates(one.keys[:30], one.scores[:30], one.features[:30])


if __name__ == "__main__":
    main()
