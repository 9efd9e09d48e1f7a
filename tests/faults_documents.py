"""Hostile JSON, index and Parquet: whatever somebody may write who then repairs every hash."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from faults import INDEX, MANIFEST, Copy, Injection
from faults_hostile import SELECTION, entries, index

from formats.errors import FormatError
from formats.schema import Column
from formats.shards_parquet import array_offsets
from formats.tar import tar_header
from formats.thrift import read_struct

CLASSES = "classes/classes.json"
_DEEP: Any = []
for _ in range(900):
    _DEEP = [_DEEP]
_VALUES: list[Any] = [None, True, -1, 0, 1, 1.5, float("nan"), float("inf"), 2**31, 2**63, 2**64, 10**30, 10**4000]
_VALUES += ["", "x" * 300, "\ud800", "../x", "/etc/passwd", "a\0b", "f2", [], [[]], [2**62] * 9, [1] * 70, {}, _DEEP]
_REMOVE, _TWICE = object(), object()


def json_faults(original: Copy, count: int, seed: int = 0) -> Iterator[Injection]:
    """``count`` seeded changes of one place in each document, and every text that is no document; hashes repaired."""
    rng = random.Random(seed)
    for name in (MANIFEST, CLASSES, SELECTION):
        text = original.read(name)
        document = json.loads(text)
        changes = [(place, value) for place in _places(document) for value in (*_VALUES, _REMOVE, _TWICE)]
        for place, value in rng.sample(changes, min(count, len(changes))):
            what = "removed" if value is _REMOVE else "twice" if value is _TWICE else repr(value)[:30]
            content = json.dumps(_changed(document, place, value)).encode()
            yield _document(name, f"{'.'.join(map(str, place))} = {what}", content)
        for what, content in _texts(text).items():
            yield _document(name, what, content)


def _document(name: str, what: str, content: bytes) -> Injection:
    seal = partial(Copy.seal_manifest, text=content) if name == MANIFEST else partial(_write, name=name, data=content)
    free = ("selection",) if name == SELECTION else ()
    return Injection(f"{name}: hostile JSON", what, seal, sealed=True, free=free)


def _write(copy: Copy, name: str, data: bytes) -> None:
    copy.write(name, data)
    copy.seal()


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inner:
        yield from _places(item, (*place, name))


def _changed(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return [document, document] if value is _TWICE else None if value is _REMOVE else value
    document = json.loads(json.dumps(document))
    parent = document
    for name in place[:-1]:
        parent = parent[name]
    if value is _REMOVE:
        del parent[place[-1]]
    elif value is not _TWICE:
        parent[place[-1]] = value
    elif isinstance(parent, list):
        parent.insert(place[-1], parent[place[-1]])
    else:
        parent[f"{place[-1]} "] = parent[place[-1]]
    return document


def _texts(text: bytes) -> dict[str, bytes]:
    first = json.loads(text)
    name = next(iter(first))
    return {
        "nothing": b"",
        "null": b"null",
        "a list": b"[]",
        "a number": b"7",
        "another object": b"{}",
        "cut": text[:-20],
        "garbage behind": text + b"x",
        "an endless number": b'{"n": ' + b"9" * 100_000 + b"}",
        "an endless number in the version": text.replace(b'"1.0"', b'"' + b"9" * 5000 + b'.0"'),
        "100,000 lists deep": b"[" * 100_000 + b"]" * 100_000,
        "100,000 objects deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "100,000 deep in a field": text.replace(b"{", b'{"deep": ' + b"[" * 100_000 + b"]" * 100_000 + b",", 1),
        "not UTF-8": text.replace(b"a", b"\xff"),
        "UTF-16": text.decode().encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf" + text,
        "a zero byte": text.replace(b"a", b"\0", 1),
        "a field twice, the first one lies": text.replace(b"{", b'{"' + name.encode() + b'": 1,', 1),
        "a field twice, the last one lies": text.rstrip()[:-1] + b',"' + name.encode() + b'": 1}',
        "20,000 fields": b"{" + b",".join(b'"%d": 0' % i for i in range(20_000)) + b"}",
    }


def index_faults(original: Copy) -> Iterator[Injection]:
    """An index that lies or is of other types; hashes repaired."""
    table = pq.read_table(original.root / INDEX)
    for what, change in _ROWS.items():
        yield _index(what, partial(index, change=change))
    for name in table.schema.names:
        at = table.schema.get_field_index(name)
        for kind in (pa.int64(), pa.int32(), pa.uint64(), pa.float64(), pa.string(), pa.large_string(), pa.binary(),
                     pa.bool_(), pa.list_(pa.int64()), pa.dictionary(pa.int32(), pa.string()), pa.null()):  # fmt: skip
            if kind != table.schema.field(at).type:
                column = pa.nulls(len(table), kind) if not _casts(table[name], kind) else table[name].cast(kind)
                other = table.set_column(at, pa.field(name, kind), column)
                yield _index(f"{name} as {kind}", partial(_replace, table=other))
        nulled = pa.array([None, *table[name].to_pylist()[1:]], table.schema.field(at).type)
        yield _index(f"{name} with a null", partial(_replace, table=table.set_column(at, name, nulled)))
        yield _index(f"{name} missing", partial(_replace, table=table.drop_columns(name)))
        if pa.types.is_string(table.schema.field(at).type):
            raw = pa.array([b"\xff\xfe", *(value.encode() for value in table[name].to_pylist()[1:])], pa.binary())
            text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
            other = table.set_column(at, table.schema.field(at), text)
            yield _index(f"{name} that is no UTF-8", partial(_replace, table=other))
            long = pa.array(["x" * (1 << 23), *table[name].to_pylist()[1:]])
            other = table.set_column(at, table.schema.field(at), long)
            yield _index(f"{name} of 8 MiB", partial(_replace, table=other))
    none, repeated = table.slice(0, 0), pa.concat_tables([table] * 1000)
    yield _index("no rows", partial(_replace, table=none))
    yield _index("rows a thousand times", partial(_replace, table=repeated))
    yield _index("no columns", partial(_replace, table=table.select([])))
    yield _index("a column twice", partial(_replace, table=table.append_column("key", table["key"])))
    yield _index("a column more", partial(_replace, table=table.append_column("more", table["key"])))
    for what, options in {"in row groups of 3": {"row_group_size": 3}, "brotli": {"compression": "brotli"}}.items():
        yield _index(what, partial(_replace, table=table, **options))
    for what, rename in _KEYS.items():
        yield Injection("duplicate keys", what, rename, sealed=True)


def _casts(column: pa.ChunkedArray, kind: pa.DataType) -> bool:
    try:
        column.cast(kind)
    except pa.ArrowException:
        return False
    return True


def _index(what: str, apply: Callable[[Copy], None]) -> Injection:
    return Injection("index: hostile", what, apply, sealed=True)


def _replace(copy: Copy, table: pa.Table, **options: Any) -> None:
    stream = io.BytesIO()
    pq.write_table(table, stream, **{"compression": "zstd", **options})
    copy.write(INDEX, stream.getvalue())


def _row(**values: Any) -> Callable[[list[dict[str, Any]]], None]:
    named = {name.replace("__", "."): value for name, value in values.items()}
    return lambda rows: rows[3].update(named)


def _switch(rows: list[dict[str, Any]], *names: str) -> None:
    for name in names:
        rows[3][name], rows[4][name] = rows[4][name], rows[3][name]


_HUGE = 2**63 - 1
_ROWS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "two labels exchanged": lambda rows: _switch(rows, "label"),
    "two keys exchanged": lambda rows: _switch(rows, "key"),
    "two facts exchanged": lambda rows: _switch(rows, "info"),
    "two sample ids exchanged": lambda rows: _switch(rows, "sample_id"),
    "two offsets exchanged": lambda rows: _switch(rows, "latent.offset"),
    "two arrays exchanged": lambda rows: _switch(rows, "latent.offset", "latent.xxh3"),
    "two rows exchanged": lambda rows: rows.insert(3, rows.pop(4)),
    "two rows exchanged but for their number": lambda rows: _switch(rows, *(n for n in rows[3] if n != "row")),
    "a row of the other shard": lambda rows: rows.insert(3, rows.pop(15)),
    "a row less": lambda rows: rows.pop(),
    "a row more": lambda rows: rows.append(rows[-1]),
    "a key more than once": lambda rows: rows[3].update(key=rows[15]["key"]),
    **{f"key {key[:20]!r}": _row(key=key) for key in ("", "../x", "a.b", "/x", "A", "é", "x" * 65, "a\0", "\n")},
    **{f"label {label}": _row(label=label) for label in (-1, 4, 2**31 - 1, -(2**31))},
    **{f"row {row}": _row(row=row) for row in (-1, 0, 2**31 - 1)},
    **{f"shard {shard!r}": _row(shard=shard) for shard in ("", "../x", "/etc/passwd", "manifest.json", "README.md")},
    **{f"offset {offset}": _row(latent__offset=offset) for offset in (-1, 0, 1, 2**62, _HUGE, -_HUGE - 1)},
    **{f"nbytes {nbytes}": _row(latent__nbytes=nbytes) for nbytes in (-1, 0, 1, 2**62, _HUGE, -_HUGE - 1)},
    **{f"digest {digest[:9]!r}": _row(latent__xxh3=digest) for digest in ("", "0" * 32, "é", "x" * 1000)},
    **{f"sample id {i[:9]!r}": _row(sample_id=i) for i in ("", "0" * 32, "x", "é" * 32, "x" * 1000)},
    **{f"facts {info[:9]!r}": _row(info=info) for info in ("", "{", "[]", "7", "{}", '{"a":NaN}', "[" * 99999)},
}


def _rename_in_tar(copy: Copy, shard: int, first: int) -> None:
    """Give the second sample of a shard the key of the artifact's first, in tar and index alike."""
    name = copy.shards[shard]
    data = bytearray(copy.read(name))
    members = [member for member, _ in entries(bytes(data))]
    per_sample = 2 + len(copy.manifest()["columns"])
    key = next(iter(entries(copy.read(copy.shards[0]))))[0].name.split(".")[0]
    for member in members[first * per_sample : (first + 1) * per_sample]:
        other = key + member.name[member.name.index(".") :]
        data[member.offset : member.offset + 512] = tar_header(other, member.size)
    copy.write(name, bytes(data))


