"""Fetch a published artifact and believe nothing of it.

Every file is held against the manifest's sha256 when it arrives, the whole is verified, and only then does it appear at
its place. Until then it lies in ``<out>.partial-pull/``: ``artifact/`` (what becomes ``out``), ``parts/`` (downloads
that have begun, named by the sha256 they will have) and ``origin.json``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from d2c.errors import D2CError, UsageError
from d2c.progress import Progress, Silent
from d2c.remotes import EXTRAS, NotThereError, Store, Transfer, UnavailableError, open_store, some, verified
from formats.errors import FormatError, IntegrityError, VersionError
from formats.files import sync_directory, write_bytes, write_json
from formats.guards import check_replaceable
from formats.hashing import sha256_file
from formats.layout import MANIFEST, SUMS, unlisted
from formats.lock import WriterLock
from formats.schema import FileRecord, Manifest, parse_manifest
from formats.swap import recover, swap

BACKOFF = (1.0, 4.0, 16.0)
"""Seconds to wait before a store that failed to answer is asked again for the same piece."""

PIECE = 1 << 23
"""Bytes asked for at once: what a kill can lose of a download."""

_MOST_TEXT = 1 << 26
"""Bytes of a manifest, its sums or a card: they are held in memory before anything is known of them."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_ORIGIN = "origin.json"


@dataclass(frozen=True, kw_only=True)
class FetchingConfig:
    """What to fetch where. ``root`` is the sha256 of SHA256SUMS, from somebody who is trusted."""

    source: str
    out: Path
    root: str | None = None
    overwrite: bool = False
    """Replace another artifact at ``out``."""

    def __post_init__(self) -> None:
        if self.root is not None and not _DIGEST.fullmatch(self.root):
            raise UsageError("this is no sha256", found=f"--root {self.root}", expected="64 hex digits, in lower case")


@dataclass(frozen=True)
class Plan:
    """What would be fetched, and why; ``reasons`` is empty where the artifact is there already, intact."""

    config: FetchingConfig
    store: Store
    manifest: Manifest
    root: str
    reasons: list[str]
    texts: dict[str, bytes] = field(repr=False)
    """The manifest and SHA256SUMS as they arrived."""

    def missing(self) -> list[FileRecord]:
        """The files that lie with their hash neither at ``out`` nor in an unfinished pull."""
        places = (_partial(self.config.out) / "artifact", self.config.out)
        return [file for file in self.manifest.files if not any(_intact(place / file.path, file) for place in places)]


def plan(config: FetchingConfig, progress: Progress | None = None) -> Plan:
    """Fetch and check SHA256SUMS and the manifest, and look at what lies at ``out``; nothing is written.

    Raises:
        IntegrityError: SHA256SUMS is not the one that ``config.root`` names, or the manifest does not fit it.
        VersionError: the artifact is newer than this reader.
        D2CError: there is no artifact at the source, or something else at ``out``.
    """
    store = open_store(config.source)
    try:
        sums = _text(store, SUMS)
        found = hashlib.sha256(sums).hexdigest()
        if config.root not in (None, found):
            raise IntegrityError(
                "this is not the artifact that was asked for",
                where=f"{store.url}/{SUMS}",
                found=f"sha256 {found}",
                expected=f"sha256 {config.root}",
                hint="ask its publisher which root this version has",
            )
        text = _text(store, MANIFEST)
    except NotThereError as error:
        raise D2CError(
            "there is no published artifact here",
            where=store.url,
            found=f"{error.what}: {error.where}",
            hint=error.hint or "check the address; if its push was interrupted, the same push finishes it",
        ) from error
    manifest = _parsed(text, sums, f"{store.url}/{MANIFEST}")
    texts = {MANIFEST: text, SUMS: sums}
    _check_place(config, manifest, texts)
    return Plan(config, store, manifest, found, _reasons(config.out, texts, progress or Silent()), texts)


