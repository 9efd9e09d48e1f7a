"""Parquet files of a few kilobytes that would fill the memory: refused before they are unpacked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import INDEX, Copy, build
from faults_documents import parquet
from formats_fixture import COLUMNS, make_samples, write_artifact

from formats import FormatError, IntegrityError, open_artifact, verify
from formats.files import read_bounded
from formats.thrift import read_struct

MIB = 1 << 20
LONG = 2 * MIB
_POOLS: list[Any] = []
"""Never freed: Arrow may hold on to one that was its default."""


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(build(tmp_path / "sound", "parquet"), tmp_path / "copy")


@contextmanager
def at_most(limit: int) -> Iterator[None]:
    """Whatever Arrow does inside takes at most ``limit`` bytes at any time."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(pa.system_memory_pool())
    _POOLS.append(pool)
    pa.set_memory_pool(pool)
    try:
        yield
    finally:
        pa.set_memory_pool(before)
    assert (pool.max_memory() or 0) <= limit


def with_texts(table: pa.Table, name: str, texts: list[str]) -> pa.Table:
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(at), pa.array(texts, pa.string()))


def long_texts(rows: int) -> list[str]:
    return [chr(ord("a") + row % 26) * LONG for row in range(rows)]


def replace_number(data: bytes, old: int, new: int) -> bytes:
    """``data`` with an integer of its footer replaced, drawn out to the length of the old one."""
    before, after = _varint(old << 1), bytearray(_varint(new << 1))
    after[-1] |= 128
    after += b"\x80" * (len(before) - len(after) - 1) + b"\0"
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    assert data.count(before, footer) >= 1
    return data[:footer] + data[footer:].replace(before, bytes(after))


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


