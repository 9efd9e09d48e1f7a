"""Readers that loading.py compares, and the data in all their forms. Batches are in memory of their own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import installed

from formats import open_artifact
from formats.schema import ClassRow, Column
from formats.shards import Sample
from formats.writer import ArtifactWriter

BATCH = 64
"""Samples a batch."""

LIMITS = ("memory-mapped .npy, numpy take", "memory-mapped .npy, torch index_select")
WEBDATASET = "webdataset, same tars"

Batch = dict[str, torch.Tensor]
Epoch = Callable[[int], Iterator[Batch]]
"""Opens what an epoch needs, untimed, and returns its batches; the argument numbers the epoch."""


@dataclass(frozen=True)
class Place:
    """Where a payload lies in all its forms."""

    folder: Path
    columns: tuple[Column, ...]
    samples: int
    shards: int

    @property
    def shard(self) -> int:
        """Samples a shard."""
        return self.samples // self.shards

    def order(self, epoch: int) -> list[np.ndarray[Any, Any]]:
        """An exact global shuffle, in batches."""
        return np.split(np.random.default_rng(epoch).permutation(self.samples), range(BATCH, self.samples, BATCH))


def npy_take(place: Place) -> Epoch:
    # A plain array over the map: indexing np.memmap itself is slower.
    maps = {c.name: np.asarray(np.load(place.folder / f"{c.name}.npy", mmap_mode="r")) for c in place.columns}

    def epoch(number: int) -> Iterator[Batch]:
        for rows in place.order(number):
            yield {name: torch.from_numpy(array.take(rows, axis=0)) for name, array in maps.items()}

    return epoch


def npy_select(place: Place) -> Epoch:
    maps = {c.name: torch.from_numpy(np.load(place.folder / f"{c.name}.npy", mmap_mode="r")) for c in place.columns}

    def epoch(number: int) -> Iterator[Batch]:
        for rows in place.order(number):
            index = torch.from_numpy(rows)
            yield {name: tensor.index_select(0, index) for name, tensor in maps.items()}

    return epoch


def ours(container: str, hashing: bool) -> Callable[[Place], Epoch]:
    def start(place: Place) -> Epoch:
        kept = open_artifact(place.folder / container, verify=False)

        def epoch(number: int) -> Iterator[Batch]:
            # Opened anew, so that every array is hashed in every round.
            artifact = open_artifact(place.folder / container) if hashing else kept
            return (
                {column.name: torch.from_numpy(artifact.stack(column.name, rows)) for column in place.columns}
                for rows in place.order(number)
            )

        return epoch

    return start


def loader(resident: bool) -> Callable[[Place], Epoch]:
    def start(place: Place) -> Epoch:
        from d2c.loading import Loader

        tokens = "tokens" if len(place.columns) > 1 else None
        loads = Loader(
            open_artifact(place.folder / "tar"),
            batch_size=BATCH,
            seed=0,
            device=torch.device("cpu"),
            token_column=tokens,
            budget=1e9 if resident else 0.0,
        )

        def epoch(number: int) -> Iterator[Batch]:
            steps = place.samples // BATCH
            for step in range(number * steps, (number + 1) * steps):
                batch = loads.batch(step)
                yield {"latent": batch.raw} | ({"tokens": batch.tokens} if batch.tokens is not None else {})

        return epoch

    return start


def webdataset_tar(place: Place) -> Epoch:
    import webdataset

    urls = sorted(str(path) for path in (place.folder / "tar" / "shards").iterdir())
    names = [f"{column.name}.npy" for column in place.columns]

    def epoch(number: int) -> Iterator[Batch]:
        shards = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=number)
        batches = shards.shuffle(place.shard, rng=random.Random(number)).decode().to_tuple(*names).batched(BATCH)
        for batch in batches:
            yield {c.name: torch.from_numpy(array) for c, array in zip(place.columns, batch, strict=True)}

    return epoch


def parquet_files(place: Place) -> list[str]:
    return sorted(str(path) for path in (place.folder / "parquet" / "parquet").iterdir())


def pyarrow_parquet(place: Place) -> Epoch:
    import pyarrow.parquet as pq

    names = [column.name for column in place.columns]

    def epoch(number: int) -> Iterator[Batch]:
        rng = np.random.default_rng(number)
        for file in rng.permutation(parquet_files(place)):
            with pq.ParquetFile(file) as shard:
                # Shuffled inside a window: pyarrow reads rows in the order of the file.
                for window in shard.iter_batches(place.shard, columns=names):
                    views = {c.name: binary(window.column(c.name), c) for c in place.columns}
                    order = rng.permutation(window.num_rows)
                    for start in range(0, len(order), BATCH):
                        rows = order[start : start + BATCH]
                        yield {name: torch.from_numpy(view.take(rows, axis=0)) for name, view in views.items()}

    return epoch


def binary(array: Any, column: Column) -> np.ndarray[Any, Any]:
    """A view [n, *shape] of a pyarrow binary array whose values all have one column's size."""
    _, offsets, data = array.buffers()
    first = np.frombuffer(offsets, np.int32, count=1, offset=4 * array.offset)[0]
    bytes_ = np.frombuffer(data, np.uint8, count=len(array) * column.nbytes, offset=int(first))
    return bytes_.view(column.numpy).reshape(len(array), *column.shape)