def run(plan: Plan, progress: Progress | None = None) -> Transfer:
    """Fetch what is missing, verify the whole, and put it at its place. A killed run goes on where it stopped.

    Raises:
        IntegrityError: a file arrived twice with another hash than the manifest's, or the whole does not verify.
        FormatError: another process writes to ``out``.
        D2CError: the source refuses, or something else has come to lie at ``out``.
    """
    progress, config = progress or Silent(), plan.config
    fetched: list[FileRecord] = []
    if plan.reasons:
        place = config.out.absolute()
        lock = WriterLock(place.with_name(f"{place.name}.lock"))
        try:
            recover(place)
            _check_place(config, plan.manifest, plan.texts)
            fetched = _fetch_all(plan, progress)
            _finish(plan, place, progress)
        finally:
            lock.release()
    return Transfer(
        place=str(config.out),
        content_id=plan.manifest.content_id,
        root=plan.root,
        files=len(fetched),
        bytes=sum(file.bytes for file in fetched),
        skipped=len(plan.manifest.files) - len(fetched),
        revision=plan.store.revision,
    )


def _text(store: Store, name: str) -> bytes:
    data = store.read(name, 0, _MOST_TEXT + 1)
    if len(data) > _MOST_TEXT:
        where, most = f"{store.url}/{name}", f"at most {_MOST_TEXT:,} bytes"
        raise IntegrityError("this file is too large for what it is", where=where, expected=most)
    return data


def _parsed(text: bytes, sums: bytes, where: str) -> Manifest:
    """The manifest, once SHA256SUMS vouches for it and lists the same files; parsing lets only plain paths through."""
    lines = [line.partition("  ") for line in sums.decode("utf-8", "replace").splitlines()]
    expected = {name: digest for digest, _, name in lines}
    found = hashlib.sha256(text).hexdigest()
    if expected.get(MANIFEST) != found:
        raise IntegrityError(
            f"the manifest is not the one that {SUMS} lists",
            where=where,
            found=f"sha256 {found}",
            expected=f"sha256 {expected.get(MANIFEST, 'in a line of its own')}",
            hint="it is damaged, or is being replaced just now: try again later",
        )
    try:
        manifest = parse_manifest(json.loads(text), where)
    except (ValueError, RecursionError) as error:
        raise IntegrityError("the manifest is not valid JSON", where=where, found=str(error)) from error
    except VersionError:
        raise
    except FormatError as error:
        raise IntegrityError(error.what, where=error.where, found=error.found, expected=error.expected) from error
    listed = {file.path: file.sha256 for file in manifest.files} | {MANIFEST: found}
    if listed != expected:
        wrong = sorted({name for name, _ in listed.items() ^ expected.items()})
        raise IntegrityError(f"the manifest and {SUMS} list different files", where=where, found=some(wrong))
    return manifest


def _reasons(out: Path, texts: dict[str, bytes], progress: Progress) -> list[str]:
    if not out.is_dir() or not any(out.iterdir()):
        return ["an interrupted pull is resumed"] if (_partial(out) / _ORIGIN).exists() else ["not there yet"]
    if not _same(out, texts):
        return ["another artifact is replaced"]
    report = verified(out, progress)
    return [] if report.ok else [f"damaged: {some(report.faults)}"]


def _same(out: Path, texts: dict[str, bytes]) -> bool:
    """Whether ``out`` holds a copy of this artifact, sound or damaged."""
    return any((out / name).is_file() and (out / name).read_bytes() == text for name, text in texts.items())


def _check_place(config: FetchingConfig, manifest: Manifest, texts: dict[str, bytes]) -> None:
    out = config.out
    if out.is_dir() and _same(out, texts):
        listed = {file.path for file in manifest.files} | set(EXTRAS)
        extra = unlisted(out, listed, everything=True)
        if extra:
            raise D2CError(
                "there are files here that are not part of the artifact",
                where=out,
                found=some(extra),
                hint="move them away, or choose another folder",
            )
        return
    check_replaceable(out)
    if not config.overwrite and out.is_dir() and any(out.iterdir()):
        raise D2CError(
            "another artifact is here already",
            where=out,
            hint="choose another folder, or add --overwrite to replace it",
        )


def _partial(out: Path) -> Path:
    return out.absolute().with_name(f"{out.absolute().name}.partial-pull")


