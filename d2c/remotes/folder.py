"""A folder on this machine or one it mounts."""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from d2c.errors import D2CError
from d2c.remotes.base import EXTRAS, NotThereError, Outgoing, filling
from formats.files import atomic
from formats.hashing import sha256_file
from formats.layout import MANIFEST, OWNED, SUMS
from formats.lock import WriterLock

_TORN = re.compile(r"\.tmp-\d+-.+")
"""What a kill leaves of a write (`formats.files.atomic`)."""


@dataclass(frozen=True)
class Folder:
    """Files below ``path``."""

    path: Path
    revision: None = None

    @property
    def url(self) -> str:
        return str(self.path)

    def files(self) -> dict[str, int]:
        if os.path.lexists(self.path) and not self.path.is_dir():
            found = "a link that leads nowhere" if self.path.is_symlink() else "a file"
            raise D2CError(
                "something else is where the folder should be",
                where=self.path,
                found=found,
                hint="choose another place",
            )
        paths = [self.path / name for name in (MANIFEST, SUMS, *EXTRAS, *OWNED)]
        paths += [path for folder in OWNED for path in (self.path / folder).rglob("*")]
        for path in paths:
            # What lies behind a link is not the artifact's: nothing there is written or removed.
            if path.is_symlink():
                raise D2CError(
                    "a symbolic link is where the artifact's own files would go",
                    where=path,
                    found=f"a link to {path.readlink()}",
                    hint="remove the link, or choose another place",
                )
        files = [path for path in paths if path.is_file() and not _TORN.fullmatch(path.name)]
        return {path.relative_to(self.path).as_posix(): path.stat().st_size for path in files}

    def holds(self, file: Outgoing, *, closely: bool = False) -> bool:
        return sha256_file(self.path / file.name) == file.sha256

    def read(self, name: str, start: int, end: int) -> bytes:
        try:
            with (self.path / name).open("rb") as stream:
                stream.seek(start)
                return stream.read(end - start)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotThereError("there is no such file", where=self.path / name, hint=self._meant()) from error
        except IsADirectoryError as error:
            raise NotThereError("a folder is where the file should be", where=self.path / name) from error

    def _meant(self) -> str | None:
        parent = self.path.parent
        beside = [path.name for path in parent.iterdir()] if not self.path.exists() and parent.is_dir() else []
        close = difflib.get_close_matches(self.path.name, beside, n=1, cutoff=0.6)
        return f"did you mean {parent / close[0]}?" if close else None

    @contextmanager
    def alone(self) -> Iterator[None]:
        place = self.path.resolve()
        lock = WriterLock(Path(f"{place}.lock"))
        try:
            self.files()
            for path in [place, *(place / folder for folder in OWNED)]:
                for torn in path.glob(".tmp-*") if path == place else path.rglob(".tmp-*"):
                    if _TORN.fullmatch(torn.name) and torn.is_file():
                        torn.unlink()
            yield
        finally:
            lock.release()

    def send(
        self, files: Sequence[Outgoing], stale: Sequence[str], sent: Callable[[int], None], check: Callable[[], None]
    ) -> None:
        if any(file.name == MANIFEST for file in files):
            self.withdraw()
        for name in stale:
            (self.path / name).unlink()
        for file in files:
            with filling(self.path / file.name), atomic(self.path / file.name) as temporary:
                shutil.copyfile(file.path, temporary)
            sent(file.bytes)

    def withdraw(self) -> None:
        (self.path / MANIFEST).unlink(missing_ok=True)
