"""Publish an artifact to a folder, an object store or the Hugging Face Hub.

Only what is verified and licensed is sent, and of that only what the other side lacks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from d2c.errors import D2CError
from d2c.progress import Progress, Silent
from d2c.remotes import EXTRAS, Outgoing, Store, Transfer, UnavailableError, open_store, some, verified
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
    """Replace another artifact that is published there."""


@dataclass(frozen=True)
class Plan:
    """``files`` will be sent in this order and ``stale`` removed; ``skipped`` files are there already."""

    config: PublishingConfig
    store: Store
    content_id: str
    root: str
    files: list[Outgoing]
    skipped: int
    stale: list[str]


def plan(config: PublishingConfig, progress: Progress | None = None) -> Plan:
    """Verify the artifact, check its licence, and compare it with what lies at the destination; nothing is written.

    Raises:
        IntegrityError: the artifact is damaged.
        D2CError: a licence field is empty, or the destination holds something else.
    """
    store = open_store(config.destination, private=config.private)
    root = config.artifact
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
    stale = sorted(set(there) - {file.name for file in files} - set(EXTRAS))
    _check_place(config, store, there, files[-1], stale)
    report = verified(root, progress or Silent())
    if not report.ok:
        raise _damaged(root, report.faults)
    missing = [file for file in files if not _held(store, there, file)]
    skipped = len(files) - len(missing)
    return Plan(config, store, checked.manifest.content_id, sha256_file(root / SUMS), missing, skipped, stale)


def run(plan: Plan, progress: Progress | None = None) -> Transfer:
    """Send what the destination lacks, the manifest last, and look whether all of it is there.

    Raises:
        IntegrityError: a file is not the one that the manifest lists.
        D2CError: the destination refuses. What it has taken is not sent again.
    """
    progress, store = progress or Silent(), plan.store
    size = sum(file.bytes for file in plan.files)
    if plan.files or plan.stale:
        with progress.bar("hash", size, "byte") as bar:
            for file in plan.files:
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
            store.send(plan.files, plan.stale, bar.advance)
        there = open_store(plan.config.destination).files()
        lost = [file.name for file in plan.files if there.get(file.name) != file.bytes]
        if lost:
            raise UnavailableError(
                "the destination did not keep every file",
                where=store.url,
                found=f"missing: {some(lost)}",
                hint="run the same command again; on the hub, look for a .gitignore that leaves them out",
            )
    return Transfer(store.url, plan.content_id, plan.root, len(plan.files), size, plan.skipped, store.revision)


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


def _held(store: Store, there: dict[str, int], file: Outgoing) -> bool:
    return there.get(file.name) == file.bytes and store.holds(file)


def _check_place(
    config: PublishingConfig, store: Store, there: dict[str, int], manifest: Outgoing, stale: list[str]
) -> None:
    if not config.overwrite and MANIFEST in there and not _held(store, there, manifest):
        raise D2CError(
            "another artifact is published there",
            where=store.url,
            hint="choose another place, or add --overwrite to replace it",
        )
    kept = [name for name in stale if not config.overwrite or not _REPLACED.fullmatch(name)]
    if kept:
        also = "" if config.overwrite else "; --overwrite removes those of another artifact"
        raise D2CError(
            "there are files that are not part of this artifact where its own would go",
            where=store.url,
            found=some(kept),
            hint=f"choose another place, or remove them{also}",
        )


def _damaged(root: Path, faults: list[Fault]) -> IntegrityError:
    return IntegrityError(
        "a damaged artifact is not published",
        where=root,
        found=some(faults),
        hint=f"run `d2c verify {root}` for the whole list",
    )
