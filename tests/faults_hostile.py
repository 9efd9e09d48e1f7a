"""Faults of files, tars, Parquet and .npy: accidents, and what somebody does who also repairs every hash."""

from __future__ import annotations

import io
import os
import pickle
import random
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from faults import INDEX, MANIFEST, SUMS, Copy, Injection

from formats.npy import npy_header

Entry = tuple[tarfile.TarInfo, bytes]
SELECTION = "meta/selection.json"


def both(region: str, name: str, apply: Callable[[Copy], None], files: tuple[str, ...]) -> Iterator[Injection]:
    """The fault as an accident, and with all hashes and sizes repaired."""
    yield Injection(region, name, apply, files)
    yield Injection(region, f"{name}, sealed", apply, (*files, INDEX, MANIFEST, SUMS), sealed=True)


class Canary:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("canary"),)


def object_array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Canary()] * 4, dtype=object), allow_pickle=True)
    return stream.getvalue()


def file_faults(original: Copy) -> Iterator[Injection]:
    """Files cut, emptied, grown, gone, added, swapped, or replaced by what is no file."""
    region = "whole files"
    names = [record["path"] for record in original.manifest()["files"]]
    rng = random.Random(0)
    for name in [*names, MANIFEST, SUMS]:
        data = original.read(name)
        files = (name, MANIFEST, SUMS) if name in (MANIFEST, SUMS) else (name,)
        free = ("selection",) if name == SELECTION else ()
        changes = {
            "emptied": b"",
            "cut to half": data[: len(data) // 2],
            "one byte short": data[:-1],
            "one byte more": data + b"\0",
            "a line more": data + b"\n",
            "another copy behind": data * 2,
            "zeroed": bytes(len(data)),
            "random": rng.randbytes(len(data)),
        }
        for what, content in changes.items():
            write = partial(Copy.write, name=name, data=content)
            yield Injection(region, f"{name} {what}", write, files)
            if name in names:
                repaired = (*files, INDEX, MANIFEST, SUMS)
                yield Injection(region, f"{name} {what}, sealed", write, repaired, sealed=True, free=free)
        for what, replace in _REPLACED.items():
            yield Injection(region, f"{name} {what}", partial(replace, name=name), files)
    for name in ("README.md", "notes.txt", ".hidden", "more/data.bin"):
        yield Injection(region, f"{name} added", partial(add, name=name), (name,))
    folders = sorted({name.split("/")[0] for name in names})
    for name in [f"{folder}/{extra}" for folder in folders for extra in ("extra.pkl", ".hidden", "a/b.tar")]:
        yield Injection(region, f"{name} added", partial(add, name=name), (name,))
    yield Injection(region, "README.md missing", lambda copy: (copy.root / "README.md").unlink())
    yield from both("shards", "two shards swapped", swap, tuple(original.shards))


def add(copy: Copy, name: str) -> None:
    (copy.root / name).parent.mkdir(exist_ok=True)
    copy.write(name, pickle.dumps(Canary()))


def swap(copy: Copy) -> None:
    first, second = copy.shards[:2]
    one, other = copy.read(first), copy.read(second)
    copy.write(first, other)
    copy.write(second, one)


def _missing(copy: Copy, name: str) -> None:
    (copy.root / name).unlink()


def _folder(copy: Copy, name: str) -> None:
    _missing(copy, name)
    (copy.root / name).mkdir()


def _pipe(copy: Copy, name: str) -> None:
    _missing(copy, name)
    os.mkfifo(copy.root / name)


def _link(copy: Copy, name: str, target: str) -> None:
    _missing(copy, name)
    (copy.root / name).symlink_to(target)


_REPLACED = {
    "missing": _missing,
    "a folder": _folder,
    "a pipe": _pipe,
    "a link to nowhere": partial(_link, target="nowhere"),
    "a link to itself": lambda copy, name: _link(copy, name, Path(name).name),
    "a link to a device": partial(_link, target="/dev/zero"),
    "a link to another file": partial(_link, target="/etc/passwd"),
}


def entries(data: bytes) -> list[Entry]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def block(entry: Entry) -> bytes:
    member, data = entry
    large = len(member.name) > 100 or member.size >= 8 * 1024**3
    form = tarfile.PAX_FORMAT if member.pax_headers else tarfile.GNU_FORMAT if large else tarfile.USTAR_FORMAT
    header = member.tobuf(form)
    return header + data + bytes(-len(data) % 512)


def rebuild(copy: Copy, change: Callable[[list[Entry]], Any], end: bytes = bytes(1024)) -> None:
    """Rewrite the first shard's members, and let the index point to where its arrays now are."""
    shard = copy.shards[0]
    members = entries(copy.read(shard))
    change(members)
    data, places = b"", {}
    for member, content in members:
        raw = block((member, content))
        places[member.name] = len(data) + len(raw) - len(content) - -len(content) % 512
        data += raw
    data += end
    copy.write(shard, data + bytes(-len(data) % 10240))
    columns = copy.manifest()["columns"]

    def repoint(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            for c in columns:
                place = places.get(f"{row['key']}.{c['name']}.npy")
                if row["shard"] == shard and place is not None:
                    row[f"{c['name']}.offset"] = place + len(npy_header(c["dtype"], tuple(c["shape"])))

    index(copy, repoint)


def regular(name: str, data: bytes = b"x", **fields: Any) -> Entry:
    member = tarfile.TarInfo(name)
    member.mode = 0o644
    for field, value in fields.items():
        setattr(member, field, value)
    member.size = fields.get("size", len(data))
    return member, data


def special(kind: bytes, name: str = "00000000.x", target: str = "/etc/passwd") -> Entry:
    return regular(name, b"", type=kind, linkname=target, devmajor=1, devminor=5)


def planted() -> dict[str, Entry]:
    """Members that no shard may hold."""
    names = ["../evil.cls", "a/../../evil", "/etc/evil", "..\\evil", "C:\\evil", "./00000000.cls", "a//b", "..", ""]
    found = {f"member {name!r}": regular(name) for name in [*names, "é.cls", "a\nb.cls", "x" * 60 + "/" + "y" * 60]}
    found |= {f"pickle {e}": regular(f"00000000.{e}", pickle.dumps(Canary())) for e in ("pkl", "pyd", "pth", "joblib")}
    kinds = {name: getattr(tarfile, name) for name in dir(tarfile) if name.endswith("TYPE") and name.isupper()}
    kinds = {name: kind for name, kind in kinds.items() if kind != tarfile.REGTYPE}
    found |= {f"a member of type {name}": special(kind) for name, kind in kinds.items()}
    found |= {f"a link to {t}": special(tarfile.SYMTYPE, "00000000.latent.npy", t) for t in ("..", "/", "../../x")}
    found["a PAX header"] = regular("00000000.cls", pax_headers={"size": "99999999", "path": "../evil"})
    found["a long GNU name"] = regular("x" * 300)
    found["a member of 8 GiB"] = regular("00000000.big", size=8 * 1024**3 - 1)
    found["a member of 10 TiB in base 256"] = regular("00000000.big", size=10 * 1024**4)
    for field, value in {"uid": 1, "mode": 0o4777, "mtime": 1, "uname": "root", "gname": "root"}.items():
        found[f"a member with {field}"] = regular("00000000.txt", **{field: value})
    return found


def tar_faults(original: Copy, every: int = 1) -> Iterator[Injection]:
    """Truncation at and between members (every ``every``-th), hostile members, members that lie.

    Hostile members are planted first, between and last; if ``every`` is not 1, first only.
    """
    shard = original.shards[0]
    data = original.read(shard)
    members = entries(data)
    cuts = sorted({m.offset + shift for m, _ in members for shift in (0, 200, 512, 512 + m.size)})
    end = members[-1][0].offset_data + -(-members[-1][0].size // 512) * 512
    cuts = [*cuts[::every], end, end + 512, end + 1024]
    for cut in cuts:
        yield from both("tar: truncated", f"cut at {cut}", partial(Copy.write, name=shard, data=data[:cut]), (shard,))
    for what, entry in planted().items():
        for place in (0, 5, len(members))[: 3 if every == 1 else 1]:
            apply = partial(rebuild, change=lambda all_, entry=entry, place=place: all_.insert(place, entry))
            yield from both("tar: planted members", f"{what} at {place}", apply, (shard, INDEX))
    for what, change in _LIES.items():
        yield from both("tar: other members", what, partial(rebuild, change=change), (shard, INDEX))
    for what, behind in {"no end": b"", "half an end": bytes(512), "garbage": bytes(1024) + b"x" * 512}.items():
        yield from both("tar: other members", what, partial(rebuild, change=len, end=behind), (shard, INDEX))
    hidden = bytes(1024) + block(regular("../evil")) + bytes(1024)
    yield from both(
        "tar: other members", "an archive behind the end", partial(rebuild, change=len, end=hidden), (shard,)
    )
    for what, content in npy_lies(members[2][1]).items():
        apply = partial(rebuild, change=lambda all_, content=content: put(all_, 2, content))
        yield from both("tar: npy that lies", what, apply, (shard, INDEX))


def put(members: list[Entry], i: int, content: bytes) -> None:
    members[i] = (members[i][0], content)
    members[i][0].size = len(content)


def _swap(members: list[Entry], i: int, j: int) -> None:
    members[i], members[j] = members[j], members[i]


_LIES: dict[str, Callable[[list[Entry]], Any]] = {
    "a member twice": lambda all_: all_.insert(3, all_[2]),
    "a sample twice": lambda all_: all_.extend(all_[:4]),
    "the first sample again with another label": lambda all_: all_.extend([regular(all_[0][0].name, b"3"), *all_[1:4]]),
    "a member less": lambda all_: all_.pop(3),
    "a sample less": lambda all_: all_.__delitem__(slice(4)),
    "a sample nobody knows": lambda all_: all_.append(regular("zzzzzzzz.cls", b"1")),
    "no members": lambda all_: all_.clear(),
    "members in another order": lambda all_: _swap(all_, 0, 1),
    "samples interleaved": lambda all_: _swap(all_, 3, 7),
    "arrays of two samples exchanged": lambda all_: _exchange(all_, 2, 6),
    "another label": lambda all_: put(all_, 0, b"1"),
    "a label that is no number": lambda all_: put(all_, 0, b"one"),
    "other facts": lambda all_: put(all_, 1, b"{}"),
    "facts that are no JSON": lambda all_: put(all_, 1, b"\xff"),
    "an array cut": lambda all_: put(all_, 2, all_[2][1][:-2]),
    "an array of nothing": lambda all_: put(all_, 2, b""),
    "an array that is a symbolic link": lambda all_: setattr(all_[2][0], "type", tarfile.SYMTYPE),
    "an array that is a hard link": lambda all_: setattr(all_[2][0], "type", tarfile.LNKTYPE),
    "an array that is a device": lambda all_: setattr(all_[2][0], "type", tarfile.CHRTYPE),
    "an array that goes on": lambda all_: put(all_, 2, all_[2][1] + bytes(64)),
}


def _exchange(members: list[Entry], i: int, j: int) -> None:
    one, other = members[i][1], members[j][1]
    put(members, i, other)
    put(members, j, one)


def npy_lies(good: bytes) -> dict[str, bytes]:
    """.npy contents that claim something else than ``good``."""
    length = 10 + int.from_bytes(good[8:10], "little")
    text, body = good[10:length].decode(), good[length:]
    shape = text[text.index("'shape': ") + 9 : text.index("), }") + 1]
    shapes = [
        "(9" + "9" * 30 + ",)",
        "(-1,)",
        "(2, -4)",
        "(0, 99999999999999999999999)",
        "()",
        "(,)",
        "(1 2,)",
        "(1, 2",
    ]
    shapes += ["(" + "1, " * 100 + ")", "(" + "0, " * 33 + ")", "(4294967296, 4294967296, 2)", "[2]", "(2L,)", "(٣,)"]
    texts = {f"shape {other[:30]}": text.replace(shape, other) for other in shapes}
    descr = text[text.index("'<" if "'<" in text else "'|") : text.index(", 'fortran")]
    kinds = ("'|O8'", "'|O'", "'>f2'", "'<c16'", "'|V9'", "'<f8'", "'|S9'", "'<M8[s]'", "[('a', '<f2')]", "'=f2'")
    texts |= {f"type {other}": text.replace(descr, other) for other in kinds}
    texts["Fortran order"] = text.replace("False", "True ")
    texts["code"] = "__import__('pathlib').Path('canary').touch()\n"
    texts["a duplicate field"] = text.replace("}", "'shape': (1,), }")
    made = {}
    for what, other in texts.items():
        raw = (other.rstrip(" \n").encode() + b" " * 128)[: max(length - 10, len(other.encode()) - 1)] + b"\n"
        made[what] = good[:8] + len(raw).to_bytes(2, "little") + raw + body
    made |= {f"version {version}": good[:6] + bytes(version) + good[8:] for version in ((2, 0), (3, 0), (9, 9), (1, 1))}
    made["a header of 65535 bytes"] = good[:8] + b"\xff\xff" + good[10:]
    made["a header of 0 bytes"] = good[:8] + b"\0\0" + good[10:]
    made["only a magic"] = good[:6]
    made["a pickle"] = pickle.dumps(Canary())
    made["objects"] = object_array()
    made["objects, padded"] = object_array().ljust(len(good), b"\0")[: max(len(good), len(object_array()))]
    return made


def npy_faults(original: Copy) -> Iterator[Injection]:
    """Class tables and codec arrays whose header lies."""
    for name in [record["path"] for record in original.manifest()["files"] if record["path"].endswith(".npy")]:
        for what, content in npy_lies(original.read(name)).items():
            apply = partial(Copy.write, name=name, data=content)
            yield from both(f"{name.split('/')[0]} arrays: npy that lies", f"{name}: {what}", apply, (name,))


def index(copy: Copy, change: Callable[[list[dict[str, Any]]], Any], schema: pa.Schema | None = None) -> None:
    """Change the rows of the index, and perhaps its types."""
    table = pq.read_table(copy.root / INDEX)
    rows = table.to_pylist()
    change(rows)
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema or table.schema), stream, compression="zstd")
    copy.write(INDEX, stream.getvalue())
