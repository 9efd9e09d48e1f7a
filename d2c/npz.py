"""Two kinds of .npz that evaluators of diffusion models exchange: images as ``arr_0``, and statistics of features.

The names are those of ADM's evaluator: ``arr_0`` (u1 [N, S, S, 3]), ``mu`` and ``sigma`` of the 2,048 pooled Inception
features, ``mu_s`` and ``sigma_s`` of the 2,023 that sFID looks at. Images are read and written piece by piece: 50,000
of 256 px fill 10 GB.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from d2c.errors import D2CError
from d2c.metrics import Stats
from formats.files import atomic

Array: TypeAlias = np.ndarray[Any, Any]

IMAGES = "arr_0"
LABELS = ("labels", "arr_1")
"""Where class numbers may stand beside the images: as `d2c sample` writes them, and as ADM does."""
PARTS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_BROKEN = (zipfile.BadZipFile, ValueError, EOFError, KeyError, OSError)


@dataclass(frozen=True)
class Npz:
    """An opened file: ``shape`` of its images, or None without any; ``stats`` by part of the features."""

    path: Path
    shape: tuple[int, int, int, int] | None
    labels: Array | None
    stats: dict[str, Stats]
    space: str | None
    """Digest of the weights that the statistics were computed with, where the file says so."""

    def chunks(self, size: int) -> Iterator[Array]:
        """The images, at most ``size`` at a time."""
        if self.shape is None:
            return
        count, *rest = self.shape
        bytes_each = int(np.prod(rest))
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as member:
            _header(member)
            for start in range(0, count, size):
                data = member.read(min(size, count - start) * bytes_each)
                if len(data) != min(size, count - start) * bytes_each:
                    raise D2CError("this file ends before its last image", where=self.path, hint="write it again")
                yield np.frombuffer(bytearray(data), np.uint8).reshape(-1, *rest)

    def pick(self, rows: Sequence[int]) -> Array:
        """Images number ``rows``, in that order: u1 [n, S, S, 3]."""
        assert self.shape is not None
        found = np.empty((len(rows), *self.shape[1:]), np.uint8)
        wanted, start = np.asarray(rows), 0
        for chunk in self.chunks(256):
            here = np.flatnonzero((wanted >= start) & (wanted < start + len(chunk)))
            found[here] = chunk[wanted[here] - start]
            start += len(chunk)
        return found


def open_npz(path: Path) -> Npz:
    """Look into an .npz; its images are checked but not read.

    Raises:
        D2CError: it is damaged, or holds neither images u1 [N, S, S, 3] nor statistics.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            names = set(stored.files)
            stats = {part: _stats(stored, *keys) for part, keys in PARTS.items() if names.issuperset(keys)}
            labels = next((np.asarray(stored[name], np.int64) for name in LABELS if name in names), None)
            space = str(stored["space"]) if "space" in names else None
        shape = _shape(path) if IMAGES in names else None
    except _BROKEN as error:
        raise D2CError("this file is no readable .npz", where=path, found=str(error) or type(error).__name__) from error
    if not stats and shape is None:
        raise D2CError(
            "this .npz holds neither images nor statistics",
            where=path,
            found=", ".join(sorted(names)) or "nothing",
            expected="arr_0 (uint8 [N, S, S, 3]), or mu and sigma, as ADM's evaluator names them",
        )
    if labels is not None and (shape is None or labels.shape != shape[:1]):
        labels = None
    return Npz(path, shape, labels, stats, space)


def write_stats(path: Path, parts: dict[str, Stats], space: str) -> None:
    """Write statistics under ADM's names, the digest of the space's weights beside them."""
    arrays: dict[str, Any] = {"space": np.array(space), "n": np.array(parts["features"].n)}
    for part, stats in parts.items():
        arrays.update(zip(PARTS[part], (stats.mu, stats.sigma), strict=True))
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        # np.savez stamps the time of writing into the file: the same statistics must give the same bytes.
        for name, array in sorted(arrays.items()):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def exported(
    path: Path, chunks: Iterable[Array], count: int, side: int, labels: Array | None = None
) -> Iterator[Array]:
    """The chunks as they are, which are also written as ``arr_0``; the file appears with the last of them.

    ``labels`` [count] are written beside them. The same images give the same bytes, whenever they are written.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, side, side, 3)}
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        # A name alone would be stamped with the time of writing.
        with archive.open(zipfile.ZipInfo(f"{IMAGES}.npy"), "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for chunk in chunks:
                stream.write(np.ascontiguousarray(chunk).tobytes())
                yield chunk
        if labels is not None:
            with archive.open(zipfile.ZipInfo(f"{LABELS[0]}.npy"), "w") as stream:
                np.lib.format.write_array(stream, labels, allow_pickle=False)


def _stats(stored: Any, mean: str, covariance: str) -> Stats:
    mu, sigma = (np.asarray(stored[name], np.float64) for name in (mean, covariance))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{mean} {mu.shape} and {covariance} {sigma.shape} are no mean and covariance")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{mean} or {covariance} holds NaN or infinity")
    return Stats(mu, sigma, int(stored["n"]) if "n" in stored.files else 0)


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    return shape, fortran, dtype


def _shape(path: Path) -> tuple[int, int, int, int]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as member:
        shape, fortran, dtype = _header(member)
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2]:
        raise D2CError(
            "these are no images to measure",
            where=path,
            found=f"arr_0: {dtype} {list(shape)}{_nan(path, dtype, shape)}",
            expected="uint8 [N, S, S, 3], square, the channels last",
            hint="round and clip to 0..255; images with NaN come from a model that diverged",
        )
    return (shape[0], shape[1], shape[2], 3)


def _nan(path: Path, dtype: np.dtype[Any], shape: Sequence[int]) -> str:
    """How many images are no numbers, where such a file is not too large to look."""
    if dtype.kind != "f" or len(shape) < 2 or int(np.prod(shape)) > 10**9:
        return ""
    with np.load(path, allow_pickle=False) as stored:
        bad = int((~np.isfinite(stored[IMAGES].reshape(shape[0], -1)).all(axis=1)).sum())
    return f", {bad} of {shape[0]} with NaN or infinity" if bad else ""
