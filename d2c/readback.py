"""Read a fresh artifact as another team would, with their readers, and compare every array's digest with the index."""

from __future__ import annotations

import io
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
    from webdataset.tariterators import group_by_keys, tar_file_expander

    for file in sorted((path / "shards").glob("*.tar")):
        # Not WebDataset(urls): it leaves the files it opens to the garbage collector.
        with file.open("rb") as stream:
            samples: Any = group_by_keys(tar_file_expander([{"url": str(file), "stream": stream}]))
            for sample in samples:
                arrays = {name: np.load(io.BytesIO(sample[f"{name}.npy"]), allow_pickle=False) for name in names}
                yield sample["__key__"], {name: xxh3_array(array) for name, array in arrays.items()}


def _pyarrow(path: Path, names: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    import pyarrow.parquet as pq

    for file in sorted((path / "parquet").glob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(64, columns=["key", *names]):
            for row in batch.to_pylist():
                yield row["key"], {name: xxh3(row[name]) for name in names}