def datasets_map(place: Place) -> Epoch:
    import datasets

    cache = str(place.folder / "hf")
    whole = datasets.load_dataset("parquet", data_files=parquet_files(place), split="train", cache_dir=cache)
    whole = whole.with_format("arrow")
    return lambda number: (gathered(whole[rows], place) for rows in place.order(number))


def datasets_streaming(place: Place) -> Epoch:
    import datasets

    # It sleeps for 5 s at the end of an epoch, which would hide everything else.
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    stream = datasets.load_dataset("parquet", data_files=parquet_files(place), split="train", streaming=True)
    stream = stream.with_format("arrow")

    def epoch(number: int) -> Iterator[Batch]:
        for found in stream.shuffle(seed=number, buffer_size=place.shard).iter(BATCH):
            yield gathered(found, place)

    return epoch


def gathered(found: Any, place: Place) -> Batch:
    """Columns of a pyarrow table in memory of their own."""
    return {
        c.name: torch.from_numpy(np.concatenate([binary(chunk, c) for chunk in found[c.name].chunks]))
        for c in place.columns
    }


def mosaic(place: Place) -> Epoch:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    reader = StreamingDataset(local=str(place.folder / "mds"), shuffle=True, batch_size=BATCH)
    batches = DataLoader(reader, batch_size=BATCH)
    return lambda _: iter(batches)


def litdata_chunks(place: Place) -> Epoch:
    import litdata

    reader = litdata.StreamingDataset(str(place.folder / "litdata"), shuffle=True, drop_last=False)
    batches = litdata.StreamingDataLoader(reader, batch_size=BATCH, num_workers=0)
    return lambda _: iter(batches)


READERS: dict[str, Callable[[Place], Epoch]] = {
    LIMITS[0]: npy_take,
    LIMITS[1]: npy_select,
    "ours, tar, hashing off": ours("tar", False),
    "ours, Parquet, hashing off": ours("parquet", False),
    "ours, tar, hashing on": ours("tar", True),
    "ours, Parquet, hashing on": ours("parquet", True),
    "ours, d2c.loading, tar, mapped": loader(resident=False),
    "ours, d2c.loading, tar, resident": loader(resident=True),
    "pyarrow iter_batches, same Parquet": pyarrow_parquet,
    "datasets map-style, same Parquet": datasets_map,
    "datasets streaming, same Parquet": datasets_streaming,
    WEBDATASET: webdataset_tar,
    "MosaicML streaming": mosaic,
    "litdata": litdata_chunks,
}


def write(place: Place) -> np.ndarray[Any, Any]:
    """Write the payload in every form whose package is installed; returns the latents."""
    rng = np.random.default_rng(0)
    data = {c.name: _made(rng, c, place.samples) for c in place.columns}
    for name, array in data.items():
        np.save(place.folder / f"{name}.npy", array)
    for container in ("tar", "parquet"):
        with ArtifactWriter(place.folder / container, container, place.columns, place.shards, "benchmark") as writer:
            for shard in range(place.shards):
                rows = range(shard * place.shard, (shard + 1) * place.shard)
                arrays = ({name: array[i] for name, array in data.items()} for i in rows)
                writer.write(shard, [Sample(f"{i:08d}", 0, one, {"n": i}) for i, one in zip(rows, arrays, strict=True)])
            fields = "encoders preprocess source selection licence seeds tool".split()
            latent = {"codec": "vae", "moments": ["mean", "std"], "scale": 0.18215, "shift": 0.0}
            manifest = {name: {} for name in fields} | {"name": "benchmark", "latent": latent}
            writer.finish(manifest, [ClassRow(0, "a", "a", "a", place.samples)], {}, [])
    samples = [{name: array[i] for name, array in data.items()} for i in range(place.samples)]
    if installed("mosaicml-streaming"):
        from streaming import MDSWriter

        kinds = {c.name: f"ndarray:{c.numpy.name}:{','.join(map(str, c.shape))}" for c in place.columns}
        size = place.shard * sum(c.nbytes + 8 for c in place.columns)
        with MDSWriter(out=str(place.folder / "mds"), columns=kinds, size_limit=size) as mds:
            for sample in samples:
                mds.write(sample)
    if installed("litdata"):
        from litdata.streaming.writer import BinaryWriter

        chunks = BinaryWriter(str(place.folder / "litdata"), chunk_size=place.shard)
        for i, sample in enumerate(samples):
            chunks.add_item(i, {name: torch.from_numpy(array) for name, array in sample.items()})
        chunks.done()
        chunks.merge()
    return data["latent"]


def _made(rng: np.random.Generator, column: Column, samples: int) -> np.ndarray[Any, Any]:
    shape = (samples, *column.shape)
    if column.dtype == "i1":
        return rng.integers(-127, 128, shape, np.int8)
    return np.abs(rng.standard_normal(shape, np.float32)).astype(column.numpy) + column.numpy.type(0.5)
