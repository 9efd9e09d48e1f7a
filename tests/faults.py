"""Fault injection: damage a copy of an artifact in one way, then judge verification and reader by what they say of it.

`faults_flips` enumerates accidents, `faults_hostile` and `faults_documents` what somebody does who wants to deceive.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
import tarfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import formats_fixture as fixture
import numpy as np
import pyarrow.parquet as pq

from formats import FormatError, codecs, open_artifact, verify
from formats.describe import describe
from formats.hashing import sha256_file, xxh3_file
from formats.schema import RMS

LEVELS = ("quick", "default", "deep")
MANIFEST, SUMS, INDEX = "manifest.json", "SHA256SUMS", "meta/samples.parquet"
COUNTS = ("samples", "classes", "per_class_min", "per_class_max")
SLOW = 20.0
"""Seconds; whatever takes longer on 20 samples hangs."""


def build(folder: Path, container: Any) -> Path:
    """The sound artifact that all faults are injected into: every kind of file that the format knows.

    20 samples in two shards: latents, tokens in the codec of 8 bits (tar) or 4 bits (Parquet), one class table.
    """
    codec = codecs.INT8 if container == "tar" else codecs.INT4
    tokens = np.random.default_rng(0).normal(size=(20, 6, 4)).astype("f4")
    columns = (fixture.COLUMNS[0], *codecs.columns("tokens", codec, tokens.shape[1:]))
    samples = fixture.make_samples(len(tokens), columns[:1])
    with fixture.writer(folder / container, container, 2, columns) as writer:
        rms = writer.codec_array("tokens", RMS, lambda: codecs.channel_rms(tokens))
        for sample, token in zip(samples, tokens, strict=True):
            sample.arrays.update(codecs.stored("tokens", codec, token, rms))
        for shard, part in enumerate(fixture.split(samples, 2)):
            writer.write(shard, part)
        return fixture.finish(writer)


class Copy:
    """An artifact of its own: files are links to the original's until they are replaced."""

    def __init__(self, original: Path, root: Path) -> None:
        self.root = root
        for folder, _, files in os.walk(original):
            target = root / Path(folder).relative_to(original)
            target.mkdir(parents=True)
            for name in files:
                os.link(Path(folder) / name, target / name)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        (self.root / name).unlink(missing_ok=True)
        (self.root / name).write_bytes(data)

    def manifest(self) -> Any:
        return json.loads(self.read(MANIFEST))

    @property
    def shards(self) -> list[str]:
        return [record["path"] for record in self.manifest()["files"] if "samples" in record]

    def seal(self, manifest: Any = None) -> None:
        """Make every hash, every size and SHA256SUMS agree with the files: what a deceiver would do."""
        manifest = manifest or self.manifest()
        for record in manifest["files"]:
            path = self.root / record["path"]
            record |= {"bytes": path.stat().st_size, "xxh3_128": xxh3_file(path), "sha256": sha256_file(path)}
        self.seal_manifest(json.dumps(manifest, sort_keys=True, indent=2).encode(), manifest["files"])

    def seal_manifest(self, text: bytes, files: Sequence[Any] | None = None) -> None:
        """Put ``text`` in place of the manifest and its sha256 into SHA256SUMS."""
        records = self.manifest()["files"] if files is None else files
        self.write(MANIFEST, text)
        sums = {record["path"]: record["sha256"] for record in records}
        sums[MANIFEST] = sha256_file(self.root / MANIFEST)
        self.write(SUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode())


