"""A planted memoriser, a good generator and a bad one, judged by `d2c fid`: `honesty.md` on stdout.

Disjoint random parts of one data set are what a model was trained on, real images kept back, what is measured against,
and what a perfect generator would draw. The memoriser replays the first part, with noise. No model is trained: the
samples are written as .npz files and judged as anybody's are. The workspace is a scored one of the same data: its
classifier measures, where no Inception weights are given.

    python docs/benchmarks/honesty.py --data cifar10-train.parquet --workspace d2c-workspace > honesty.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from machine import machine, note

from d2c import batches, runtime
from d2c.features import INCEPTION_FILE
from d2c.sources import open_source

IMAGES, REFERENCE = 2_000, 10_000
PARTS = {"train": IMAGES, "held_out": IMAGES, "fresh": IMAGES, "reference": REFERENCE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a Parquet file of labelled images")
    parser.add_argument("--workspace", type=Path, required=True, help="a workspace in which it was scored")
    parser.add_argument("--inception", type=Path, help="weights, if the distance is to be called FID")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows = split(options.data, place)
        reports = {name: judge(options, place, name, make(options.data, rows)) for name, make in GENERATORS.items()}
    print(page(reports, time.perf_counter() - started))


def split(data: Path, place: Path) -> dict[str, np.ndarray]:
    """Row numbers of the disjoint parts; all but `fresh` are also written as Parquet."""
    table = pq.read_table(data)
    order = runtime.rng("honesty").permutation(len(table))
    starts = np.cumsum([0, *PARTS.values()])
    rows = {name: np.sort(order[a:b]) for name, a, b in zip(PARTS, starts, starts[1:], strict=False)}
    for name in PARTS:
        if name != "fresh":
            pq.write_table(table.take(pa.array(rows[name])), place / f"{name}.parquet")
    return rows


Maker = Callable[[Path, dict[str, np.ndarray]], tuple[np.ndarray, np.ndarray]]


def real(data: Path, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels."""
    source = open_source(data)
    # Numbers in the file are not those of the source, which sorts its keys: position tells.
    place = {int(position): index for index, position in enumerate(source.reader.positions())}
    loaded = list(batches.load(source, [place[int(row)] for row in rows], 32, batch=500))
    return np.concatenate([b.pixels for b in loaded]), np.concatenate([source.labels[b.indices] for b in loaded])


def noisy(pixels: np.ndarray, sd: float) -> np.ndarray:
    moved = pixels + runtime.rng("honesty", "noise", str(sd)).normal(0, sd, pixels.shape)
    return np.clip(np.rint(moved), 0, 255).astype(np.uint8)


