"""Write loading.md: one shuffled epoch into torch batches, our reader and others interleaved in one process.

PYTHONPATH=. python docs/benchmarks/loading.py > docs/benchmarks/loading.md
"""

from __future__ import annotations

# ruff: noqa: E402
import argparse
import gc
import logging
import os
import random
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before `datasets` and `streaming` are imported: nothing here needs a network, and their remarks are not ours.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import numpy as np
import torch
from machine import machine, note
from readers import BATCH, LIMITS, READERS, WEBDATASET, Epoch, Place, write
from tables import table

from formats.schema import Column

TURN = 2
"""Batches that a reader gives before it is another one's turn."""

FULL = "Full samples, fp16 tokens"
_LATENT = Column("latent", "f2", (2, 4, 32, 32))
PAYLOADS = {
    FULL: (_LATENT, Column("tokens", "f2", (256, 768))),
    "Full samples, int8 tokens": (_LATENT, Column("tokens", "i1", (256, 768)), Column("tokens_scale", "f2", (256,))),
    "Latents only": (_LATENT,),
}
TARGETS = [
    ("ours, tar, hashing off", 0.5, None),
    ("ours, Parquet, hashing off", 0.5, None),
    ("ours, tar, hashing on", 0.4, None),
    ("ours, Parquet, hashing on", 0.4, None),
    ("ours, tar, hashing off", 8.0, WEBDATASET),
]
"""For full samples with fp16 tokens: reader, least ratio, to whom (None: the limit)."""

PACKAGES = "torch numpy pyarrow xxhash webdataset datasets mosaicml-streaming litdata".split()
TEXT = """# Loading: one shuffled epoch into torch batches

[loading.py](loading.py) made this page: `PYTHONPATH=. python docs/benchmarks/loading.py`. All readers run in one
process and take turns every {turn} samples, in an order drawn anew for each turn, so that whatever else the machine
does hits all alike. The figures to trust are ratios: each is the median over {rounds} rounds of the ratio inside a
round, with the least and the greatest in brackets. {samples:,} synthetic samples in {shards} shards, batches of {batch}
in memory of their own, one epoch a round, warm page cache, one torch thread, no worker processes. Every reader was
first checked, untimed, to give each sample exactly once. Ratios of CPU time, given beside the targets, do not count
the waiting for a core that others use; targets are judged by the clock.

- *limit*: columns as raw .npy files, memory-mapped and gathered by numpy or by torch, whichever is faster.
- *hashing on*: the artifact is opened anew each round, so that every array is hashed, and every page of the map is
  new to the process: the first epoch of a run. *hashing off* is every epoch after it.
- exact global shuffle: the limit, ours and `datasets` map-style. pyarrow, webdataset and `datasets` streaming shuffle
  inside a window of one shard; MosaicML and litdata as they do by default. `datasets` streaming sleeps for 5 s at the
  end of an epoch, which is switched off here.
- *d2c.loading* makes the batches that `d2c train` gets: *mapped* from the shards, *resident* from a copy in memory.
"""


@dataclass
class Times:
    """Seconds of one reader, a figure a round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def start(place: Place, expected: np.ndarray[Any, Any]) -> tuple[dict[str, Epoch], list[str]]:
    """(readers that are installed, names of those that are not); each has read an epoch, which was checked."""
    epochs, absent = {}, []
    for name, opened in READERS.items():
        if "d2c.loading" in name and len(place.columns) > 2:
            continue
        note(f"  first epoch: {name}")
        try:
            epochs[name] = opened(place)
        except ImportError:
            absent.append(name)
            continue
        found = []
        for batch in epochs[name](0):
            for column in place.columns:
                one = batch[column.name]
                if one.shape[1:] != column.shape or one.dtype != torch.from_numpy(np.empty(0, column.numpy)).dtype:
                    raise AssertionError(f"{name}: {column.name} comes as {one.dtype} {tuple(one.shape)}")
            found.append(marks(batch["latent"].numpy()))
        if not np.array_equal(np.sort(np.concatenate(found)), expected):
            raise AssertionError(f"{name} does not give every sample exactly once")
    return epochs, absent


def marks(latents: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A number per sample [n] that tells it from the others."""
    return latents.reshape(len(latents), -1).view(np.uint64).sum(axis=1)


