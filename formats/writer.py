"""Write an artifact: shards one by one, then the index, the class tables and, last, the manifest.

While it is being written everything lies in ``<out>.partial/``: ``artifact/`` (what becomes ``out``), ``parts/`` (the
index rows of each finished shard) and ``config.json``. A killed pack resumes by shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from formats.card import card
from formats.codecs import Fidelity
from formats.croissant import CROISSANT, croissant
from formats.encoding import Encoded, Sample
from formats.errors import FormatError
from formats.files import (
    read_json,
    read_table,
    remove_tree,
    sync_directory,
    write_bytes,
    write_json,
    write_rows,
    write_table,
)
from formats.guards import (
    check_classes,
    check_columns,
    check_facts,
    check_finite,
    check_keys,
    check_place,
    check_replaceable,
)
from formats.hashing import canonical_json, sha256_file, xxh3_file
from formats.identity import content_id
from formats.index import index_schema
from formats.layout import CLASSES, INDEX, LICENSE, MANIFEST, README, SELECTION, SUMS, codec_path
from formats.lock import WriterLock
from formats.npy import array_record, read_npy, write_npy
from formats.schema import (
    CONTAINERS,
    LATENT,
    RAW,
    RECIPE,
    RMS,
    ArrayRecord,
    ClassRow,
    Column,
    Container,
    FileRecord,
    Manifest,
    View,
    parse_manifest,
    view_column,
)
from formats.shards import shard_name, write_shard
from formats.swap import ARTIFACT, recover, swap
from formats.version import FORMAT_NAME, FORMAT_VERSION

_REQUIRED = ("name", "latent", "encoders", "preprocess", "source", "selection", "licence", "seeds", "tool")
OWN_FIELDS = ("format", "content_id", "counts", "container", "columns", "class_tables", "files", "created")
"""Manifest fields that follow from what was written."""
_FACTS, _COSTS = b"d2c_shard", b"d2c_costs"


class ArtifactWriter:
    """Writes the artifact ``out`` in ``n_shards`` shards; equal input gives equal bytes.

    ``config_digest`` stands for everything the samples depend on: unfinished work of another digest is thrown away.
    Of several processes one constructs the writer with ``lock=True``, before the others, and calls `finish`; the
    others only write shards. Use it as a context manager, or call `close`.

    A column with a codec takes codes (`formats.codecs`); what decoding them needs besides is kept with `codec_array`.
    A recipe takes the same samples, and keeps their hashes only. ``licence`` is the text of a LICENSE beside them.

    Raises:
        FormatError: another process writes to ``out``; or ``out`` holds something that is not a finished artifact.
    """

    def __init__(
        self,
        out: Path,
        container: Container,
        columns: Sequence[Column],
        n_shards: int,
        config_digest: str,
        *,
        lock: bool = True,
        licence: bytes | None = None,
    ) -> None:
        if container not in CONTAINERS or not columns or n_shards < 1:
            raise FormatError("an artifact needs a container, columns and shards", where=out, found=container)
        check_columns(columns, out)
        self.out, self.container, self.columns, self.n_shards = out, container, tuple(columns), n_shards
        # Resolved: a link to a folder on another disk stays what it is, and what it leads to is replaced.
        self._place = check_place(out)
        self.partial = self._place.with_name(f"{self._place.name}.partial")
        self._artifact, self._parts = self.partial / ARTIFACT, self.partial / "parts"
        self._licence = licence
        self._config = {
            "config_digest": config_digest,
            "container": container,
            "n_shards": n_shards,
            "columns": [column.to_dict() for column in columns],
        }
        self._lock = WriterLock(self._place.with_name(f"{self._place.name}.lock")) if lock else None
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back. Finished shards stay for the next writer; a second call does nothing."""
        if self._lock is not None:
            self._lock.release()

    def _prepare(self) -> None:
        config = self.partial / "config.json"
        try:
            torn, same = False, config.exists() and read_json(config) == self._config
        except FormatError:
            torn, same = True, False
        if self._lock is None:
            if not same:
                raise FormatError(
                    "there is no unfinished artifact of this configuration to write to",
                    where=self.partial,
                    hint="construct the writer that holds the lock first",
                )
            return
        recover(self._place)
        check_replaceable(self.out, self._licence)
        if same:
            return
        names = {path.name for path in self.partial.iterdir()} if self.partial.exists() else set()
        # What a writer left with a torn configuration is thrown away as that of another one is; what is not its, never.
        if (torn and names - {config.name, self._artifact.name, self._parts.name}) or (names and not config.exists()):
            raise FormatError(
                "there is something that is not an unfinished artifact where this one would be written",
                where=self.partial,
                hint="move it away, or choose another output folder",
            )
        remove_tree(self.partial)
        self.partial.mkdir(parents=True)
        write_json(config, self._config)

    def codec_array(
        self, column: str, role: str, make: Callable[[], np.ndarray[Any, Any]] | None = None
    ) -> np.ndarray[Any, Any]:
        """The array that decoding ``column`` needs; ``make`` gives it where there is none from an interrupted writer.

        Raises:
            FormatError: there is none, and nothing to make it with.
        """
        path = self._artifact / codec_path(column, role)
        if not path.exists():
            if make is None:
                raise FormatError("an array that a codec needs was not written", where=path, expected=f"{role}")
            array = make()
            check_finite(array, f"{column}: {role}")
            write_npy(path, array)
        return read_npy(path)

    def done_shards(self) -> set[int]:
        """Numbers of the shards whose bytes on disk still have the hash they were written with."""
        return {shard for shard in range(self.n_shards) if self._whole(shard)}

    def write(
        self, shard: int, samples: Iterable[Sample | Encoded], costs: Mapping[str, Fidelity] | None = None
    ) -> None:
        """Write shard number ``shard``, whole or not at all; an earlier one of that number is replaced.

        ``costs``: by column, what its codec cost the samples, complete when the last of them has been taken.

        Raises:
            FormatError: a sample that does not fit; see `formats.shards.write_shard`.
        """
        path = self._shard(shard)
        self._part(shard).unlink(missing_ok=True)
        rows = write_shard(path, self.container, self.columns, samples)
        record = None
        if self.container != RECIPE:
            record = asdict(replace(self._record(self._name(shard)), samples=len(rows)))
        table = pa.Table.from_pylist(rows, schema=index_schema(self.columns, self.container))
        noted = {name: cost.to_dict() for name, cost in (costs or {}).items()}
        facts = {_FACTS: json.dumps(record), _COSTS: json.dumps(noted)}
        write_table(self._part(shard), table.replace_schema_metadata(facts))

    def labels(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Class numbers of all samples written so far, in storage order [N]."""
        parts = [read_table(self._part(i), ["label"])["label"] for i in range(self.n_shards) if self._part(i).exists()]
        values = [chunk.to_numpy() for part in parts for chunk in part.chunks]
        return np.concatenate(values) if values else np.zeros(0, np.int32)

    def index(self) -> pa.Table:
        """The index of the finished artifact; every shard must be written.

        Raises:
            FormatError: a shard is missing, a key comes twice, samples have different facts.
        """
        return self._merge()[0]

    def finish(
        self,
        manifest_fields: Mapping[str, Any],
        classes: Sequence[ClassRow],
        class_tables: Mapping[str, np.ndarray[Any, Any]],
        selection: Sequence[Mapping[str, Any]],
        *,
        fidelity: Mapping[str, Mapping[str, Any]] | None = None,
        created: str | None = None,
        check: Callable[[Path], object] | None = None,
    ) -> Path:
        """Write everything but the shards, the manifest last, and put the artifact in place of ``out``.

        ``manifest_fields``: name, latent, encoders, preprocess, source, selection, licence, seeds, tool; parents,
        order and any further field are kept as given. ``class_tables``: name -> array [C, ...]. ``selection``: what
        was chosen, kept in this order. ``fidelity``: by column, what its codec cost where `write` was not told, since
        the codes are not from here. ``created`` is left out unless given, since it would change the bytes. ``check``
        gets the finished artifact before it is put in its place, and raises where it must not be.

        Raises:
            FormatError: a shard is missing, a key comes twice, classes and labels disagree, a field is missing.
        """
        if self._lock is None:
            raise FormatError("only the writer that holds the lock finishes an artifact", where=self.out)
        missing = [field for field in _REQUIRED if field not in manifest_fields]
        taken = [field for field in OWN_FIELDS if field in manifest_fields]
        if missing or taken:
            raise FormatError(
                "manifest fields are not as they must be",
                where=self.out,
                found=f"missing {missing}, not the caller's {taken}",
            )
        index, shards = self._merge()
        check_classes(index, classes, self.out)
        for stray in self._artifact.rglob(".tmp-*"):
            stray.unlink()
        write_table(self._artifact / INDEX, index)
        write_rows(self._artifact / SELECTION, "picks", selection)
        write_json(self._artifact / CLASSES, {"classes": [asdict(row) for row in classes]})
        tables = {name: self._table(name, class_tables[name], len(classes)) for name in sorted(class_tables)}
        fidelity = {**(fidelity or {}), **{name: cost.summary() for name, cost in self._costs().items()}}
        columns = [self._finished(column, fidelity.get(column.name)) for column in self.columns]
        arrays = [*tables.values(), *(array for column in columns for array in column.codec_arrays.values())]
        others = [INDEX, SELECTION, CLASSES, *(array.path for array in arrays)]
        files = [*shards, *(self._record(name) for name in others)]
        features = {f"codec:{column.codec}" for column in columns if column.codec != RAW}
        features |= {f"container:{RECIPE}"} if self.container == RECIPE else set()
        ids = np.asarray(index["sample_id"].to_numpy(), dtype="S32")
        counts = [row.count for row in classes]
        raw: dict[str, Any] = {
            "parents": [],
            "order": {"method": "as-written"},
            **manifest_fields,
            "format": {
                "name": FORMAT_NAME,
                "version": FORMAT_VERSION,
                "required_features": sorted(features),
                "optional_features": [],
            },
            "content_id": content_id(ids, columns, classes, tables, manifest_fields["latent"]),
            "counts": {
                "samples": index.num_rows,
                "classes": len(classes),
                "per_class_min": min(counts),
                "per_class_max": max(counts),
            },
            "container": {"kind": self.container, "views": self._views},
            "columns": [column.to_dict() for column in columns],
            "class_tables": [{"name": name, **table.to_dict()} for name, table in tables.items()],
            "files": [record.to_dict() for record in files],
        }
        if created is not None:
            raw["created"] = created
        self._publish(parse_manifest(json.loads(canonical_json(raw)), self.out), check)
        self.close()
        return self.out

    def _publish(self, manifest: Manifest, check: Callable[[Path], object] | None) -> None:
        text = canonical_json(manifest.raw).encode()
        write_bytes(self._artifact / README, card(manifest).encode())
        write_json(self._artifact / CROISSANT, croissant(manifest))
        if self._licence is not None:
            write_bytes(self._artifact / LICENSE, self._licence)
        temporary = self._artifact / f".tmp-{os.getpid()}-hashed"
        write_bytes(temporary, text)
        sums = {record.path: record.sha256 for record in manifest.files} | {MANIFEST: sha256_file(temporary)}
        temporary.unlink()
        write_bytes(self._artifact / SUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode())
        for folder in self._artifact.iterdir():
            if folder.is_dir():
                sync_directory(folder)
        write_bytes(self._artifact / MANIFEST, text)
        if check:
            check(self._artifact)
        swap(self._artifact, self._place)
        remove_tree(self.partial)

    def _merge(self) -> tuple[pa.Table, list[FileRecord]]:
        absent = [shard for shard in range(self.n_shards) if not self._part(shard).exists()]
        if absent:
            raise FormatError(
                "not every shard is written",
                where=self.partial,
                found=f"{len(absent)} missing, the first is {absent[0]}",
                expected=f"{self.n_shards} shards",
                hint="write them, then finish",
            )
        parts = [read_table(self._part(shard)) for shard in range(self.n_shards)]
        records = [json.loads(part.schema.metadata[_FACTS]) for part in parts]
        index = pa.concat_tables([part.replace_schema_metadata(None) for part in parts]).combine_chunks()
        if not index.num_rows:
            raise FormatError("an artifact without samples", where=self.partial, expected="at least one sample")
        check_keys(index, self.partial)
        check_facts(index, self.partial)
        return index, [FileRecord(**record) for record in records if record]

    def _costs(self) -> dict[str, Fidelity]:
        costs: dict[str, Fidelity] = {}
        for shard in range(self.n_shards):
            metadata = pq.read_schema(self._part(shard)).metadata
            for name, noted in json.loads(metadata[_COSTS]).items():
                cost = Fidelity.from_dict(noted)
                costs.setdefault(name, Fidelity(against=cost.against)).merge(cost)
        return costs

    def _table(self, name: str, array: np.ndarray[Any, Any], classes: int) -> ArrayRecord:
        record = array_record(f"classes/{name}.npy", array)
        Column(name, record.dtype, record.shape)
        if len(array) != classes:
            raise FormatError("a class table has one row per class", where=name, found=len(array), expected=classes)
        check_finite(array, name)
        write_npy(self._artifact / record.path, array)
        return record

    def _finished(self, column: Column, fidelity: Mapping[str, Any] | None) -> Column:
        if column.codec == RAW:
            return column
        path = codec_path(column.name, RMS)
        arrays = {RMS: array_record(path, self.codec_array(column.name, RMS))}
        return replace(column, codec_arrays=arrays, fidelity=fidelity)

    @property
    def _views(self) -> list[View]:
        names = {column.name for column in self.columns}
        return [view for view in get_args(View) if view == "orig" or view_column(LATENT, view) in names]

    def _record(self, name: str) -> FileRecord:
        path = self._artifact / name
        return FileRecord(name, path.stat().st_size, xxh3_file(path), sha256_file(path))

    def _name(self, shard: int) -> str:
        if not 0 <= shard < self.n_shards:
            raise FormatError("there is no shard of this number", found=shard, expected=f"0 to {self.n_shards - 1}")
        return shard_name(self.container, shard, self.n_shards)

    def _shard(self, shard: int) -> Path:
        return self._artifact / self._name(shard)

    def _part(self, shard: int) -> Path:
        return self._parts / f"{shard:05d}.parquet"

    def _whole(self, shard: int) -> bool:
        path, part = self._shard(shard), self._part(shard)
        if not part.exists():
            return False
        try:
            # All of it: `finish` needs every column.
            facts = json.loads(read_table(part).schema.metadata[_FACTS])
        except FormatError:
            return False
        if facts is None:
            return True
        return bool(path.exists() and path.stat().st_size == facts["bytes"] and xxh3_file(path) == facts["xxh3_128"])
