"""Publish an artifact to a folder, an object store or the Hugging Face Hub.

Only what is verified and licensed is sent, and of that only what the other side lacks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from d2c.errors import D2CError, UsageError
from d2c.progress import Progress, Silent
from d2c.remotes import EXTRAS, Folder, Outgoing, Store, Transfer, UnavailableError, open_store, some, verified
from formats.checks import quick_check
from formats.errors import IntegrityError
from formats.hashing import sha256_file
from formats.layout import MANIFEST, SUMS
from formats.report import Fault
from formats.schema import Manifest

_REPLACED = re.compile(r"(shards|parquet)/train-\d+-of-\d+\.(tar|parquet)|(classes|codec)/\w+\.npy")
"""Files of another artifact that `overwrite` removes. Anything else that is in the way is not ours to remove."""


@dataclass(frozen=True, kw_only=True)
class PublishingConfig:
    """What to publish where. ``destination``: a path, ``hf://[datasets/]org/name[@revision]`` or any fsspec URL."""

    artifact: Path
    destination: str
    private: bool = False
    """Make the repository private; hub only."""
    overwrite: bool = False
    """Replace another artifact that is published there, and a card that was edited there; and read again what seems
    to be there already."""


@dataclass(frozen=True)
class Plan:
    """``files`` will be sent in this order and ``stale`` removed; ``skipped`` files are there already.

    ``kept`` are those of `EXTRAS` that are others there, as whoever edited them meant. ``listed`` are all files of the
    artifact, the manifest last; ``there`` is what the destination held, name -> bytes.
    """

    config: PublishingConfig
    store: Store
    content_id: str
    root: str
    bytes: int
    """Of the artifact: of what is sent besides, the manifest and the card, they do not tell."""
    files: list[Outgoing]
    skipped: int
    kept: list[str]
    stale: list[str]
    listed: list[Outgoing]
    there: dict[str, int]


def plan(config: PublishingConfig, progress: Progress | None = None) -> Plan:
    """Verify the artifact, check its licence, and compare it with what lies at the destination; nothing is written.

    Raises:
        IntegrityError: the artifact is damaged.
        UsageError: the destination is no place, or inside the artifact.
        D2CError: a licence field is empty, or the destination holds something else.
    """
    store = open_store(config.destination, private=config.private)
    root = config.artifact
    if isinstance(store, Folder) and store.path.resolve().is_relative_to(root.resolve()):
        raise UsageError(
            "an artifact cannot be published into itself",
            found=config.destination,
            expected=f"a place outside {root}",
            hint="name another folder",
        )
    # What takes a moment comes before what reads every byte.
    checked = quick_check(root)
    if checked.faults or checked.manifest is None:
        raise _damaged(root, checked.faults)
    _check_licence(checked.manifest, root)
    files = [Outgoing(file.path, root / file.path, file.bytes, file.sha256) for file in checked.manifest.files]
    texts = [root / name for name in (*EXTRAS, SUMS, MANIFEST)]
    texts = [path for path in texts if path.is_file() and not path.is_symlink()]
    files += [Outgoing(path.name, path, path.stat().st_size, sha256_file(path)) for path in texts]
    there = store.files()
    stale = _check_place(config, store, there, files)
    report = verified(root, progress or Silent())
    if not report.ok:
        raise _damaged(root, report.faults)
    missing, kept = _needed(config, store, there, files)
    skipped = len(files) - len(missing)
    sums = sha256_file(root / SUMS)
    size = sum(file.bytes for file in checked.manifest.files)
    return Plan(config, store, checked.manifest.content_id, sums, size, missing, skipped, kept, stale, files, there)


def run(plan: Plan, progress: Progress | None = None) -> Transfer:
    """Send what the destination lacks, the manifest last, and look whether all of it is there.

    Raises:
        IntegrityError: a file is not the one that the manifest lists.
        FormatError: another process is pushing there.
        D2CError: the destination refuses, or holds something else since. What it has taken is not sent again.
    """
    progress = progress or Silent()
    store, files = plan.store, plan.files
    if plan.files or plan.stale:
        with store.alone():
            plan = _current(plan)
            files = plan.files
            _send(plan, progress)
    if plan.kept:
        progress.say(f"push: kept as edited there, which --overwrite would replace: {', '.join(plan.kept)}")
    size, skipped = sum(file.bytes for file in files), len(plan.listed) - len(files)
    return Transfer(store.url, plan.content_id, plan.root, plan.bytes, len(files), size, skipped, store.revision)


