"""One writer at a time: an advisory lock that dies with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

from formats.errors import FormatError

_PAUSE = 0.05
_WITHOUT = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class WriterLock:
    """An exclusive lock on ``path``, taken within ``patience`` seconds or not at all; its file goes with `release`.

    Raises:
        FormatError: another process holds it, or the file system knows no locks.
    """

    def __init__(self, path: Path, patience: float = 0.0) -> None:
        self.path = path
        deadline = time.monotonic() + patience
        self._descriptor: int | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        while self._descriptor is None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(descriptor, 20, 0).decode("ascii", "replace")
                os.close(descriptor)
                if time.monotonic() < deadline:
                    time.sleep(_PAUSE)
                    continue
                raise FormatError(
                    "another process is writing here",
                    where=path,
                    found=f"held by process {holder or 'unknown'}",
                    hint="wait until it is done, or write somewhere else",
                ) from error
            except OSError as error:
                os.close(descriptor)
                if error.errno not in _WITHOUT:
                    raise
                raise FormatError(
                    "files cannot be locked on this file system, so two writers could meet unseen",
                    where=path,
                    found=error.strerror,
                    hint="mount it with locks (flock), or write on another file system",
                ) from error
            if self._current(descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode("ascii"), 0)
                self._descriptor = descriptor
            else:
                os.close(descriptor)

    def _current(self, descriptor: int) -> bool:
        # A holder that has just finished may have removed the file between our open and our lock.
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
