"""Write integrity.md: every fault of the laboratory in tests/, all levels, and the same flips in other readers.

PYTHONPATH=.:tests python docs/benchmarks/integrity.py > docs/benchmarks/integrity.md
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import webdataset
from faults import LEVELS, Copy, Injection, Laboratory, Outcome, build, tally
from faults_documents import index_faults, json_faults, parquet_faults
from faults_flips import flips
from faults_hostile import file_faults, npy_faults, tar_faults
from machine import machine, note

FLIPS, SEALED_FLIPS, PEER_FLIPS, DOCUMENTS = 165, 40, 100, 80
FEWEST_FLIPS = 5000
CONTAINERS = ("tar", "parquet")
TEXT = """# Integrity: what happens to a damaged artifact

[integrity.py](integrity.py) made this page; a sample of it is a test (`tests/test_faults.py`). Faults are put, one at a
time, into a copy of an artifact of 20 samples in two shards, with latents, coded tokens, their scales and codec array
and a class table, once as tars with 8-bit tokens, once as Parquet with 4-bit tokens. Then every level of
`formats.verify` judges the copy, and our reader opens it and reads everything: arrays as stored and decoded, labels,
facts, classes, class tables, selection, description.

- **quick, default, deep**: the report of that level names the file at fault, or the level stops with an error.
- **reader stopped**: with an error of `formats`. Otherwise it gave exactly the original, or, in the second table only,
  something else (**reader deceived**).
- **harmless**: not found by the level that promises it, and shown to be without effect: our reader gives exactly the
  original, and so do tarfile with numpy, or pyarrow, on the shards.
- **silent**: not found, and not harmless. **crash**: an exception that is not an error of `formats`.
- **harm**: code that ran, a pickle that was loaded, a file that was written, changed or removed anywhere, as the
  interpreter's audit events and the folder around the copy show; or more than 20 seconds. Pickles that would leave a
  file behind are among the faults.
"""
ACCIDENTS = """## Accidents

Found by `default`, or harmless. `quick` does not read shards, class tables and the selection beyond their sizes; the
reader checks the hash of what it reads, so it gives the original or stops.
"""
DECEIT = """## Deceit: every hash, size and SHA256SUMS repaired

The same and worse, by somebody who can write the whole artifact but keeps its content id. `deep` finds it, or it is
harmless. A reader that opens such an artifact checks hashes that the deceiver wrote: it must not crash, and it may be
deceived where only `deep` compares (**reader deceived**), so run `deep` once on what comes from others. What is free
text (provenance in the manifest, another well-formed selection) has no second witness: only the sha256 of SHA256SUMS,
known from elsewhere, vouches for it.
"""
PEERS = """## The same flips in other readers

