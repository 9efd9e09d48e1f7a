"""Single-bit flips, spread over every region of every file of an artifact."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from faults import INDEX, MANIFEST, SUMS, Copy, Injection


def regions(artifact: Path) -> dict[str, list[tuple[str, np.ndarray[Any, Any]]]]:
    """Region -> (file, numbers of its bytes there): every byte of every file is in one region."""
    found: dict[str, list[tuple[str, np.ndarray[Any, Any]]]] = {}
    for path in sorted(path for path in artifact.rglob("*") if path.is_file()):
        name, data = path.relative_to(artifact).as_posix(), path.read_bytes()
        spans = _spans(artifact, name, data)
        owner = np.zeros(len(data), np.int64)
        for number, (_, start, end) in enumerate(spans):
            owner[start:end] = number
        for number, (region, _, _) in enumerate(spans):
            places = np.flatnonzero(owner == number)
            if len(places):
                found.setdefault(region, []).append((name, places))
    return found


def _spans(artifact: Path, name: str, data: bytes) -> list[tuple[str, int, int]]:
    """(region, start, end) of one file; later ones cover earlier ones."""
    if name.endswith(".tar"):
        return _tar_spans(artifact / name, data)
    if name.endswith(".parquet"):
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        what = "index" if name == INDEX else "parquet"
        spans = [(f"{what}: pages", 0, footer), (f"{what}: footer", footer, len(data))]
        rows = pq.read_table(artifact / INDEX).to_pylist() if what == "parquet" else []
        for row in rows:
            for column in [key[:-7] for key in row if key.endswith(".offset") and row["shard"] == name]:
                start = row[f"{column}.offset"]
                spans.append(("parquet: arrays", start, start + row[f"{column}.nbytes"]))
        return spans
    if name.endswith(".npy"):
        what, start = name.split("/", maxsplit=1)[0] + " arrays", 10 + int.from_bytes(data[8:10], "little")
        return [(f"{what}: npy header", 0, start), (f"{what}: values", start, len(data))]
    return [(name, 0, len(data))]


def _tar_spans(path: Path, data: bytes) -> list[tuple[str, int, int]]:
    spans = [("tar: end", 0, len(data))]
    with tarfile.open(path) as tar:
        for member in tar:
            start, end = member.offset_data, member.offset_data + member.size
            spans += [("tar: header", member.offset, start), ("tar: padding", end, end + -member.size % 512)]
            if member.name.endswith(".npy"):
                middle = start + 10 + int.from_bytes(data[start + 8 : start + 10], "little")
                spans += [("tar: npy header", start, middle), ("tar: arrays", middle, end)]
            else:
                spans.append(("tar: labels and facts", start, end))
    return spans


def flips(artifact: Path, per_region: int, seed: int = 0, *, sealed: bool = False) -> Iterator[Injection]:
    """``per_region`` random single-bit flips in every region (fewer where it has fewer bits).

    Sealed: hashes are repaired; only where it means something: a manifest vouches for itself.
    """
    rng = np.random.default_rng(seed)
    for region, parts in regions(artifact).items():
        if sealed and region in (MANIFEST, SUMS, "README.md", "croissant.json"):
            continue
        sizes = np.cumsum([len(places) for _, places in parts])
        bits = rng.choice(int(sizes[-1]) * 8, min(per_region, int(sizes[-1]) * 8), replace=False)
        for place, bit in (divmod(int(bit), 8) for bit in bits):
            part = int(np.searchsorted(sizes, place, "right"))
            name, places = parts[part]
            byte = int(places[place - (sizes[part - 1] if part else 0)])
            files = (name, MANIFEST, SUMS) if name in (MANIFEST, SUMS) else (name,)
            free = ("selection",) if sealed and "selection" in name else ()
            names = (*files, INDEX, MANIFEST) if sealed else files
            apply = partial(flip, name=name, byte=byte, bit=bit)
            yield Injection(region, f"bit {bit} of byte {byte} of {name}", apply, names, sealed, free)


def flip(copy: Copy, name: str, byte: int, bit: int) -> None:
    data = bytearray(copy.read(name))
    data[byte] ^= 1 << bit
    copy.write(name, bytes(data))
