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
from dataclasses import dataclass, field
from pathlib import Path

from d2c.errors import D2CError, UsageError
from d2c.progress import Progress, Silent
from d2c.remotes import (
    EXTRAS,
    Folder,
    NotThereError,
    Store,
    Transfer,
    download,
    filling,
    open_store,
    read_text,
    some,
    verified,
)
from formats.errors import FormatError, IntegrityError, VersionError
from formats.files import read_json, remove_tree, sync_directory, write_bytes, write_json
from formats.guards import check_place
from formats.hashing import sha256_file
from formats.layout import LICENSE, MANIFEST, README, SUMS, unlisted
from formats.lock import WriterLock
from formats.schema import FileRecord, Manifest, parse_manifest
from formats.swap import recover, swap
from formats.version import FORMAT_NAME

_DIGEST = re.compile(r"[0-9a-f]{64}")
_ORIGIN = "origin.json"


@dataclass(frozen=True, kw_only=True)
class FetchingConfig:
    """What to fetch where. ``root`` is the sha256 of SHA256SUMS, from somebody who is trusted."""

    source: str
    out: Path
    root: str | None = None
    overwrite: bool = False
    """Replace another artifact at ``out``. Its LICENSE, unless the same one comes, is kept beside ``out``."""

    def __post_init__(self) -> None:
        if self.root is not None and not _DIGEST.fullmatch(self.root):
            raise UsageError("this is no sha256", found=f"--root {self.root}", expected="64 hex digits, in lower case")


@dataclass(frozen=True)
class Plan:
    """What would be fetched, and why; ``reasons`` is empty where the artifact is there already, intact."""

    config: FetchingConfig
    place: Path
    """``config.out`` without links."""
    store: Store
    manifest: Manifest
    root: str
    reasons: list[str]
    texts: dict[str, bytes] = field(repr=False)
    """The manifest and SHA256SUMS as they arrived."""

    def missing(self) -> list[FileRecord]:
        """The files that lie with their hash neither at ``out`` nor in an unfinished pull."""
        places = (_partial(self.place) / "artifact", self.place)
        return [file for file in self.manifest.files if not any(_intact(place / file.path, file) for place in places)]


def plan(config: FetchingConfig, progress: Progress | None = None) -> Plan:
    """Fetch and check SHA256SUMS and the manifest, and look at what lies at ``out``; nothing is written.

    Raises:
        IntegrityError: SHA256SUMS is not the one that ``config.root`` names, or the manifest does not fit it.
        VersionError: the artifact is newer than this reader.
        UsageError: ``out`` is the folder that one works in, or inside the source.
        D2CError: there is no artifact at the source, or something else at ``out``.
    """
    store = open_store(config.source)
    place = _place(config, store)
    try:
        sums = read_text(store, SUMS)
        found = hashlib.sha256(sums).hexdigest()
        if config.root not in (None, found):
            raise IntegrityError(
                "this is not the artifact that was asked for",
                where=f"{store.url}/{SUMS}",
                found=f"sha256 {found}",
                expected=f"sha256 {config.root}",
                hint="ask its publisher which root this version has",
            )
        text = read_text(store, MANIFEST)
    except NotThereError as error:
        raise D2CError(
            "there is no published artifact here",
            where=store.url,
            found=f"{error.what}: {error.where}",
            hint=error.hint or "check the address; if its push was interrupted, the same push finishes it",
        ) from error
    manifest = _parsed(text, sums, f"{store.url}/{MANIFEST}")
    texts = {MANIFEST: text, SUMS: sums}
    _check_place(config, place, manifest, texts)
    return Plan(config, place, store, manifest, found, _reasons(place, texts, progress or Silent()), texts)


def run(plan: Plan, progress: Progress | None = None) -> Transfer:
    """Fetch what is missing, verify the whole, and put it at its place. A killed run goes on where it stopped.

    Raises:
        IntegrityError: a file arrived twice with another hash than the manifest's, or the whole does not verify.
        FormatError: another process writes to ``out``.
        D2CError: the source refuses, or something else has come to lie at ``out``.
    """
    progress, config, place = progress or Silent(), plan.config, plan.place
    fetched: list[FileRecord] = []
    if plan.reasons or _unfinished(_partial(place)):
        with filling(config.out):
            lock = WriterLock(Path(f"{place}.lock"))
            try:
                recover(place)
                if plan.reasons:
                    _check_place(config, place, plan.manifest, plan.texts)
                    fetched = _fetch_all(plan, progress)
                    _finish(plan, progress)
                remove_tree(_partial(place))
            finally:
                lock.release()
    return Transfer(
        place=str(config.out),
        content_id=plan.manifest.content_id,
        root=plan.root,
        bytes=sum(file.bytes for file in plan.manifest.files),
        files=len(fetched),
        transfer_bytes=sum(file.bytes for file in fetched),
        skipped=len(plan.manifest.files) - len(fetched),
        revision=plan.store.revision,
    )


