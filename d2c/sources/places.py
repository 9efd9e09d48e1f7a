"""Files in a local folder or in any store that fsspec reaches; a store's files are read by ranges, never copied."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from d2c.errors import D2CError
from d2c.remotes.objects import connect, store_error
from d2c.sources.base import file_stamp
from formats.errors import FormatError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
# What stores call the identity of a file's content: S3 and HTTP; Google and Azure; the Hugging Face hub.
_TAGS = ("ETag", "etag", "blob_id")


@dataclass(frozen=True)
class DataFile:
    """One file: ``path`` as its file system names it; ``stamp`` changes when the content does; ``fs`` None: local."""

    path: str
    stamp: str
    size: int
    fs: Any = None

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.path).stem

    def open(self) -> Any:
        """What pyarrow reads from; every caller gets its own."""
        return self.path if self.fs is None else _Ranges(self)


class _Ranges(io.RawIOBase):
    """A remote file of which exactly the bytes asked for are fetched."""

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._file.size if size < 0 else min(self._at + size, self._file.size)
        if end <= self._at:
            return b""
        with told(self._file.path):
            data = bytes(self._file.fs.cat_file(self._file.path, start=self._at, end=end))
        if len(data) != end - self._at:
            raise D2CError(
                "the store does not give the bytes that it is asked for",
                where=self._file.path,
                found=f"{len(data)} bytes",
                expected=f"bytes {self._at} to {end} of {self._file.size}",
                hint="the file has changed, or the store cannot read in ranges: copy it to a local folder",
            )
        self._at = end
        return data


def url_scheme(location: str | Path) -> str | None:
    """The scheme of a URL, None for a local path."""
    match = _URL.fullmatch(str(location))
    return match[1] if match else None


def local_file(path: Path) -> DataFile:
    """A file of the local file system. Raises: OSError."""
    seen = path.stat()
    return DataFile(str(path), file_stamp(seen.st_size, seen.st_mtime_ns), seen.st_size)


def remote_files(url: str) -> dict[str, DataFile]:
    """Relative path -> file, of the object at ``url`` or of those up to one folder below it; sorted.

    Raises:
        UsageError: the scheme is unknown.
        D2CError: the package that reaches such a store is not installed, or the store refuses.
    """
    scheme = url_scheme(url)
    assert scheme is not None
    fs, root = connect(url, scheme)
    root = root.rstrip("/")
    with told(url):
        # A web server that is asked what lies below a file sends the file.
        found = {} if root.endswith(".parquet") and fs.isfile(root) else fs.find(root, maxdepth=2, detail=True)
        # Nothing found may also mean that there is no such bucket; asking for the object itself says which.
        found = found or {root: fs.info(root)}
        files = {
            path: DataFile(path, _stamp(fs, path, facts), int(facts["size"]), fs)
            for path, facts in found.items()
            if facts["type"] == "file"
        }
    return {path.removeprefix(root).lstrip("/"): file for path, file in sorted(files.items())}


def _stamp(fs: Any, path: str, facts: Mapping[str, Any]) -> str:
    tag = next((facts[name] for name in _TAGS if facts.get(name)), None)
    if tag is not None:
        return f"{facts['size']}\t{tag}"
    try:
        return f"{facts['size']}\t{fs.modified(path)}"
    except NotImplementedError as error:
        raise D2CError(
            "this store does not say when a file changes",
            where=path,
            expected="an ETag or a time of modification, without which a changed file goes unnoticed",
            hint="copy the files to a local folder",
        ) from error


@contextmanager
def told(where: str) -> Iterator[None]:
    """A store's own failures become ours, so that a network that is down is no damaged picture."""
    try:
        yield
    except FormatError:
        raise
    except Exception as error:
        raise store_error(error, where) from error