def _rename(copy: Copy, shard: int, first: int) -> None:
    if copy.shards[0].endswith(".tar"):
        _rename_in_tar(copy, shard, first)
    else:
        rows = pq.read_table(copy.root / copy.shards[shard])
        zero = pq.read_table(copy.root / copy.shards[0])["key"][0].as_py()
        keys = pa.array([zero if i == first else key.as_py() for i, key in enumerate(rows["key"])], pa.string())
        parquet(copy, rows.set_column(0, rows.schema.field(0), keys), shard=shard)
    count = len(pq.read_table(copy.root / INDEX)) // len(copy.shards)
    index(copy, lambda rows: rows[shard * count + first].update(key=rows[0]["key"]))


_KEYS = {
    "in one shard, consistently": partial(_rename, shard=0, first=1),
    "in two shards, consistently": partial(_rename, shard=1, first=4),
}


_PLAIN = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}


def parquet(copy: Copy, table: pa.Table, shard: int = 0, **options: Any) -> None:
    """Rewrite a shard; where its arrays can be found at all the index points to where they now are."""
    name = copy.shards[shard]
    stream, rows = io.BytesIO(), options.pop("row_group_size", None)
    with pq.ParquetWriter(stream, table.schema, **{**_PLAIN, "store_schema": False, **options}) as writer:
        # Without Arrow's schema pyarrow leaves out the table's own metadata.
        writer.add_key_value_metadata(table.schema.metadata or {})
        writer.write_table(table, rows)
    copy.write(name, stream.getvalue())
    columns = [Column(c["name"], c["dtype"], tuple(c["shape"])) for c in copy.manifest()["columns"]]
    try:
        places = array_offsets(copy.root / name, columns)
    except FormatError:
        return

    def repoint(rows: list[dict[str, Any]]) -> None:
        mine = [row for row in rows if row["shard"] == name]
        for row, offsets in zip(mine, places, strict=False):
            row |= {f"{column.name}.offset": place for column, place in zip(columns, offsets, strict=True)}

    index(copy, repoint)


