"""What a manifest says: columns, files, class tables. Parsed once at the border, trusted inside."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from formats.errors import FormatError
from formats.fields import Fields
from formats.layout import PICKLES, UNHASHED
from formats.version import check_version

LATENT = "latent"
"""Name of the column that holds latents_raw."""

RAW, INT8, INT4 = "raw", "i8-chrms1", "u4-chrms1"
"""Codecs: values as they are, or codes of 8 or 4 bits with a scale per token and an rms per channel."""

CODECS = (RAW, INT8, INT4)

View = Literal["orig", "hflip"]
"""An image as cropped, or its mirror image encoded anew, in columns of its own."""

RMS = "rms"
"""The codec array of both: float32 [D]."""

DTYPES = ("f2", "f4", "i1", "i2", "i4", "i8", "u1", "u2", "u4")
RESERVED = ("key", "label", "json", "cls", "npy")
RECIPE = "recipe"
"""The container of an artifact whose shards stayed at home: ids, hashes and settings to rebuild it from."""

CONTAINERS = {"tar": "shards", "parquet": "parquet", RECIPE: None}
"""Container -> folder of its shards."""

MOST_SIDES = 32
"""Dimensions of an array: what every numpy can hold."""

_LARGEST = 2**31 - 1
"""Bytes of one array: what Parquet's 32-bit lengths can say."""
_COLUMN = re.compile(r"[a-z0-9_]{1,32}")
_KEY = re.compile(r"[0-9a-z_-]{1,64}")

_CODED = {INT8: "i1", INT4: "u1"}

Container = Literal["tar", "parquet", "recipe"]


def view_column(name: str, view: View) -> str:
    """The column that holds for ``view`` what column ``name`` holds for the image as cropped."""
    return name if view == "orig" else f"{name}_hflip"


