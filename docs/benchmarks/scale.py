"""Write scale.md: memory and time to write, verify, inspect and read an artifact of 100,000 samples.

PYTHONPATH=. python docs/benchmarks/scale.py > docs/benchmarks/scale.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine, note
from tables import table

from formats import open_artifact, verify
from formats.describe import describe
from formats.hashing import sha256_file, xxh3_file
from formats.schema import ClassRow, Column
from formats.shards import Sample
from formats.writer import ArtifactWriter

COLUMNS = (
    Column("latent", "f2", (2, 4, 32, 32)),
    Column("tokens", "i1", (16, 64)),
    Column("tokens_scale", "f2", (16,)),
)
CLASSES = 1000
READ = 1000
"""Random samples that the step `read` reads, every array hashed."""

GIB = 2**30
STEPS = {
    "import": "nothing: Python and the imports",
    "write": "write",
    "xxh3": "for comparison: xxh3-128 of every file",
    "sha256": "for comparison: sha256 of every file",
    "quick": "verify --quick",
    "default": "verify",
    "deep": "verify --deep",
    "inspect": "inspect",
    "read": f"open, read {READ:,} random samples, hashing on",
}
GROWTH = 2.0
"""A sample may cost this many times what it costs in an artifact a tenth as large, noise included."""

PACKAGES = ("numpy", "pyarrow", "xxhash")
TEXT = """# Scale: {samples:,} samples within {limit:g} GiB

[scale.py](scale.py) made this page: `PYTHONPATH=. python docs/benchmarks/scale.py`. Synthetic samples (latents fp16
2 x 4 x 32 x 32, tokens int8 16 x 64 with fp16 scales, five facts) of {classes:,} classes in {shards} shards. Each step
runs in a process of its own. *Peak memory* is the kernel's high-water mark of resident memory and is what the limit is
held against: pages of mapped shards count, though the kernel can take them back. *Anonymous* is the part it cannot
take back, sampled every 5 ms. Seconds are those inside the process, without imports; files come from a warm page
cache; 1 GB is 10^9 bytes of the artifact's files.
"""


def samples(first: int, last: int) -> Iterator[Sample]:
    """Samples ``first`` .. ``last`` - 1: latents from a small pool, tokens that no other sample has."""
    rng = np.random.default_rng(0)
    pool = np.abs(rng.standard_normal((64, *COLUMNS[0].shape), np.float32)).astype("<f2") + np.float16(0.5)
    codes = rng.integers(-127, 128, COLUMNS[1].shape, np.int8)
    scales = np.ones(COLUMNS[2].shape, "<f2")
    for i in range(first, last):
        tokens = codes.copy()
        tokens[0, :8] = np.array([i], "<i8").view(np.int8)
        facts = {"source_key": f"n{i % CLASSES:08d}/n{i % CLASSES:08d}_{i}.JPEG", "source_xxh3": f"{i:032x}"}
        facts |= {"source_bytes": 100_000 + i, "score": i / 7, "selection_rank": i}
        arrays = {"latent": pool[i % len(pool)], "tokens": tokens, "tokens_scale": scales}
        yield Sample(f"{i:08d}", i % CLASSES, arrays, facts)


def write(path: Path, container: Any, count: int, shards: int) -> None:
    with ArtifactWriter(path, container, COLUMNS, shards, "benchmark") as writer:
        for shard in range(shards):
            writer.write(shard, samples(count * shard // shards, count * (shard + 1) // shards))
        counts = np.bincount(writer.labels(), minlength=CLASSES).tolist()
        classes = [ClassRow(i, f"class {i}", f"n{i:08d}", f"a photo of {i}", counts[i]) for i in range(CLASSES)]
        fields: dict[str, Any] = {
            name: {} for name in "encoders preprocess source selection licence seeds tool".split()
        }
        fields |= {"name": "benchmark", "licence": {"spdx": "CC0-1.0", "source_terms": "", "images_included": False}}
        fields["latent"] = {"codec": "vae", "moments": ["mean", "std"], "scale": 0.18215, "shift": 0.0}
        picks = ({"key": f"{i:08d}", "rank": i, "score": i / 7} for i in range(count))
        writer.finish(fields, classes, {"text_embeds": np.zeros((CLASSES, 16, 64), "<f2")}, list(picks))


def step(name: str, path: Path, container: str, count: int, shards: int) -> None:
    """One step in this process; prints what it took as JSON."""
    wall, cpu = time.perf_counter(), time.process_time()
    if name == "write":
        write(path, container, count, shards)
    elif name in ("xxh3", "sha256"):
        digest = xxh3_file if name == "xxh3" else sha256_file
        for file in _files(path):
            digest(file)
    elif name in ("quick", "default", "deep"):
        report = verify(path, name)
        if report.faults:
            raise AssertionError(f"{len(report.faults)} faults in a sound artifact; {report.faults[0]}")
    elif name == "inspect":
        describe(path)
    elif name == "read":
        artifact = open_artifact(path)
        for start in range(0, READ, 50):
            chosen = np.random.default_rng(start).integers(0, len(artifact), 50)
            for column in artifact.columns:
                artifact.stack(column.name, chosen)
    took = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "peak": _memory("self", "VmHWM")}
    print(json.dumps(took))


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()]


def _memory(process: int | str, name: str) -> int:
    """Bytes that /proc/PID/status gives; 0 where the process has just ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def run(name: str, path: Path, container: str, count: int, shards: int) -> dict[str, float]:
    """`step` in a process of its own, watched."""
    note(f"  {container}, {count:,} samples: {STEPS[name]}")
    numbers = ["--samples", str(count), "--shards", str(shards)]
    command = [sys.executable, __file__, "--step", name, "--container", container, "--folder", str(path), *numbers]
    anonymous = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            anonymous = max(anonymous, _memory(process.pid, "RssAnon"))
            time.sleep(0.005)
        assert process.stdout is not None
        text = process.stdout.read()
    if process.returncode:
        sys.exit(f"{STEPS[name]} failed with exit status {process.returncode}")
    return {**json.loads(text), "anonymous": anonymous}