def _fetch_all(plan: Plan, progress: Progress) -> list[FileRecord]:
    """Bring every file into the partial folder, from the nearest place that has it; return those that were fetched."""
    partial = _partial(plan.config.out)
    if partial.exists() and any(partial.iterdir()) and not (partial / _ORIGIN).exists():
        raise D2CError(
            "there is something that is no unfinished pull where the download would go",
            where=partial,
            hint="move it away, or choose another output folder",
        )
    write_json(partial / _ORIGIN, {"source": plan.store.url, "revision": plan.store.revision})
    needed = []
    for file in plan.manifest.files:
        target = partial / "artifact" / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not _intact(target, file):
            target.unlink(missing_ok=True)
            if _intact(plan.config.out / file.path, file):
                _link(plan.config.out / file.path, target)
            else:
                needed.append(file)
    parts = [partial / "parts" / file.sha256 for file in needed]
    done = sum(part.stat().st_size for part in parts if part.exists())
    (partial / "parts").mkdir(exist_ok=True)
    with progress.bar("pull", sum(file.bytes for file in needed), "byte", done) as bar:
        for file, part in zip(needed, parts, strict=True):
            _fetch(plan.store, file, part, bar.advance)
            os.replace(part, partial / "artifact" / file.path)
    return needed


def _intact(path: Path, file: FileRecord) -> bool:
    if not path.is_file() or path.is_symlink() or path.stat().st_size != file.bytes:
        return False
    return sha256_file(path) == file.sha256


def _link(there: Path, here: Path) -> None:
    try:
        os.link(there, here)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(there, here)


def _fetch(store: Store, file: FileRecord, part: Path, advance: Callable[[int], None]) -> None:
    found = ""
    for _ in range(2):
        _download(store, file, part, advance)
        digest = sha256_file(part)
        if digest == file.sha256:
            return
        found = f"{part.stat().st_size:,} bytes with sha256 {digest}"
        part.unlink()
    raise IntegrityError(
        "a file does not arrive as the manifest describes it",
        where=f"{store.url}/{file.path}",
        found=found,
        expected=f"{file.bytes:,} bytes with sha256 {file.sha256}",
        hint="its publisher must push it again; what arrived intact is kept for the next try",
    )


def _download(store: Store, file: FileRecord, part: Path, advance: Callable[[int], None]) -> None:
    """Append to ``part`` until it is as long as the file, or the store's copy ends."""
    with part.open("ab") as stream:
        start, asked = stream.tell(), 0
        while start < file.bytes:
            asked = min(PIECE, file.bytes - start)
            try:
                piece = _read(store, file.path, start, start + asked)
            except NotThereError as error:
                raise IntegrityError("a file of this artifact is missing", where=error.where) from error
            stream.write(piece)
            stream.flush()
            start += len(piece)
            advance(len(piece))
            if len(piece) < asked:
                break
        os.fsync(stream.fileno())


def _read(store: Store, name: str, start: int, end: int) -> bytes:
    for pause in BACKOFF:
        with contextlib.suppress(UnavailableError):
            return store.read(name, start, end)
        time.sleep(pause)
    return store.read(name, start, end)


def _finish(plan: Plan, place: Path, progress: Progress) -> None:
    """Add what no hash covers, remove what an older version left, verify, and swap; the manifest comes last."""
    partial = _partial(plan.config.out)
    artifact = partial / "artifact"
    texts = {SUMS: plan.texts[SUMS]}
    for name in EXTRAS:
        with contextlib.suppress(NotThereError):
            texts[name] = _text(plan.store, name)
    wanted = {artifact / file.path for file in plan.manifest.files}
    for path in list(artifact.rglob("*")):
        if path not in wanted and not path.is_dir():
            path.unlink()
    for name, text in texts.items():
        write_bytes(artifact / name, text)
    for folder in {path.parent for path in wanted}:
        sync_directory(folder)
    write_bytes(artifact / MANIFEST, plan.texts[MANIFEST])
    report = verified(artifact, progress)
    if not report.ok:
        raise IntegrityError(
            "every file arrived as published, and yet this is no sound artifact",
            where=plan.store.url,
            found=some(report.faults),
            hint=f"its publisher must pack it anew; what was fetched is in {partial}",
        )
    swap(artifact, place)
    shutil.rmtree(partial / "parts")
    (partial / _ORIGIN).unlink()
    partial.rmdir()
