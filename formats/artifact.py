"""Read an artifact: samples by number or key, straight from memory-mapped shards."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from formats.checks import Checked, quick_check, read_selection
from formats.codecs import decode
from formats.encoding import Encoded, Sample, parse_info
from formats.errors import FormatError, IntegrityError
from formats.files import read_bounded
from formats.hashing import xxh3, xxh3_array, xxh3_file
from formats.index import ROW_BYTES, shard_rows
from formats.layout import INDEX, SELECTION
from formats.npy import read_npy
from formats.schema import RECIPE, RMS, ArrayRecord, ClassRow, Column

_MOST_SHOWN = 5


def open_artifact(path: str | Path, *, verify: bool = True) -> Artifact:
    """Open a finished artifact after the quick checks: version, file list, sizes, index.

    With ``verify`` each array's hash is checked when it is first read.

    Raises:
        FormatError: there is no finished artifact at ``path``.
        IntegrityError: files are missing, added or changed.
        VersionError: the artifact is newer than this reader.
    """
    checked = quick_check(Path(path))
    if checked.faults or checked.manifest is None or checked.index is None:
        shown = [str(fault) for fault in checked.faults[:_MOST_SHOWN]]
        more = [f"and {len(checked.faults) - _MOST_SHOWN} more"] if len(checked.faults) > _MOST_SHOWN else []
        added = all(fault.kind == "unexpected" for fault in checked.faults)
        raise IntegrityError(
            "there are files among the artifact's that are not part of it" if added else "this artifact is damaged",
            where=path,
            found="; ".join(shown + more),
            hint=f"run `d2c verify {path}` for the whole list, then "
            + ("remove those files" if added else "fetch those files again"),
        )
    return Artifact(checked, checked.index, verify=verify)


class Artifact:
    """A finished artifact, indexed 0 .. N-1 in storage order. Constructed by `open_artifact`.

    ``manifest`` is the whole document; ``columns`` and ``classes`` are parsed. Arrays returned are read-only views of
    mapped files where nothing else is said.
    """

    def __init__(self, checked: Checked, index: pa.Table, *, verify: bool = True) -> None:
        assert checked.manifest is not None
        parsed = checked.manifest
        self.path = checked.root
        self.manifest: dict[str, Any] = parsed.raw
        self.content_id: str = parsed.content_id
        self.columns: tuple[Column, ...] = parsed.columns
        self.bytes = sum(record.bytes for record in parsed.files)
        """Of the files that the manifest lists: neither of itself nor of the card."""
        self.classes: list[ClassRow] = checked.classes
        self.index = index
        """One row per sample: key, label, shard, row, sample_id, and offset, nbytes and xxh3 of each array."""
        self.labels: np.ndarray[Any, np.dtype[np.int32]] = index["label"].to_numpy()
        self.shards = parsed.shards
        """Records of the shard files in storage order; none in a recipe."""
        self._parsed = parsed
        self._verify = verify
        self._number = {column.name: i for i, column in enumerate(parsed.columns)}
        if parsed.container != RECIPE:
            self._shard_of, _, _ = shard_rows(parsed, index)
            self._offsets = [index[f"{column.name}.offset"].to_numpy() for column in parsed.columns]
        self._digests = [index[f"{column.name}.xxh3"].chunk(0) for column in parsed.columns]
        self._touched = np.zeros((len(parsed.columns), len(index)), dtype=bool)
        self._codec_arrays: dict[tuple[str, str], np.ndarray[Any, Any]] = {}
        self._maps: list[memoryview | None] = [None] * len(parsed.shards)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def keys(self) -> list[str]:
        return list(self.index["key"].to_pylist())

    def array(self, i: int, column: str) -> np.ndarray[Any, Any]:
        """Sample ``i``'s array of ``column``, as stored: a read-only view of the mapped shard, shape as the column's.

        In Parquet shards the view may be unaligned; `stack` gives aligned memory, `values` decoded arrays.

        Raises:
            FormatError: there is no such column, or the artifact is a recipe, which holds no arrays.
            IntegrityError: the bytes are not those that were written.
        """
        number = self._column(column)
        record = self.columns[number]
        data = self._bytes(range(len(self))[i], number)
        return np.frombuffer(data, dtype=record.numpy).reshape(record.shape)

    def stack(
        self, column: str, indices: Sequence[int] | np.ndarray[Any, Any], out: np.ndarray[Any, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """Copy the arrays of ``indices``, as stored, into one array [n, *shape]: ``out``, or a new one.

        Raises:
            FormatError: there is no such column, or ``out`` has another shape or dtype.
            IntegrityError: the bytes are not those that were written.
        """
        number = self._column(column)
        record = self.columns[number]
        shape = (len(indices), *record.shape)
        if out is None:
            out = np.empty(shape, record.numpy)
        elif out.shape != shape or out.dtype != record.numpy or not out.flags.c_contiguous:
            raise FormatError("`out` does not fit", found=f"{out.dtype} {out.shape}", expected=f"C order {shape}")
        # Slices of memoryviews: a copy costs a quarter of a microsecond more than its bytes, through numpy a whole one.
        if np.asarray(indices).dtype == bool:
            raise FormatError("samples are named by number, not by a mask", hint="np.flatnonzero(mask)")
        into, nbytes, size = out.reshape(-1).view(np.uint8).data, record.nbytes, len(self)
        for place, i in enumerate(np.asarray(indices).tolist()):
            if not -size <= i < size:
                raise IndexError(f"sample {i} of {size}")
            into[place * nbytes : (place + 1) * nbytes] = self._bytes(i % size, number)
        return out

    def values(self, column: str, indices: Sequence[int] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """What the arrays of ``indices`` mean: decoded to float32 [n, T, D] where the column has a codec, else `stack`.

        Raises:
            FormatError: there is no such column.
            IntegrityError: the bytes are not those that were written.
        """
        record, stored = self.columns[self._column(column)], self.stack(column, indices)
        if record.scale_column is None:
            return stored
        return decode(record.codec, stored, self.stack(record.scale_column, indices), self.codec_array(column, RMS))

    def codec_array(self, column: str, role: str) -> np.ndarray[Any, Any]:
        """An array that decoding ``column`` needs, hash checked: ``rms`` is float32 [D].

        Raises:
            FormatError: there is no such array.
            IntegrityError: the bytes are not those that were written.
        """
        arrays = self.columns[self._column(column)].codec_arrays
        if role not in arrays:
            raise FormatError(f"column {column} has no such array", where=self.path, found=role, expected=list(arrays))
        if (column, role) not in self._codec_arrays:
            self._codec_arrays[column, role] = self._shared(arrays[role])
        return self._codec_arrays[column, role]

    def info(self, i: int) -> dict[str, Any]:
        """The facts kept with sample ``i``: where it came from, its score and rank.

        Raises:
            FormatError: they are no facts, although their hash is right.
        """
        return parse_info(self._info[i].as_py(), self.index["key"][i].as_py())

    def digests(self, i: int) -> dict[str, str]:
        """xxh3-128 of sample ``i``'s arrays by column, as the index has them."""
        return {column.name: self._digests[n][i].as_py() for n, column in enumerate(self.columns)}

    def known(self, i: int) -> Encoded:
        """Sample ``i`` as the index has it, without its arrays' bytes."""
        key, label = self.index["key"][i].as_py(), int(self.labels[i])
        return Encoded(key, label, self._info[i].as_py(), [], list(self.digests(i).values()))

    def sample(self, which: int | str) -> Sample:
        """A sample by number or key; columns with a codec are decoded, and their scales left out.

        Raises:
            KeyError: no sample has this key.
            IntegrityError: the bytes are not those that were written.
        """
        i = self.position(which) if isinstance(which, str) else range(len(self))[which]
        scales = {column.scale_column for column in self.columns}
        arrays = {c.name: self.values(c.name, [i])[0] for c in self.columns if c.name not in scales}
        return Sample(self.index["key"][i].as_py(), int(self.labels[i]), arrays, self.info(i))

    def position(self, key: str) -> int:
        """The number of the sample called ``key``.

        Raises:
            KeyError: there is none.
        """
        found = int(pc.index(self.index["key"], key).as_py())
        if found < 0:
            raise KeyError(key)
        return found

    def table(self, name: str) -> np.ndarray[Any, Any]:
        """A class table as a new array [C, ...], hash checked.

        Raises:
            FormatError: there is no such table.
            IntegrityError: the bytes are not those that were written.
        """
        tables = self._parsed.tables
        if name not in tables:
            raise FormatError("there is no such class table", where=self.path, found=name, expected=list(tables))
        return self._shared(tables[name])

    @cached_property
    def selection(self) -> list[dict[str, Any]]:
        """What was chosen, as the packer wrote it: by source key, each with label and rank in its class; hash checked.

        Raises:
            IntegrityError: the file is not the one that was written.
        """
        self._same(SELECTION)
        return read_selection(self.path)

    @cached_property
    def _info(self) -> pa.ChunkedArray:
        self._same(INDEX)
        return read_bounded(self.path / INDEX, ["info"], each=ROW_BYTES)["info"].combine_chunks()

    def _same(self, name: str) -> None:
        record, path = self._parsed.file(name), self.path / name
        if record is None or not path.is_file() or xxh3_file(path) != record.xxh3_128:
            raise IntegrityError(
                "a file of the artifact is not the one that was there when it was opened",
                where=path,
                hint="if the artifact was replaced, open it again; else fetch this file again",
            )

    def _shared(self, record: ArrayRecord) -> np.ndarray[Any, Any]:
        array = read_npy(self.path / record.path)
        same = (array.dtype.str[1:], array.shape) == (record.dtype, record.shape)
        if not same or xxh3_array(array) != record.xxh3_128:
            raise IntegrityError(
                "a class table or codec array changed since it was written",
                where=self.path / record.path,
                hint="fetch this file again",
            )
        return array

    def _column(self, name: str) -> int:
        if name not in self._number:
            raise FormatError("there is no such column", where=self.path, found=name, expected=list(self._number))
        return self._number[name]

    def _bytes(self, i: int, number: int) -> memoryview:
        if not self._maps:
            raise FormatError(
                "a recipe holds no arrays",
                where=self.path,
                hint=f"make them from your own copy of the images: d2c rebuild {self.path} --source DIR",
            )
        shard = self._shard_of.item(i)
        mapped = self._maps[shard] or self._map(shard)
        start = self._offsets[number].item(i)
        data = mapped[start : start + self.columns[number].nbytes]
        if self._verify and not self._touched[number, i]:
            self._check(i, number, data, start)
            self._touched[number, i] = True
        return data

    def _map(self, shard: int) -> memoryview:
        path = self.path / self._parsed.shards[shard].path
        try:
            with path.open("rb") as stream:
                mapped = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise IntegrityError(
                "a shard went away while the artifact was in use",
                where=path,
                found=str(error),
                hint="if it was replaced, open the artifact again",
            ) from error
        if len(mapped) != self._parsed.shards[shard].bytes:
            raise IntegrityError("a shard changed its size while it was in use", where=path, found=len(mapped))
        self._maps[shard] = mapped
        return mapped

    def _check(self, i: int, number: int, data: memoryview, start: int) -> None:
        expected = self._digests[number][i].as_py()
        if (found := xxh3(data)) != expected:
            shard = self._parsed.shards[self._shard_of[i]].path
            raise IntegrityError(
                f"column {self.columns[number].name} of sample {self.index['key'][i].as_py()} is corrupt",
                where=f"{self.path / shard} bytes {start}-{start + len(data)}",
                found=f"xxh3 {found}",
                expected=f"xxh3 {expected}",
                hint=f"fetch {shard} again; `d2c verify {self.path}` finds every other fault",
            )
