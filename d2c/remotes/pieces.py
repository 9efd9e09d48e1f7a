"""One file from a store, in pieces: resumed after a kill, asked for again after a failure, believed by its hash."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from d2c.remotes.base import NotThereError, Store, UnavailableError
from formats.errors import IntegrityError
from formats.hashing import sha256_file
from formats.schema import FileRecord

BACKOFF = (1.0, 4.0, 16.0)
"""Seconds to wait before a store that failed to answer is asked again for the same piece."""

PIECE = 1 << 23
"""Bytes asked for at once: what a kill can lose of a download."""

_MOST_TEXT = 1 << 26
"""Bytes of a manifest, its sums or a card: they are held in memory before anything is known of them."""

_AGAIN = "its publisher must push it again, with --overwrite; what arrived intact is kept for the next try"


def download(store: Store, file: FileRecord, part: Path, advance: Callable[[int], None]) -> None:
    """Bring ``file`` to ``part``, going on with what is there; ``advance`` is told the bytes of each piece.

    Raises:
        IntegrityError: it is missing, or arrived twice with another hash than the manifest's.
        D2CError: the store refuses.
    """
    found = ""
    for _ in range(2):
        _append(store, file, part, advance)
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
        hint=_AGAIN,
    )


def _append(store: Store, file: FileRecord, part: Path, advance: Callable[[int], None]) -> None:
    """Append to ``part`` until it is as long as the file, or the store's copy ends."""
    with part.open("ab") as stream:
        start, asked = stream.tell(), 0
        while start < file.bytes:
            asked = min(PIECE, file.bytes - start)
            try:
                piece = _patiently(store, file.path, start, start + asked)
            except NotThereError as error:
                raise IntegrityError(
                    "a file of this artifact is missing",
                    where=error.where,
                    found=error.what,
                    expected=f"{file.bytes:,} bytes with sha256 {file.sha256}",
                    hint=_AGAIN,
                ) from error
            stream.write(piece)
            stream.flush()
            start += len(piece)
            advance(len(piece))
            if len(piece) < asked:
                break
        os.fsync(stream.fileno())


def _patiently(store: Store, name: str, start: int, end: int) -> bytes:
    """`Store.read`, asked again where trying again may help."""
    for pause in BACKOFF:
        with contextlib.suppress(UnavailableError):
            return store.read(name, start, end)
        time.sleep(pause)
    return store.read(name, start, end)


def read_text(store: Store, name: str, *, patiently: bool = False) -> bytes:
    """The whole of a small file.

    Raises:
        IntegrityError: it is not small.
        NotThereError: it is missing.
    """
    end = _MOST_TEXT + 1
    data = _patiently(store, name, 0, end) if patiently else store.read(name, 0, end)
    if len(data) > _MOST_TEXT:
        where, most = f"{store.url}/{name}", f"at most {_MOST_TEXT:,} bytes"
        raise IntegrityError("this file is too large for what it is", where=where, expected=most)
    return data