def fresh(data: Path, rows: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return real(data, rows["fresh"])


def memoriser(sd: float, share: float = 1.0, *, mirrored: bool = False) -> Maker:
    """Training images with noise of ``sd`` grey levels for a ``share`` of the samples; the others are fresh."""

    def make(data: Path, rows: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        pixels, labels = fresh(data, rows)
        copies, own = real(data, rows["train"])
        count = round(share * IMAGES)
        chosen = runtime.rng("honesty", "copies").integers(0, len(copies), count)
        replayed = copies[chosen][:, :, ::-1] if mirrored else copies[chosen]
        pixels[:count], labels[:count] = noisy(replayed, sd), own[chosen]
        return pixels, labels

    return make


def blurred(data: Path, rows: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What a model draws that has learnt too little: averages of 4 x 4 pixels, which are near to everything."""
    pixels, labels = fresh(data, rows)
    means = pixels.reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4))
    return np.rint(means.repeat(4, axis=1).repeat(4, axis=2)).astype(np.uint8), labels


def untrained(data: Path, rows: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Noise through a convolutional network with random weights."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)]
    network = torch.nn.Sequential(
        *(part for layer in layers for part in (torch.nn.Upsample(scale_factor=2), layer, torch.nn.ReLU())),
        torch.nn.Conv2d(64, 3, 3, padding=1),
    )
    with torch.inference_mode():
        images = network(torch.randn(IMAGES, 64, 4, 4))
    images = (images - images.mean()) / images.std()
    pixels = (images * 64 + 128).clamp(0, 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy(), np.arange(IMAGES) % 10


GENERATORS: dict[str, Maker] = {
    "real images, never seen": fresh,
    "the same, blurred": blurred,
    "an untrained network": untrained,
    "memoriser, noise 0": memoriser(0),
    "memoriser, noise 8": memoriser(8),
    "memoriser, noise 8, mirrored": memoriser(8, mirrored=True),
    "memoriser, noise 16": memoriser(16),
    "memoriser, noise 32": memoriser(32),
    "10 % copies, noise 8": memoriser(8, 0.1),
    "4 % copies, noise 8": memoriser(8, 0.04),
}


def judge(options: argparse.Namespace, place: Path, name: str, images: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    note(name)
    path = place / "samples.npz"
    np.savez(path, arr_0=images[0], labels=images[1].astype(np.int64))
    command = [sys.executable, "-m", "d2c_cli", "fid", str(path), "--workspace", str(options.workspace), "--json"]
    for option in ("train", "held-out", "reference"):
        command += [f"--{option}", str(place / f"{option.replace('-', '_')}.parquet")]
    command += ["--device", "cpu", "--out", str(place / "report")]
    command += ["--inception", str(options.inception)] if options.inception else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


TEXT = """# Honesty: does the report see a generator that copies?

[honesty.py](honesty.py) made this page: `d2c fid samples.npz --train ... --held-out ... --reference ...` on samples
whose origin is known. CIFAR-10's training images are parted at random: {images:,} to copy from, {images:,} kept back,
{reference:,} to measure against, and {images:,} that a perfect generator would draw. Each generator has {images:,}
samples. Noise is its standard deviation in grey levels of 255.
The distance is taken in the space of {measured}.

{table}

{space} of the exact memoriser is {theirs:.2f}, of real images {ours:.2f}, of the worst generator {worst:.0f}: the
distance does not see the copying. Recall and coverage fall somewhat (why was not tested), and with noise the distance
rises too. The copy rate sees it: {copied:.3f} against {honest:.3f}.

{rule}

What it cannot see: copies that are fewer than about three times the unseen images' own rate, and copies that were
changed until another real image is about as near.

{seconds:.0f} seconds. {machine}"""
HEAD = (
    "generator;{space}, 95 %;precision;recall;coverage;copies (pixels);(features);copy rate, 95 %;of unseen images;"
    "flagged"
)


def page(reports: dict[str, dict[str, Any]], seconds: float) -> str:
    honest, exact = reports["real images, never seen"], reports["memoriser, noise 0"]
    space = honest["space"]["distance"]
    names = HEAD.format(space=space).split(";")
    head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}"
    text = TEXT.format(
        images=IMAGES,
        reference=REFERENCE,
        measured="the published Inception weights"
        if space == "FID"
        else f"the workspace's classifier (`{INCEPTION_FILE}` was not at hand; `--inception FILE` takes it)",
        table="\n".join([head, *(line(name, report) for name, report in reports.items())]),
        space=space,
        theirs=exact["rows"][0]["distance"],
        ours=honest["rows"][0]["distance"],
        worst=max(report["rows"][0]["distance"] for report in reports.values()),
        copied=exact["copy_rate"],
        honest=honest["copy_rate"],
        rule=textwrap.fill(f"The rule: {honest['copying']['rule']}", 118),
        seconds=seconds,
        machine=machine(("numpy", "torch", "scipy", "torch-fidelity")),
    )
    return text


def line(name: str, report: dict[str, Any]) -> str:
    row, copying = report["rows"][0], report["copying"]
    low, high = report["intervals"]["distance"]
    cells = [
        name,
        f"{row['distance']:.2f} ({low:.2f} to {high:.2f})",
        *(f"{row[key]:.3f}" for key in ("precision", "recall", "coverage")),
        *(f"{copying[key]['rate']:.3f}" for key in ("pixels", "features")),
        f"{report['copy_rate']:.3f} ({' to '.join(f'{end:.3f}' for end in report['copy_rate_interval'])})",
        f"{report['copy_rate_held_out']:.3f}",
        "**yes**" if report["copying_flagged"] else "no",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