def measure(epochs: dict[str, Epoch], rounds: int) -> dict[str, Times]:
    times = {name: Times() for name in epochs}
    draw = random.Random(0)
    for number in range(1, rounds + 1):
        running = {name: epoch(number) for name, epoch in epochs.items()}
        spent = {name: [0.0, 0.0] for name in epochs}
        while running:
            for name in draw.sample(list(running), len(running)):
                wall, cpu = time.perf_counter(), time.process_time()
                given = sum(next(running[name], None) is not None for _ in range(TURN))
                spent[name][0] += time.perf_counter() - wall
                spent[name][1] += time.process_time() - cpu
                if given < TURN:
                    del running[name]
        for name, (wall, cpu) in spent.items():
            times[name].wall.append(wall)
            times[name].cpu.append(cpu)
        gc.collect()
        note(f"  round {number} of {rounds}")
    return times


def ratios(times: dict[str, Times], name: str, to: str | None = None, kind: str = "wall") -> np.ndarray[Any, Any]:
    """Speed of reader ``name`` relative to ``to`` (None: the limit), a figure a round."""
    other = to or min(LIMITS, key=lambda one: float(np.median(times[one].wall)))
    return np.array(getattr(times[other], kind)) / np.array(getattr(times[name], kind))


def shown(values: np.ndarray[Any, Any]) -> str:
    digits = 2 if np.median(values) >= 0.1 else 3
    return f"{np.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def results(place: Place, times: dict[str, Times], absent: list[str]) -> str:
    size, rows = sum(column.nbytes for column in place.columns), []
    for name in READERS:
        if name in absent:
            rows.append([name, *["not installed"] * 4])
        elif name in times:
            wall, cpu = np.median(times[name].wall), np.median(times[name].cpu)
            speed = place.samples / wall
            figures = [f"{speed:,.0f}", f"{speed * size / 1e6:,.0f}", f"{cpu / place.samples * 1e6:,.0f}"]
            rows.append([name, shown(ratios(times, name)), *figures])
    return table(["reader", "ratio to the limit", "samples/s", "MB/s", "CPU µs/sample"], rows)


def judged(times: dict[str, Times]) -> tuple[str, bool]:
    """(the table of the targets, whether all are met)."""
    rows, met = [], True
    for name, least, to in TARGETS:
        found = ratios(times, name, to)
        reached = bool(np.median(found) >= least)
        met &= reached
        cpu = f"{np.median(ratios(times, name, to, 'cpu')):.2f}"
        rows.append([name, to or "limit", f"{least} x", shown(found), cpu, "met" if reached else "**missed**"])
    return table(["reader", "against", "target", "measured", "in CPU time", ""], rows), met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1024, help="a multiple of the shards and of the batch")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=11, help="medians need at least 5")
    parser.add_argument("--folder", type=Path, help="where the data goes for a while: 3 GB (default: temporary folder)")
    parser.add_argument("--quick", action="store_true", help="256 samples, 5 rounds: does it run? No figures to keep")
    options = parser.parse_args()
    if options.quick:
        options.samples, options.rounds = 256, 5
    if options.rounds < 5 or options.samples % (options.shards * BATCH):
        parser.error(f"needs at least 5 rounds, and samples in multiples of {options.shards * BATCH}")
    # Threads that wait for each other in a loop make a mess of two shared cores; no reader here gains from a second.
    torch.set_num_threads(1)
    shape = {"samples": options.samples, "shards": options.shards}
    print(TEXT.format(turn=TURN * BATCH, rounds=options.rounds, batch=BATCH, **shape))
    print(machine(PACKAGES) + "\n")
    met, tables = True, []
    for title, columns in PAYLOADS.items():
        note(f"{title}: writing")
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            place = Place(Path(folder), columns, **shape)
            epochs, absent = start(place, np.sort(marks(write(place))))
            times = measure(epochs, options.rounds)
            del epochs
        size = sum(column.nbytes for column in columns)
        tables.append(f"## {title}: {size:,} bytes a sample\n\n{results(place, times, absent)}\n")
        if title == FULL:
            targets, met = judged(times)
            tables.insert(0, f"## Targets\n\n{targets}\n")
    print("\n".join(tables).rstrip())
    return 0 if met or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