def parquet_faults(original: Copy) -> Iterator[Injection]:
    """Shards as another tool might write them, and shards that lie; hashes repaired."""
    name = original.shards[0]
    table = pq.read_table(original.root / name)
    keys, first = table["key"].to_pylist(), table.schema.names[3]
    nulled = pa.array([None, *table[first].to_pylist()[1:]], pa.binary())
    raw = pa.array([b"\xff", *(key.encode() for key in keys[1:])], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    short = pa.array([b"", *table[first].to_pylist()[1:]], pa.binary())
    tables = {
        "nothing": table,
        "rows exchanged": table.take([1, 0, *range(2, len(table))]),
        "a row less": table.slice(1),
        "a row twice": pa.concat_tables([table, table.slice(0, 1)]),
        "no rows": table.slice(0, 0),
        "a column less": table.drop_columns("json"),
        "a column more": table.append_column("more", table["key"]),
        "columns in another order": table.select(table.schema.names[::-1]),
        "other metadata": table.replace_schema_metadata({"d2c": "{}"}),
        "no metadata": table.replace_schema_metadata(None),
        "a null": table.set_column(3, first, nulled),
        "keys that are no UTF-8": table.set_column(0, table.schema.field(0), broken),
        "other labels": table.set_column(1, table.schema.field(1), pa.array([1] * len(table), pa.int32())),
        "labels of 64 bits": table.set_column(1, "label", table["label"].cast(pa.int64())),
        "arrays as text": table.set_column(3, first, pa.array(keys)),
        "arrays as large binary": table.set_column(3, first, table[first].cast(pa.large_binary())),
        "an empty array": table.set_column(3, table.schema.field(3), short),
        "other facts": table.set_column(2, table.schema.field(2), pa.array(["{}"] * len(table))),
    }
    options: dict[str, dict[str, Any]] = {codec: {"compression": codec} for codec in ("zstd", "snappy", "gzip", "lz4")}
    options |= {"dictionary": {"use_dictionary": True}, "statistics": {"write_statistics": True}}
    options |= {"pages v2": {"data_page_version": "2.0"}, "no page checksums": {"write_page_checksum": False}}
    options |= {"row groups of 3": {"row_group_size": 3}, "tiny pages": {"data_page_size": 64}}
    options |= {"delta lengths": {"column_encoding": {first: "DELTA_LENGTH_BYTE_ARRAY"}}}
    options |= {"Arrow's schema": {"store_schema": True}, "parquet 1.0": {"version": "1.0"}}
    changes = {what: partial(parquet, table=other) for what, other in tables.items()}
    changes |= {what: partial(parquet, table=table, **option) for what, option in options.items()}
    changes |= {what: partial(Copy.write, name=name, data=data) for what, data in _pages(original, name).items()}
    for what, apply in changes.items():
        yield Injection("parquet: hostile", what, apply, sealed=True)


def _pages(original: Copy, name: str) -> dict[str, bytes]:
    """A shard's bytes with page headers that lie, each as long as the true one, and footers that lie."""
    data = original.read(name)
    found = {}
    for column in (0, 3):
        start = pq.read_metadata(original.root / name).row_group(0).column(column).data_page_offset
        header, end = read_struct(memoryview(data), start)
        size, count = header[3], header[5][1]
        lies = {f"{count} values, but {n}": (0, size, n, 0) for n in (0, -1, 1, 2**31 - 1, 2**62)}
        lies |= {f"a page of {n} bytes": (0, n, count, 0) for n in (0, -1, 1, 2**31 - 1, 2**62)}
        lies |= {f"a page of type {kind}": (kind, size, count, 0) for kind in (1, 2, 3, 9)}
        lies |= {f"encoding {kind}": (0, size, count, kind) for kind in (2, 3, 8, 99)}
        for what, values in lies.items():
            found[f"column {column}: {what}"] = data[:start] + _header(values, end - start) + data[end:]
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    lengths = (0, 1, len(data) - 8, len(data), 2**31 - 1, 2**31, 2**32 - 1)
    found |= {f"a footer of {n} bytes": data[:-8] + n.to_bytes(4, "little") + data[-4:] for n in lengths}
    found["an encrypted footer"] = data[:-4] + b"PARE"
    found["a random footer"] = data[:footer] + random.Random(0).randbytes(len(data) - footer - 8) + data[-8:]
    found["a zero footer"] = data[:footer] + bytes(len(data) - footer - 8) + data[-8:]
    return found


def _header(values: Sequence[int], length: int) -> bytes:
    """A page header of (type, bytes, values, encoding) in Thrift's compact protocol, numbers drawn out to fit."""
    kind, size, count, encoding = values
    numbers = [kind, size, size, count, encoding, 3, 3]
    marks = [b"\x15", b"\x15", b"\x15", b"\x2c\x15", b"\x15", b"\x15", b"\x15"]
    texts = [_varint((n << 1) ^ (n >> 63)) for n in numbers]
    spare = length - sum(map(len, (*marks, *texts))) - 2
    for i, text in enumerate(texts):
        more = min(max(spare, 0), 9 - len(text))
        texts[i] = text[:-1] + bytes([text[-1] | 128]) + b"\x80" * (more - 1) + b"\0" if more > 0 else text
        spare -= max(more, 0)
    return b"".join(mark + text for mark, text in zip(marks, texts, strict=True)) + b"\0\0"


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
