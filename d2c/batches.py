"""Cropped pixels of chosen pictures in a fixed order, decoded by threads a few batches ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from d2c.errors import D2CError
from d2c.images import BadImage, center_crop, decode, stored_size
from d2c.sources import BadFile, Source
from formats.hashing import xxh3

_AHEAD = 2  # batches decoded while the consumer holds one


@dataclass(frozen=True)
class Loaded:
    """n pictures, row by row.

    indices: int64 [n] into the source; pixels: u1 [n, size, size, 3]; digests: xxh3 of the original bytes;
    sizes: original bytes; crops: (width, height, side) in original upright pixels, the crop being the
    centred square of ``side`` pixels.
    """

    indices: npt.NDArray[np.int64]
    pixels: npt.NDArray[np.uint8]
    digests: list[str]
    sizes: list[int]
    crops: list[tuple[int, int, int]]

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Batch(Loaded):
    """The usable pictures of one run of ``batch`` indices, and the others with their reasons."""

    bad: list[BadFile]


@dataclass(frozen=True)
class Probe:
    """Sizes of some pictures: ``median_side`` of the short sides, ``max_side`` of the long ones, in pixels.

    checked: headers read; bad: of these unreadable; same_square: all are square with one side; mean_bytes: of a file.
    """

    checked: int
    bad: int
    median_side: int
    max_side: int
    same_square: bool
    mean_bytes: float


@dataclass(frozen=True)
class _Picture:
    pixels: npt.NDArray[np.uint8]
    digest: str
    size: int
    crop: tuple[int, int, int]


def load(source: Source, indices: Sequence[int], size: int, batch: int, threads: int = 4) -> Iterator[Batch]:
    """Yield the pictures at ``indices``, in that order, ``batch`` indices at a time, cropped to ``size`` pixels.

    Which pictures share a batch depends on ``indices`` and ``batch`` alone: a bad one leaves its batch smaller
    (perhaps empty) and moves no other. Closing the iterator early stops the threads.
    """
    if min(size, batch, threads) < 1:
        raise ValueError(f"size, batch and threads must be positive: {size}, {batch}, {threads}")
    return _load(source, [int(index) for index in indices], size, batch, threads)


def probe(source: Source, limit: int = 256) -> Probe:
    """Read the headers of up to ``limit`` evenly spaced pictures.

    Raises:
        D2CError: none of them has a readable header.
    """
    chosen = np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).astype(np.int64))
    sizes: list[tuple[int, int]] = []
    lengths: list[int] = []
    reason = ""
    for index in chosen.tolist():
        key = source.keys[index]
        try:
            data = source.read(index)
            sizes.append(stored_size(data))
            lengths.append(len(data))
        except BadImage as error:
            reason = f"{key}: {error.reason}"
    if not sizes:
        raise D2CError(
            f"none of {len(chosen)} images tried can be read",
            where=source.location,
            found=reason,
            hint="open a few of the files in an image viewer; they may be damaged or not images",
        )
    sides = np.array(sizes, dtype=np.int64)
    return Probe(
        checked=len(chosen),
        bad=len(chosen) - len(sizes),
        median_side=int(np.median(sides.min(axis=1))),
        max_side=int(sides.max()),
        same_square=bool((sides == sides[0, 0]).all()),
        mean_bytes=float(np.mean(lengths)),
    )


def _load(source: Source, indices: list[int], size: int, batch: int, threads: int) -> Iterator[Batch]:
    waiting: deque[tuple[list[int], list[Future[_Picture | BadFile]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="d2c-decode") as pool:
        try:
            for start in range(0, len(indices), batch):
                part = indices[start : start + batch]
                waiting.append((part, [pool.submit(_picture, source, index, size) for index in part]))
                if len(waiting) > _AHEAD:
                    yield _collect(*waiting.popleft(), size)
            while waiting:
                yield _collect(*waiting.popleft(), size)
        finally:
            # The consumer stopped or a picture raised a bug: leave the pool nothing but what it is doing.
            for _, futures in waiting:
                for future in futures:
                    future.cancel()


def _picture(source: Source, index: int, size: int) -> _Picture | BadFile:
    stage = "read"
    try:
        data = source.read(index)
        stage = "decode"
        image = decode(data)
        crop = (image.width, image.height, min(image.size))
        return _Picture(center_crop(image, size), xxh3(data), len(data), crop)
    except BadImage as error:
        return BadFile(source.keys[index], stage, error.reason)


def _collect(part: list[int], futures: list[Future[_Picture | BadFile]], size: int) -> Batch:
    results = [future.result() for future in futures]
    good = [(index, got) for index, got in zip(part, results, strict=True) if isinstance(got, _Picture)]
    pixels = np.empty((len(good), size, size, 3), dtype=np.uint8)
    for row, (_, picture) in enumerate(good):
        pixels[row] = picture.pixels
    return Batch(
        indices=np.array([index for index, _ in good], dtype=np.int64),
        pixels=pixels,
        digests=[picture.digest for _, picture in good],
        sizes=[picture.size for _, picture in good],
        crops=[picture.crop for _, picture in good],
        bad=[got for got in results if isinstance(got, BadFile)],
    )
