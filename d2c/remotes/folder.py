"""A folder on this machine or one it mounts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2c.errors import D2CError
from d2c.remotes.base import EXTRAS, NotThereError, Outgoing
from formats.files import atomic
from formats.hashing import sha256_file
from formats.layout import MANIFEST, OWNED, SUMS


@dataclass(frozen=True)
class Folder:
    """Files below ``path``."""

    path: Path
    revision: None = None

    @property
    def url(self) -> str:
        return str(self.path)

    def files(self) -> dict[str, int]:
        if self.path.exists() and not self.path.is_dir():
            raise D2CError("a file is where the folder should be", where=self.path, hint="choose another place")
        names = [self.path / name for name in (MANIFEST, SUMS, *EXTRAS)]
        names += [path for folder in OWNED for path in (self.path / folder).rglob("*")]
        return {path.relative_to(self.path).as_posix(): path.stat().st_size for path in names if path.is_file()}

    def holds(self, file: Outgoing) -> bool:
        return sha256_file(self.path / file.name) == file.sha256

    def read(self, name: str, start: int, end: int) -> bytes:
        try:
            with (self.path / name).open("rb") as stream:
                stream.seek(start)
                return stream.read(end - start)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotThereError("there is no such file", where=self.path / name) from error

    def send(self, files: Sequence[Outgoing], stale: Sequence[str], sent: Callable[[int], None]) -> None:
        if any(file.name == MANIFEST for file in files):
            (self.path / MANIFEST).unlink(missing_ok=True)
        for name in stale:
            (self.path / name).unlink()
        for file in files:
            with atomic(self.path / file.name) as temporary:
                shutil.copyfile(file.path, temporary)
            sent(file.bytes)