@dataclass(frozen=True)
class Injection:
    """One fault: ``apply`` makes it, ``files`` are those that a report may name (none: any).

    ``sealed``: the deceiver also repaired all hashes, so `deep` must find it; accidents are for `default` to find.
    ``free``: what a deceiver may change without a trace, because nothing but SHA256SUMS vouches for it.
    """

    region: str
    name: str
    apply: Callable[[Copy], None]
    files: tuple[str, ...] = ()
    sealed: bool = False
    free: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What became of an injection; ``reader`` is stopped, same or wrong; ``problems`` fail the test."""

    injection: Injection
    found: dict[str, bool] = field(default_factory=dict)
    reader: str = "stopped"
    harmless: bool = False
    silent: bool = False
    crashes: list[str] = field(default_factory=list)
    harm: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        wrong = ["wrong data read"] if self.reader == "wrong" and not self.injection.sealed else []
        return [*(["silent"] if self.silent else []), *wrong, *self.crashes, *self.harm]


def read_all(path: Path, tables: Iterable[str], *, described: bool) -> dict[str, Any]:
    """Everything our reader gives, as values that compare by content."""
    artifact = open_artifact(path)
    count, columns = len(artifact), artifact.columns
    samples = [artifact.sample(i) for i in range(count)]
    description = describe(path) if described else {}
    return {
        "content_id": artifact.content_id,
        "columns": [{**column.to_dict(), "fidelity": None} for column in columns],
        "counts": {name: artifact.manifest["counts"][name] for name in COUNTS},
        "stored": [[_bits(artifact.array(i, column.name)) for column in columns] for i in range(count)],
        "values": [_bits(artifact.values(column.name, range(count))) for column in columns],
        "samples": [(s.key, s.label, s.info, {n: _bits(a) for n, a in s.arrays.items()}) for s in samples],
        "classes": artifact.classes,
        "tables": {name: _bits(artifact.table(name)) for name in tables},
        "selection": artifact.selection,
        "description": {name: description.get(name) for name in ("content_id", "shards", "memory", "classes")},
    }


def read_foreign(path: Path) -> list[Any]:
    """The shards' samples as tarfile with numpy, or pyarrow, give them."""
    found: list[Any] = []
    for shard in sorted(path.glob("shards/*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                content = b"" if stream is None else stream.read()
                found.append((member.name, content))
    for shard in sorted(path.glob("parquet/*.parquet")):
        with pq.ParquetFile(shard) as file:
            found.append((file.schema_arrow, file.read().to_pylist()))
    return found


def _bits(array: np.ndarray[Any, Any]) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.str, array.shape, array.tobytes()


class Laboratory:
    """Judges injections into one sound artifact ``original``; works in ``folder``, which it must have to itself.

    Without ``every_level`` only the level runs that promises to find the fault, and `describe` does not.
    """

    def __init__(self, original: Path, folder: Path, *, every_level: bool = True) -> None:
        self.original, self.folder, self.every_level = original, folder, every_level
        self.tables = [record["name"] for record in json.loads((original / MANIFEST).read_bytes())["class_tables"]]
        self.truth, self.foreign = read_all(original, self.tables, described=every_level), read_foreign(original)
        assert all(verify(original, level).ok for level in LEVELS)  # type: ignore[arg-type]

    def judge(self, injection: Injection) -> Outcome:
        """Make the fault in a fresh copy and see what is said of it, and what else happens."""
        outcome = Outcome(injection)
        promised = "deep" if injection.sealed else "default"
        levels = LEVELS if self.every_level else (promised,)
        copy = Copy(self.original, self.folder / "box" / "artifact")
        try:
            injection.apply(copy)
            if injection.sealed and copy.read(MANIFEST) == (self.original / MANIFEST).read_bytes():
                copy.seal()
            before, started = snapshot(self.folder), time.monotonic()
            with watched() as events:
                outcome.found = {level: self._verified(copy, level, outcome) for level in levels}
                outcome.reader = self._read(copy, outcome)
            outcome.harm += [f"did {event}" for event in events]
            outcome.harm += ["changed files"] if snapshot(self.folder) != before else []
            outcome.harm += ["hangs"] if time.monotonic() - started > SLOW else []
            if not outcome.found[promised] and not outcome.crashes:
                outcome.harmless = outcome.reader == "same" and self._foreign_same(copy)
                outcome.silent = not outcome.harmless
        finally:
            shutil.rmtree(self.folder / "box")
        return outcome

    def _verified(self, copy: Copy, level: Any, outcome: Outcome) -> bool:
        try:
            report = verify(copy.root, level)
        except FormatError:
            return True
        except Exception as error:  # noqa: BLE001 - what may leak is the question
            outcome.crashes.append(f"verify {level}: {_short(error)}")
            return False
        files = outcome.injection.files
        return any(not files or fault.path in files for fault in report.faults)

    def _read(self, copy: Copy, outcome: Outcome) -> str:
        try:
            found = read_all(copy.root, self.tables, described=self.every_level)
        except FormatError:
            return "stopped"
        except Exception as error:  # noqa: BLE001
            outcome.crashes.append(f"reader: {_short(error)}")
            return "stopped"
        free = outcome.injection.free
        same = all(found[name] == value for name, value in self.truth.items() if name not in free)
        return "same" if same else "wrong"

    def _foreign_same(self, copy: Copy) -> bool:
        try:
            return read_foreign(copy.root) == self.foreign
        except Exception:  # noqa: BLE001 - another reader that fails proves that the fault does harm
            return False


def _short(error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/formats/" in frame.filename]
    place = f" at formats/{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {str(error)[:80]!r}{place}"


def snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> mode, size, inode and time of change of everything under ``folder``."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            facts = os.lstat(Path(parent, name))
            found[f"{parent}/{name}"] = (facts.st_mode, facts.st_size, facts.st_ino, facts.st_mtime_ns)
    return found


_HARMFUL = ("pickle", "os.", "subprocess", "shutil", "ctypes", "socket", "tempfile")
_READING = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
_LIBRARY = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<frozen ")
_events: list[str] | None = None


@contextmanager
def watched() -> Iterator[list[str]]:
    """Collect what Python itself reports as running code, unpickling, or changing files; nothing may."""
    global _events  # noqa: PLW0603 - an audit hook cannot be taken away again, only muted
    if "d2c-faults" not in sys._xoptions:
        sys._xoptions["d2c-faults"] = True
        sys.addaudithook(_audit)
    _events = found = []
    try:
        yield found
    finally:
        _events = None


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _events is None:
        return
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    # Codecs are loaded when first used: code of the interpreter's own library may run.
    runs = event == "exec" and not getattr(args[0], "co_filename", "").startswith(_LIBRARY)
    if writes or runs or (event.startswith(_HARMFUL) and event not in _READING):
        _events.append(f"{event} {str(args)[:80]}")


def tally(outcomes: Iterable[Outcome]) -> dict[str, Counter[str]]:
    """Region -> counts: faults, found by each level, reader stopped / same / wrong, harmless, silent, crash, harm."""
    rows: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        row = rows.setdefault(outcome.injection.region, Counter())
        row.update(["faults", outcome.reader, *(level for level, found in outcome.found.items() if found)])
        row.update(name for name in ("harmless", "silent") if getattr(outcome, name))
        row.update({"crash": bool(outcome.crashes), "harm": bool(outcome.harm)})
    return rows