def _place(config: FetchingConfig, store: Store) -> Path:
    """Where the artifact will lie: a link to a folder stays one, and what it leads to is replaced."""
    place = check_place(config.out)
    if isinstance(store, Folder) and place.is_relative_to(store.path.resolve()):
        raise UsageError(
            "an artifact cannot be pulled into itself", found=config.out, expected=f"a place outside {store.path}"
        )
    return place


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


def _reasons(place: Path, texts: dict[str, bytes], progress: Progress) -> list[str]:
    if not place.is_dir() or not any(place.iterdir()):
        return ["an interrupted pull is resumed"] if (_partial(place) / _ORIGIN).exists() else ["not there yet"]
    if not _same(place, texts):
        return ["another artifact is replaced"]
    report = verified(place, progress)
    return [] if report.ok else [f"damaged: {some(report.faults)}"]


def _same(place: Path, texts: dict[str, bytes]) -> bool:
    """Whether ``place`` holds a copy of this artifact, sound or damaged."""
    return any((place / name).is_file() and (place / name).read_bytes() == text for name, text in texts.items())


def _check_place(config: FetchingConfig, place: Path, manifest: Manifest, texts: dict[str, bytes]) -> None:
    """Nothing but an artifact is replaced; without ``overwrite`` only a copy of the same one."""
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    same = place.is_dir() and _same(place, texts)
    listed = {file.path for file in manifest.files}
    there = listed if same else _listed(place)
    # Without a manifest that can be read, what has only this artifact's names was a copy of it, or of one like it.
    torn = there is None and any((place / name).is_file() for name in listed)
    extra = unlisted(place, (there or listed) | set(EXTRAS), everything=True) if place.is_dir() else [place.name]
    if extra or (there is None and not torn):
        raise D2CError(
            "there are files here that are not part of the artifact" if same else "there is something else here",
            where=config.out,
            found=some(extra) if extra else f"no {MANIFEST} of a d2c artifact",
            expected="a new or empty folder, or an artifact with nothing else in its folder",
            hint="move it away, or choose another folder",
        )
    if not same and not config.overwrite:
        raise D2CError(
            "what is left of an artifact is here" if torn else "another artifact is here already",
            where=config.out,
            found=f"no {MANIFEST} that can be read" if torn else None,
            hint="move it away, choose another folder, or add --overwrite to replace it",
        )


def _listed(place: Path) -> set[str] | None:
    """The files that a d2c manifest lists, of whatever version; None where there is none that can be read."""
    try:
        raw = read_json(place / MANIFEST)
        return {str(file["path"]) for file in raw["files"]} if raw["format"]["name"] == FORMAT_NAME else None
    except (FormatError, OSError, KeyError, TypeError):
        return None


def _partial(place: Path) -> Path:
    return Path(f"{place}.partial-pull")


def _unfinished(partial: Path) -> bool:
    """Whether a pull was stopped here, be it before its first file was whole or after its last."""
    if not partial.exists():
        return False
    return (partial / _ORIGIN).exists() or all(path.name.startswith(".tmp-") for path in partial.iterdir())


def _fetch_all(plan: Plan, progress: Progress) -> list[FileRecord]:
    """Bring every file into the partial folder, from the nearest place that has it; return those that were fetched."""
    partial = _partial(plan.place)
    if partial.exists() and not _unfinished(partial):
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
            if _intact(plan.place / file.path, file):
                _link(plan.place / file.path, target)
            else:
                needed.append(file)
    parts = [partial / "parts" / file.sha256 for file in needed]
    done = sum(part.stat().st_size for part in parts if part.exists())
    (partial / "parts").mkdir(exist_ok=True)
    with progress.bar("pull", sum(file.bytes for file in needed), "byte", done) as bar:
        for file, part in zip(needed, parts, strict=True):
            download(plan.store, file, part, bar.advance)
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


def _finish(plan: Plan, progress: Progress) -> None:
    """Add what no hash covers, remove what an older version left, verify, and swap; the manifest comes last."""
    artifact, place = _partial(plan.place) / "artifact", plan.place
    texts = {SUMS: plan.texts[SUMS]}
    for name in EXTRAS:
        with contextlib.suppress(NotThereError):
            texts[name] = read_text(plan.store, name, patiently=True)
    if _same(place, plan.texts):
        # What a person may have written is kept.
        texts |= {name: (place / name).read_bytes() for name in (README, LICENSE) if (place / name).is_file()}
    elif (place / LICENSE).is_file() and (old := (place / LICENSE).read_bytes()) != texts.get(LICENSE):
        write_bytes(Path(f"{place}.{LICENSE}-{hashlib.sha256(old).hexdigest()[:8]}"), old)
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
            hint=f"its publisher must pack it anew; what was fetched is in {artifact.parent}",
        )
    swap(artifact, place)