Single-bit flips in the shards. *Silent* is data that differ from the original, or samples that are missing, without an
error. This is why each array has a hash.
"""


def main() -> None:
    # As in the tests: a warning is something nobody asked for.
    warnings.simplefilter("error")
    started = time.monotonic()
    accidents: list[Outcome] = []
    deceits: list[Outcome] = []
    peers: list[list[str]] = []
    with tempfile.TemporaryDirectory() as name:
        for number, container in enumerate(CONTAINERS):
            folder = Path(name, container)
            (folder / "laboratory").mkdir(parents=True)
            original = build(folder, container)
            os.chdir(folder / "laboratory")
            laboratory = Laboratory(original, folder / "laboratory")
            for injection in injections(original, Copy(original, folder / "copy"), seed=number):
                (deceits if injection.sealed else accidents).append(laboratory.judge(injection))
            note(f"{container}: {len(accidents)} accidents, {len(deceits)} deceits, {time.monotonic() - started:.0f} s")
        # Other readers leave files open.
        warnings.simplefilter("ignore")
        for container in CONTAINERS:
            peers += list(peer_rows(Path(name, container, container), Path(name, container, "peers"), container))
    page(accidents, deceits, peers, time.monotonic() - started)
    bad = [outcome for outcome in [*accidents, *deceits] if outcome.problems]
    for outcome in bad:
        note(f"{outcome.injection.region}: {outcome.injection.name}: {'; '.join(outcome.problems)}")
    sys.exit(1 if bad else 0)


def injections(original: Path, copy: Copy, seed: int) -> Iterator[Injection]:
    yield from flips(original, FLIPS, seed)
    yield from flips(original, SEALED_FLIPS, seed, sealed=True)
    yield from file_faults(copy)
    yield from npy_faults(copy)
    yield from index_faults(copy)
    yield from json_faults(copy, DOCUMENTS, seed)
    yield from tar_faults(copy) if (original / "shards").exists() else parquet_faults(copy)


def page(accidents: list[Outcome], deceits: list[Outcome], peers: list[list[str]], seconds: float) -> None:
    flipped = sum(outcome.injection.name.startswith("bit ") for outcome in accidents)
    assert flipped >= FEWEST_FLIPS
    both = [*accidents, *deceits]
    wrong = sum(outcome.reader == "wrong" for outcome in accidents)
    counts = tally(both).values()
    silent, crash, harm = (sum(row[name] for row in counts) for name in ("silent", "crash", "harm"))
    print(TEXT)
    print("## Result\n")
    print(f"{len(accidents):,} accidents, {flipped:,} of them random single-bit flips, and {len(deceits):,} deceits:")
    print(f"**{silent} silent, {wrong} accidents read wrongly, {crash} crashes, {harm} times harm.**\n")
    print(f"{seconds:.0f} seconds. {machine(['numpy', 'pyarrow', 'xxhash', 'webdataset'])}\n")
    print(ACCIDENTS)
    print(outcomes(accidents))
    print()
    print(DECEIT)
    print(outcomes(deceits))
    print()
    print(PEERS)
    print(table(["reader", "flips in", "flips", "error", "same data", "silent"], peers))


def outcomes(judged: list[Outcome]) -> str:
    head = ["region", "faults", *LEVELS, "reader stopped", "reader deceived", "harmless", "silent", "crash", "harm"]
    names = ["faults", *LEVELS, "stopped", "wrong", "harmless", "silent", "crash", "harm"]
    rows = tally(judged)
    total: Counter[str] = sum(rows.values(), Counter())
    body = [[region, *(f"{rows[region][name]:,}" for name in names)] for region in sorted(rows)]
    return table(head, [*body, ["**all**", *(f"**{total[name]:,}**" for name in names)]])


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_webdataset(root: Path) -> list[Any]:
    shards = [str(shard) for shard in sorted(root.glob("shards/*.tar"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=False).decode()
    return [{name: _plain(value) for name, value in sample.items() if name != "__local_path__"} for sample in dataset]


def by_tarfile(root: Path) -> list[Any]:
    found = []
    for shard in sorted(root.glob("shards/*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                content: Any = b"" if stream is None else stream.read()
                if member.name.endswith(".npy"):
                    content = _plain(np.load(io.BytesIO(content), allow_pickle=False))
                found.append((member.name, content))
    return found


def by_pyarrow(root: Path) -> list[Any]:
    return [row for shard in sorted(root.glob("parquet/*")) for row in pq.read_table(shard).to_pylist()]


def by_pyarrow_checked(root: Path) -> list[Any]:
    shards = sorted(root.glob("parquet/*"))
    return [row for s in shards for row in pq.read_table(s, page_checksum_verification=True).to_pylist()]


def by_us(root: Path) -> list[Any]:
    from formats import open_artifact

    artifact = open_artifact(root)
    return [{n: _plain(a) for n, a in artifact.sample(i).arrays.items()} for i in range(len(artifact))]


READERS: dict[str, dict[str, Callable[[Path], list[Any]]]] = {
    "tar": {"webdataset": by_webdataset, "tarfile and numpy": by_tarfile, "ours": by_us},
    "parquet": {"pyarrow": by_pyarrow, "pyarrow with page checksums": by_pyarrow_checked, "ours": by_us},
}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return value


def peer_rows(original: Path, folder: Path, container: str) -> Iterator[list[str]]:
    chosen: dict[str, list[Injection]] = {}
    for injection in flips(original, PEER_FLIPS, seed=7):
        if injection.region.startswith(container):
            chosen.setdefault(injection.region, []).append(injection)
    for name, read in READERS[container].items():
        for region, listed in chosen.items():
            counts = Counter(peer_outcomes(original, folder, read, listed))
            cells = [f"{counts[what]:,}" for what in ("error", "same", "silent")]
            yield [name, region, f"{len(listed):,}", *cells]


def peer_outcomes(
    original: Path, folder: Path, read: Callable[[Path], list[Any]], listed: Iterable[Injection]
) -> Iterator[str]:
    # Always the same place, since webdataset puts a shard's path into each sample.
    root = folder / "artifact"
    Copy(original, root)
    truth = read(root)
    assert truth
    for injection in listed:
        shutil.rmtree(root)
        injection.apply(Copy(original, root))
        try:
            yield "same" if read(root) == truth else "silent"
        except Exception:  # noqa: BLE001 - any error is an answer
            yield "error"
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