def _current(plan: Plan) -> Plan:
    """The plan, made anew where somebody was faster."""
    there = plan.store.files()
    if there == plan.there:
        return plan
    stale = _check_place(plan.config, plan.store, there, plan.listed)
    files, kept = _needed(plan.config, plan.store, there, plan.listed)
    return replace(plan, files=files, kept=kept, stale=stale)


def _send(plan: Plan, progress: Progress) -> None:
    store, files = plan.store, plan.files
    arriving = [file for file in plan.listed if file.name not in plan.kept]
    size = sum(file.bytes for file in files)
    with progress.bar("hash", size, "byte") as bar:
        for file in files:
            # Whoever fetches it will hold it against this, and not against the faster xxh3 of `verify`.
            if (found := sha256_file(file.path)) != file.sha256:
                raise IntegrityError(
                    "a file is not the one that the manifest lists",
                    where=file.path,
                    found=f"sha256 {found}",
                    expected=f"sha256 {file.sha256}",
                )
            bar.advance(file.bytes)
    with progress.bar("push", size, "byte") as bar:
        store.send(files, plan.stale, bar.advance, lambda: _check_arrival(plan, arriving[:-1]))
    # Once more with the manifest: of two that push at the same time, the later one sees what both have done.
    _check_arrival(plan, arriving)


def _check_arrival(plan: Plan, files: list[Outgoing]) -> None:
    """The destination holds these files and nothing else that would pass for a part of the artifact."""
    store = plan.store
    there = store.files()
    lost = [file.name for file in _missing(store, there, files)]
    alien = sorted(set(there) - {file.name for file in files} - set(EXTRAS))
    if lost or alien:
        store.withdraw()
        found = [f"missing or different: {some(lost)}"] * bool(lost) + [f"of something else: {some(alien)}"] * bool(
            alien
        )
        raise UnavailableError(
            "the destination did not keep every file as it was sent",
            where=store.url,
            found="; ".join(found),
            expected="the files of this artifact alone",
            hint="wait for any other push there, and run the same command again; "
            "on the hub, look for a .gitignore that leaves them out",
        )


def _check_licence(manifest: Manifest, root: Path) -> None:
    licence = manifest.raw["licence"]
    empty = [name for name in ("spdx", "source_terms") if not str(licence.get(name) or "").strip()]
    if empty:
        raise D2CError(
            "an artifact is published only with its licence",
            where=root / MANIFEST,
            found=f"nothing in {' and '.join(f'licence.{name}' for name in empty)}",
            expected="the SPDX expression of the data's licence, and the address of the source's terms",
            hint=f"d2c repack {root} NEW --licence SPDX --source-terms URL",
        )


def _needed(
    config: PublishingConfig, store: Store, there: dict[str, int], files: list[Outgoing]
) -> tuple[list[Outgoing], list[str]]:
    """What to send; and the extras that are left as they are, since the artifact there is this one already."""
    missing = _missing(store, there, files, closely=config.overwrite)
    # `_check_place` has seen that it is no other.
    kept = [file.name for file in missing if file.name in EXTRAS and file.name in there and MANIFEST in there]
    kept = [] if config.overwrite else kept
    return [file for file in missing if file.name not in kept], kept


def _missing(store: Store, there: dict[str, int], files: list[Outgoing], *, closely: bool = False) -> list[Outgoing]:
    return [file for file in files if there.get(file.name) != file.bytes or not store.holds(file, closely=closely)]


def _check_place(config: PublishingConfig, store: Store, there: dict[str, int], files: list[Outgoing]) -> list[str]:
    """The files there that are not this artifact's and that ``overwrite`` may remove."""
    if not config.overwrite and MANIFEST in there and _missing(store, there, files[-1:]):
        raise D2CError(
            "another artifact is published there",
            where=store.url,
            hint="choose another place, or add --overwrite to replace it",
        )
    stale = sorted(set(there) - {file.name for file in files} - set(EXTRAS))
    kept = [name for name in stale if not config.overwrite or not _REPLACED.fullmatch(name)]
    if kept:
        also = "" if config.overwrite else "; --overwrite removes those of another artifact"
        raise D2CError(
            "there are files that are not part of this artifact where its own would go",
            where=store.url,
            found=some(kept),
            hint=f"choose another place, or remove them{also}",
        )
    return stale


def _damaged(root: Path, faults: list[Fault]) -> IntegrityError:
    return IntegrityError(
        "a damaged artifact is not published",
        where=root,
        found=some(faults),
        hint=f"run `d2c verify {root}` for the whole list",
    )