def measure(container: str, folder: Path, count: int, shards: int, limit: float) -> tuple[str, bool]:
    """(the section of a container, whether all bounds hold)."""
    large, small = folder / container, folder / f"{container}-small"
    took = {name: run(name, large, container, count, shards) for name in STEPS}
    size = sum(file.stat().st_size for file in _files(large)) / 1e9
    run("write", small, container, count // 10, shards)
    rows, good = [], True
    for name, facts in took.items():
        peak = facts["peak"] / GIB
        good &= peak <= limit
        per_gb = f"{facts['seconds'] / size:.2f}" if name in ("write", "xxh3", "sha256", "default", "deep") else ""
        shown = [f"{facts['seconds']:.2f}", per_gb, f"{facts['cpu']:.2f}"]
        verdict = "" if peak <= limit else " **over the limit**"
        memory = [f"{facts['peak'] / 2**20:,.0f}{verdict}", f"{facts['anonymous'] / 2**20:,.0f}"]
        rows.append([STEPS[name], *shown, *memory])
    text = f"## {container.capitalize()}: {size:.2f} GB\n\n"
    text += table(["step", "s", "s/GB", "CPU s", "peak memory MiB", "anonymous MiB"], rows)
    growth = []
    for name in ("default", "deep"):
        each = took[name]["cpu"] / count * 1e6
        before = run(name, small, container, count // 10, shards)["cpu"] / (count // 10) * 1e6
        linear = each <= GROWTH * before
        good &= linear
        verdict = "" if linear else " **more than linear**"
        growth.append([STEPS[name], f"{before:.1f}", f"{each:.1f}", f"{each / before:.2f}{verdict}"])
    header = ["CPU µs a sample", f"{count // 10:,} samples", f"{count:,} samples", "ratio"]
    return f"{text}\n\n{table(header, growth)}\n", good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--limit", type=float, default=2.0, help="GiB of memory; exit status 1 where a step needs more")
    parser.add_argument("--folder", type=Path, help="where 3 GB of files lie for a while (default: temporary folder)")
    parser.add_argument("--quick", action="store_true", help="5,000 samples in 4 shards: does it run?")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--container", help=argparse.SUPPRESS)
    options = parser.parse_args()
    count, shards = (5_000, 4) if options.quick else (options.samples, options.shards)
    if options.step:
        step(options.step, options.folder, options.container, count, shards)
        return 0
    if count < 10 * max(CLASSES // 10, shards):
        parser.error("needs at least 10 samples a shard, and a sample of each class")
    print(TEXT.format(samples=count, shards=shards, classes=CLASSES, limit=options.limit))
    print(machine(PACKAGES) + "\n")
    sound = True
    for container in ("tar", "parquet"):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            section, good = measure(container, Path(folder), count, shards, options.limit)
        sound &= good
        print(section)
    print("Every step stayed within the limits." if sound else "**Not every step stayed within the limits.**")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
