"""Read a fresh artifact as another team would, with their readers, and compare every array's digest with the index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from formats import IntegrityError, open_artifact
from formats.hashing import xxh3, xxh3_array


def check(path: Path) -> int:
    """Compare what ``webdataset`` (tar) or ``pyarrow`` (Parquet) reads with the index; returns the samples read.

    Raises:
        IntegrityError: a sample is missing, doubled, or reads differently.
    """
    artifact = open_artifact(path)
    expected = {key: artifact.digests(row) for row, key in enumerate(artifact.keys)}
    names = [column.name for column in artifact.columns]
    reader = _webdataset if (path / "shards").is_dir() else _pyarrow
    for key, digests in reader(path, names):
        if expected.pop(key, None) != digests:
            raise IntegrityError("another reader sees other bytes than the index", where=path, found=f"sample {key}")
    if expected:
        raise IntegrityError("another reader misses samples", where=path, found=f"{len(expected)} of {len(artifact)}")
    return len(artifact)


def _webdataset(path: Path, names: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    import webdataset

    urls = sorted(str(file) for file in (path / "shards").glob("*.tar"))
    decoded: Any = webdataset.WebDataset(urls, shardshuffle=False).decode()
    for sample in decoded:
        yield sample["__key__"], {name: xxh3_array(np.asarray(sample[f"{name}.npy"])) for name in names}


def _pyarrow(path: Path, names: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    import pyarrow.parquet as pq

    for file in sorted((path / "parquet").glob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(64, columns=["key", *names]):
            for row in batch.to_pylist():
                yield row["key"], {name: xxh3(row[name]) for name in names}