@dataclass(frozen=True)
class ArrayRecord:
    """One .npy file that samples share: a class table (a row per class) or an array that a codec needs.

    ``xxh3_128`` is that of the array's bytes, without the header.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    xxh3_128: str

    def to_dict(self) -> dict[str, Any]:
        """The record in the manifest."""
        return {**asdict(self), "shape": list(self.shape)}

    @staticmethod
    def from_dict(record: Mapping[str, Any], where: str | Path, prefix: str) -> ArrayRecord:
        """Parse a manifest record.

        Raises:
            FormatError: a field is missing or of the wrong kind.
        """
        fields = Fields(record, where, prefix)
        shape = tuple(fields.numbers("shape"))
        dtype = fields.text("dtype")
        if dtype not in DTYPES or not 0 < len(shape) <= MOST_SIDES or min(shape) < 1:
            raise FormatError(f"{prefix} is no array of numbers", where=where, found=f"{dtype} {list(shape)}")
        return ArrayRecord(fields.path("path"), dtype, shape, fields.digest("xxh3_128", 32))


@dataclass(frozen=True)
class Column:
    """One array per sample: ``dtype`` is a little-endian numpy type without its sign ("f2").

    ``codec`` says how stored values become meaning (`formats.codecs`); "raw": they are the values. ``codec_arrays``
    are what decoding needs besides, by role; ``scale_column`` names the column with a scale per token; ``fidelity`` is
    what encoding cost, measured on this artifact.

    Raises:
        FormatError: a name, type or shape that the format does not allow.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str = RAW
    codec_arrays: Mapping[str, ArrayRecord] = field(default_factory=dict)
    scale_column: str | None = None
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
        if not 0 < len(self.shape) <= MOST_SIDES or any(side < 1 for side in self.shape):
            raise FormatError(f"column {self.name}: impossible shape", found=self.shape, expected="positive sides")
        if self.nbytes > _LARGEST:
            raise FormatError(f"column {self.name}: impossible shape", found=self.shape, expected="less than 2 GiB")
        if self.codec in _CODED and (len(self.shape) != 2 or self.dtype != _CODED[self.codec] or not self.scale_column):
            raise FormatError(
                f"column {self.name} does not fit its codec {self.codec}",
                found=f"{self.dtype} {list(self.shape)}, scales in {self.scale_column}",
                expected=f"{_CODED[self.codec]} of two dimensions, scales in another column",
            )

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the decoded array: 4-bit codes lie two to a byte."""
        return (self.shape[0], 2 * self.shape[1]) if self.codec == INT4 else self.shape

    @cached_property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(f"<{self.dtype}")

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one sample's array."""
        return math.prod(self.shape) * self.numpy.itemsize

    def to_dict(self) -> dict[str, Any]:
        """The column's record in the manifest."""
        arrays = {role: array.to_dict() for role, array in self.codec_arrays.items()}
        return {**asdict(self), "shape": list(self.shape), "codec_arrays": arrays}

    @staticmethod
    def from_dict(record: Mapping[str, Any], where: str | Path) -> Column:
        """Parse a manifest record; fields this reader does not know are ignored.

        Raises:
            FormatError: a field is missing or of the wrong kind.
        """
        fields = Fields(record, where, "columns[]")
        arrays = Fields(fields.mapping("codec_arrays"), where, "columns[].codec_arrays")
        return Column(
            name=fields.text("name"),
            dtype=fields.text("dtype"),
            shape=tuple(fields.numbers("shape")),
            codec=fields.text("codec"),
            codec_arrays={
                role: ArrayRecord.from_dict(arrays.mapping(role), where, f"columns[].codec_arrays.{role}")
                for role in arrays.record
            },
            scale_column=None if record.get("scale_column") is None else fields.text("scale_column"),
            fidelity=None if record.get("fidelity") is None else fields.mapping("fidelity"),
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
class Manifest:
    """The parsed manifest; ``raw`` is the whole document, fields unknown to this reader included."""

    raw: dict[str, Any]
    content_id: str
    container: Container
    samples: int
    class_count: int
    per_class: tuple[int, int]
    """Samples of the smallest and of the largest class."""
    columns: tuple[Column, ...]
    files: tuple[FileRecord, ...]
    tables: Mapping[str, ArrayRecord]
    """Class tables by name."""
    latent: dict[str, Any]

    @property
    def shards(self) -> tuple[FileRecord, ...]:
        """Shards in storage order."""
        return tuple(record for record in self.files if record.samples is not None)

    @property
    def arrays(self) -> list[ArrayRecord]:
        """Every .npy file of the artifact: class tables, then what codecs need."""
        return [*self.tables.values(), *(array for c in self.columns for array in c.codec_arrays.values())]

    def column(self, name: str) -> Column | None:
        """The column called ``name``, None where there is none."""
        return next((column for column in self.columns if column.name == name), None)

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
    _check_words(fields, where)
    container = Fields(fields.mapping("container"), where, "container").text("kind")
    counts = Fields(fields.mapping("counts"), where, "counts")
    if container not in CONTAINERS:
        raise FormatError("unknown container", where=where, found=container, expected=" or ".join(CONTAINERS))
    tables = fields.records("class_tables")
    names = [Fields(table, where, "class_tables[]").text("name") for table in tables]
    manifest = Manifest(
        raw=raw,
        content_id=fields.content_id("content_id"),
        container=cast(Container, container),
        samples=counts.number("samples"),
        class_count=counts.number("classes"),
        per_class=(counts.number("per_class_min"), counts.number("per_class_max")),
        columns=tuple(Column.from_dict(record, where) for record in fields.records("columns")),
        files=tuple(_file(record, where) for record in fields.records("files")),
        tables={
            name: ArrayRecord.from_dict(table, where, "class_tables[]")
            for name, table in zip(names, tables, strict=True)
        },
        latent=fields.mapping("latent"),
    )
    for what, listed in (
        ("columns", [column.name for column in manifest.columns]),
        ("files", [record.path for record in manifest.files]),
        ("class_tables", names),
    ):
        if len(set(listed)) != len(listed):
            raise FormatError(f"{what} name something twice", where=where, found=", ".join(listed))
    for record in manifest.files:
        if record.path in UNHASHED or record.path.endswith((*PICKLES, ".py")):
            raise FormatError("an artifact holds no such file", where=where, found=record.path)
    for column in manifest.columns:
        _check_codec(column, manifest, where)
    if not manifest.samples:
        raise FormatError("an artifact without samples", where=where, expected="at least one")
    if container == RECIPE and f"container:{RECIPE}" not in raw["format"].get("required_features", []):
        raise FormatError("a recipe must say so among its required features", where=where)
    folder = CONTAINERS[container]
    names = [shard.path for shard in manifest.shards]
    fits = [bool(folder) and name.startswith(f"{folder}/") and name.endswith(f".{container}") for name in names]
    if not manifest.columns or not all(fits):
        raise FormatError("an artifact has columns, and one kind of shards", where=where, expected=f"{folder}/")
    return manifest


def _check_words(fields: Fields, where: str | Path) -> None:
    """Fields that nothing here computes with, but that every reader may count on."""
    fields.text("name")
    for name in ("encoders", "preprocess", "source", "selection", "licence", "seeds", "tool", "order"):
        fields.mapping(name)
    fields.records("parents")
    Fields(fields.mapping("container"), where, "container").texts("views")
    for name in ("required_features", "optional_features"):
        Fields(fields.mapping("format"), where, "format").texts(name)
    latent = Fields(fields.mapping("latent"), where, "latent")
    if latent.texts("moments") not in (["mean"], ["mean", "std"]):
        raise FormatError(
            "the field latent.moments is wrong",
            where=where,
            found=latent.texts("moments"),
            expected="mean, or mean, std",
        )
    latent.real("scale")
    latent.real("shift")


def _check_codec(column: Column, manifest: Manifest, where: str | Path) -> None:
    if column.codec == RAW:
        if column.codec_arrays or column.scale_column is not None or column.fidelity is not None:
            raise FormatError("a raw column needs nothing to decode it", where=where, found=column.name)
        return
    if f"codec:{column.codec}" not in manifest.raw["format"].get("required_features", []):
        raise FormatError("a codec must be a required feature", where=where, found=f"{column.name}: {column.codec}")
    for name in ("mean", "p01", "min"):
        if column.fidelity is not None:
            Fields(column.fidelity, where, f"{column.name}.fidelity").real(name)
    scale, rms = manifest.column(str(column.scale_column)), column.codec_arrays.get(RMS)
    if (
        scale is None
        or column.scale_column != f"{column.name}_scale"
        or rms is None
        or (scale.codec, scale.dtype, scale.shape) != (RAW, "f2", column.shape[:1])
        or (rms.dtype, rms.shape) != ("f4", column.values_shape[1:])
    ):
        raise FormatError(
            f"column {column.name} lacks what its codec needs",
            where=where,
            found=f"scales {scale and scale.shape}, rms {rms and rms.shape}",
            expected=f"a column f2 {list(column.shape[:1])} and an array f4 {list(column.values_shape[1:])}",
        )


def _file(record: Mapping[str, Any], where: str | Path) -> FileRecord:
    fields = Fields(record, where, "files[]")
    return FileRecord(
        path=fields.path("path"),
        bytes=fields.number("bytes"),
        xxh3_128=fields.digest("xxh3_128", 32),
        sha256=fields.digest("sha256", 64),
        samples=fields.number("samples") if "samples" in record else None,
    )