@pytest.mark.parametrize("codec", ["zstd", "snappy", "gzip", "lz4", "brotli"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_an_index_whose_footer_hides_its_size_is_refused(copy: Copy, codec: str, dictionary: bool) -> None:
    file = copy.root / INDEX
    table = pq.read_table(file)
    file.unlink()
    pq.write_table(
        with_texts(table, "sample_id", long_texts(20)), file, compression=codec, use_dictionary=dictionary,
        dictionary_pagesize_limit=1 << 30, write_statistics=False,
    )  # fmt: skip
    size = pq.read_metadata(file).row_group(0).total_byte_size
    assert size > 40 * MIB
    file.write_bytes(replace_number(file.read_bytes(), size, 1000))
    assert pq.read_metadata(file).row_group(0).total_byte_size == 1000
    copy.seal()
    with at_most(2 * MIB):
        found = [str(fault) for fault in verify(copy.root, "quick").faults]
        assert any("rows are too large" in fault for fault in found), found
        with pytest.raises(IntegrityError):
            open_artifact(copy.root)


def test_a_page_that_hides_its_size_is_refused(copy: Copy) -> None:
    file = copy.root / INDEX
    table = with_texts(pq.read_table(file), "sample_id", long_texts(20))
    file.unlink()
    for codec in ("zstd", "snappy", "gzip", "lz4", "brotli"):
        pq.write_table(table, file, compression=codec, use_dictionary=False, write_statistics=False)
        chunk = pq.read_metadata(file).row_group(0).column(table.schema.get_field_index("sample_id"))
        data = file.read_bytes()
        first, start = chunk.data_page_offset, chunk.data_page_offset
        pieces = [data[:first]]
        while start < first + chunk.total_compressed_size:
            header, end = read_struct(memoryview(data), start)
            old = _varint(header[2] << 1)
            lie = bytearray(_varint(1000 << 1))
            lie[-1] |= 128
            lie += b"\x80" * (len(old) - len(lie) - 1) + b"\0"
            pieces += [data[start:end].replace(old, bytes(lie), 1), data[end : end + header[3]]]
            start = end + header[3]
        file.write_bytes(b"".join([*pieces, data[start:]]))
        assert file.stat().st_size == len(data)
        with at_most(8 * MIB), pytest.raises(FormatError, match="readable Parquet"):
            read_bounded(file, table.schema.names, each=16384)


@pytest.mark.parametrize("change", ["rows without bytes", "texts that share their beginning"])
def test_an_index_that_grows_without_large_pages_is_refused(copy: Copy, change: str) -> None:
    file = copy.root / INDEX
    table = pq.read_table(file)
    file.unlink()
    if change == "rows without bytes":
        row = table.slice(0, 1).to_pylist()[0] | {"sample_id": "0" * 2000}
        pq.write_table(pa.Table.from_pylist([row] * 20_000, schema=table.schema), file, compression="zstd")
        assert file.stat().st_size < 1 << 14
    else:
        long = with_texts(table, "sample_id", ["0" * (MIB // 2)] * 20)
        encoding = {"column_encoding": {"sample_id": "DELTA_BYTE_ARRAY"}, "use_dictionary": ["key"]}
        pq.write_table(long, file, compression="zstd", write_statistics=False, **encoding)
    with at_most(2 * MIB), pytest.raises(FormatError, match=r"rows are too large|begin with one another"):
        read_bounded(file, table.schema.names, each=16384)


def test_the_same_long_facts_in_every_sample_are_read(tmp_path: Path) -> None:
    """The most that a sound index grows."""
    samples = make_samples(4000, COLUMNS[1:])
    for sample in samples:
        sample.info.clear()
        sample.info["note"] = "x" * 8000
    path = write_artifact(tmp_path / "a", samples=samples, columns=COLUMNS[1:])
    assert verify(path).ok
    assert open_artifact(path).info(3999) == samples[0].info


def rewrite(copy: Copy, table: pa.Table, **options: Any) -> None:
    """Write the first shard anew; the arrays lie elsewhere then, which the index is told."""
    parquet(copy, table, **options)
    copy.seal()


@pytest.mark.parametrize("name", ["key", "label", "json"])
@pytest.mark.parametrize("option", ["zstd", "dictionary", "encoding"])
def test_every_column_of_a_shard_is_plain(copy: Copy, name: str, option: str) -> None:
    table = pq.read_table(copy.root / copy.shards[0])
    others = dict.fromkeys(table.schema.names, "none")
    options: dict[str, Any] = {
        "zstd": {"compression": others | {name: "zstd"}},
        "dictionary": {"use_dictionary": [name]},
        "encoding": {
            "column_encoding": {name: "DELTA_BINARY_PACKED" if name == "label" else "DELTA_LENGTH_BYTE_ARRAY"}
        },
    }
    rewrite(copy, table)
    assert verify(copy.root, "deep").ok
    rewrite(copy, table, **options[option])
    faults = [fault for fault in verify(copy.root, "deep").faults if fault.kind == "container"]
    assert [fault.path for fault in faults] == copy.shards[:1]
    assert f": {name}; " in f"{faults[0].found}; "


def test_a_small_shard_that_would_fill_the_memory_is_refused(copy: Copy) -> None:
    table = pq.read_table(copy.root / copy.shards[0])
    others = dict.fromkeys(table.schema.names, "none")
    for texts, options in (
        (long_texts(len(table)), {"compression": others | {"json": "zstd"}}),
        (["x" * LONG] * len(table), {"use_dictionary": ["json"]}),
    ):
        rewrite(copy, with_texts(table, "json", texts), **options)
        with at_most(6 * MIB):
            assert "container" in {fault.kind for fault in verify(copy.root, "deep").faults}


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"\x15\x02\x15\x04\x05\x04\x06\0", id="a field twice"),
        pytest.param(b"\x15\x02\x05\x84\x80\x08\x06\0", id="a field that others take for another"),
    ],
)
def test_a_header_that_readers_could_understand_differently_is_refused(header: bytes) -> None:
    with pytest.raises(FormatError, match="twice"):
        read_struct(memoryview(header), 0)
