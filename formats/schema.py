"""What a manifest says: columns, files, class tables. Parsed once at the border, trusted inside."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from formats.errors import FormatError
from formats.fields import Fields
from formats.version import check_version

LATENT = "latent"
"""Name of the column that holds latents_raw."""

RAW = "raw"
"""The codec of columns whose values are stored as they are."""

DTYPES = ("f2", "f4", "i1", "i2", "i4", "i8", "u1", "u2", "u4")
RESERVED = ("key", "label", "json", "cls", "npy")
CONTAINERS = {"tar": "shards", "parquet": "parquet"}
"""Container -> folder of its shards."""

_COLUMN = re.compile(r"[a-z0-9_]{1,32}")
_KEY = re.compile(r"[0-9a-z_-]{1,64}")

Container = Literal["tar", "parquet"]


@dataclass(frozen=True)
class Column:
    """One array per sample: ``dtype`` is a little-endian numpy type without its sign ("f2").

    ``codec`` says how stored values become meaning; "raw": they are the values. ``codec_arrays`` names files shared by
    all samples that decoding needs; ``fidelity`` is what encoding cost, measured on this artifact.

    Raises:
        FormatError: a name, type or shape that the format does not allow.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str = RAW
    codec_arrays: Mapping[str, str] = field(default_factory=dict)
    fidelity: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not _COLUMN.fullmatch(self.name) or self.name in RESERVED:
            raise FormatError(
                "a column cannot have this name",
                found=repr(self.name),
                expected=f"1-32 of a-z 0-9 _, and none of {', '.join(RESERVED)}",
            )
        if self.dtype not in DTYPES:
            raise FormatError(f"column {self.name}: unknown dtype", found=self.dtype, expected=", ".join(DTYPES))
        if not self.shape or any(side < 1 for side in self.shape):
            raise FormatError(f"column {self.name}: impossible shape", found=self.shape, expected="positive sides")

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(f"<{self.dtype}")

    @property
    def nbytes(self) -> int:
        """Bytes of one sample's array."""
        return math.prod(self.shape) * self.numpy.itemsize

    def to_dict(self) -> dict[str, Any]:
        """The column's record in the manifest."""
        return {**asdict(self), "shape": list(self.shape)}

    @staticmethod
    def from_dict(record: Mapping[str, Any], where: str | Path) -> Column:
        """Parse a manifest record; fields this reader does not know are ignored.

        Raises:
            FormatError: a field is missing or of the wrong kind.
        """
        fields = Fields(record, where, "columns[]")
        fidelity = record.get("fidelity")
        return Column(
            name=fields.text("name"),
            dtype=fields.text("dtype"),
            shape=tuple(fields.numbers("shape")),
            codec=fields.text("codec"),
            codec_arrays=fields.mapping("codec_arrays"),
            fidelity=None if fidelity is None else fields.mapping("fidelity"),
        )


@dataclass(frozen=True)
class ClassRow:
    """One class: its number in the artifact, its name and number at the source, its prompt, its count of samples."""

    id: int
    name: str
    source_id: str
    prompt: str
    count: int


@dataclass(frozen=True)
class FileRecord:
    """One file of the artifact; ``samples`` is there for shards only."""

    path: str
    bytes: int
    xxh3_128: str
    sha256: str
    samples: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The file's record in the manifest."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class TableRecord:
    """One class table: a .npy file with a row per class; ``xxh3_128`` is that of the array's bytes."""

    name: str
    path: str
    dtype: str
    shape: tuple[int, ...]
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """The parsed manifest; ``raw`` is the whole document, fields unknown to this reader included."""

    raw: dict[str, Any]
    content_id: str
    container: Container
    samples: int
    class_count: int
    columns: tuple[Column, ...]
    files: tuple[FileRecord, ...]
    tables: tuple[TableRecord, ...]
    latent: dict[str, Any]

    @property
    def shards(self) -> tuple[FileRecord, ...]:
        """Shards in storage order."""
        return tuple(record for record in self.files if record.samples is not None)

    def file(self, path: str) -> FileRecord | None:
        """The record of ``path``, None where the manifest does not list it."""
        return next((record for record in self.files if record.path == path), None)


def check_key(key: str) -> None:
    """Sample keys are 1-64 of ``0-9 a-z _ -``: no dot and no slash, which tar readers give a meaning.

    Raises:
        FormatError: any other key.
    """
    if not _KEY.fullmatch(key):
        raise FormatError("a sample cannot have this key", found=repr(key), expected="1-64 of 0-9 a-z _ -")


def parse_manifest(raw: Any, where: str | Path) -> Manifest:
    """Check the version first, then every field that the code relies on.

    Raises:
        VersionError: the artifact is newer than this reader.
        FormatError: a field is missing or wrong.
    """
    if not isinstance(raw, dict):
        raise FormatError("a manifest is a JSON object", where=where, found=type(raw).__name__)
    check_version(raw, where)
    fields = Fields(raw, where, "")
    container = Fields(fields.mapping("container"), where, "container").text("kind")
    counts = Fields(fields.mapping("counts"), where, "counts")
    if container not in CONTAINERS:
        raise FormatError("unknown container", where=where, found=container, expected=" or ".join(CONTAINERS))
    manifest = Manifest(
        raw=raw,
        content_id=fields.text("content_id"),
        container=cast(Container, container),
        samples=counts.number("samples"),
        class_count=counts.number("classes"),
        columns=tuple(Column.from_dict(record, where) for record in fields.records("columns")),
        files=tuple(_file(record, where) for record in fields.records("files")),
        tables=tuple(_table(record, where) for record in fields.records("class_tables")),
        latent=fields.mapping("latent"),
    )
    for what, names in (
        ("columns", [column.name for column in manifest.columns]),
        ("files", [record.path for record in manifest.files]),
        ("class_tables", [table.name for table in manifest.tables]),
    ):
        if len(set(names)) != len(names):
            raise FormatError(f"{what} name something twice", where=where, found=", ".join(names))
    for column in manifest.columns:
        if column.codec != RAW and f"codec:{column.codec}" not in raw["format"].get("required_features", []):
            raise FormatError("a codec must be a required feature", where=where, found=f"{column.name}: {column.codec}")
    if not manifest.samples:
        raise FormatError("an artifact without samples", where=where, expected="at least one")
    folder = CONTAINERS[container]
    if not manifest.columns or not all(shard.path.startswith(f"{folder}/") for shard in manifest.shards):
        raise FormatError("an artifact has columns, and one kind of shards", where=where, expected=f"{folder}/")
    return manifest


def _file(record: Mapping[str, Any], where: str | Path) -> FileRecord:
    fields = Fields(record, where, "files[]")
    return FileRecord(
        path=fields.path("path"),
        bytes=fields.number("bytes"),
        xxh3_128=fields.digest("xxh3_128", 32),
        sha256=fields.digest("sha256", 64),
        samples=fields.number("samples") if "samples" in record else None,
    )


def _table(record: Mapping[str, Any], where: str | Path) -> TableRecord:
    fields = Fields(record, where, "class_tables[]")
    Column(fields.text("name"), fields.text("dtype"), tuple(fields.numbers("shape")))
    return TableRecord(
        name=fields.text("name"),
        path=fields.path("path"),
        dtype=fields.text("dtype"),
        shape=tuple(fields.numbers("shape")),
        xxh3_128=fields.digest("xxh3_128", 32),
    )
