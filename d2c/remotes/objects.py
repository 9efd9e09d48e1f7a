"""Any store that fsspec reaches: s3:// with the extra ``s3``, others with their own packages."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from d2c.errors import D2CError, UsageError
from d2c.remotes.base import EXTRAS, NotThereError, Outgoing, UnavailableError, first_line, known_inside
from formats.errors import FormatError
from formats.layout import MANIFEST, OWNED, SUMS

_CHUNK = 1 << 24


class ObjectStore:
    """Files below a prefix.

    Raises:
        UsageError: the scheme is unknown.
        D2CError: the package that reaches such a store is not installed.
    """

    revision = None

    def __init__(self, url: str, scheme: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        # S3 gives no sha256 of what was sent in pieces, so it is kept with the object; elsewhere files are read again.
        self._labelled = scheme in ("s3", "s3a")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, skip_instance_cache=True, use_listings_cache=False)
        except ImportError as error:
            install = 'pip install "d2c-toolkit[s3]"' if self._labelled else str(error)
            raise D2CError(f"{scheme}:// needs a package that is not installed", where=url, hint=install) from error
        except ValueError as error:
            known = ["s3", "hf", "file", *fsspec.available_protocols()]
            close = difflib.get_close_matches(scheme.lower(), known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}://?" if close else None
            raise UsageError(
                "this URL cannot be opened", found=url, expected="s3://, hf:// or a path", hint=hint
            ) from error

    def files(self) -> dict[str, int]:
        found = {}
        with self._told(self.url):
            for folder in OWNED:
                for path, facts in self._fs.find(self._place(folder), detail=True).items():
                    found[path.removeprefix(f"{self._root}/")] = int(facts["size"])
        for name in (MANIFEST, SUMS, *EXTRAS):
            with contextlib.suppress(NotThereError), self._told(f"{self.url}/{name}"):
                found[name] = int(self._fs.info(self._place(name))["size"])
        return found

    def holds(self, file: Outgoing) -> bool:
        with self._told(f"{self.url}/{file.name}"):
            label = self._fs.metadata(self._place(file.name)).get("sha256") if self._labelled else None
        if label is None:
            digest = hashlib.sha256()
            for start in range(0, file.bytes, _CHUNK):
                digest.update(self.read(file.name, start, min(start + _CHUNK, file.bytes)))
            label = digest.hexdigest()
        return bool(label == file.sha256)

    def read(self, name: str, start: int, end: int) -> bytes:
        with self._told(f"{self.url}/{name}"):
            return bytes(self._fs.cat_file(self._place(name), start=start, end=end))

    def send(self, files: Sequence[Outgoing], stale: Sequence[str], sent: Callable[[int], None]) -> None:
        if any(file.name == MANIFEST for file in files):
            stale = [MANIFEST, *stale]
        for name in stale:
            with self._told(f"{self.url}/{name}"):
                if self._fs.exists(self._place(name)):
                    self._fs.rm_file(self._place(name))
        for file in files:
            label = {"Metadata": {"sha256": file.sha256}} if self._labelled else {}
            with self._told(f"{self.url}/{file.name}"):
                self._fs.put_file(str(file.path), self._place(file.name), **label)
            sent(file.bytes)

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _told(self, where: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise _store_error(error, where) from error


def _store_error(error: Exception, where: str) -> FormatError:
    """What a store's own error means. S3's travels as the cause of the one that s3fs raises."""
    if known := known_inside(error):
        return known
    answer = getattr(error.__cause__, "response", {})
    if answer.get("Error", {}).get("Code") == "NoSuchBucket":
        return D2CError("there is no such bucket", where=where, hint="check the name, or make the bucket first")
    if isinstance(error, FileNotFoundError):
        return NotThereError("there is no such file", where=where)
    if isinstance(error, PermissionError):
        return D2CError(
            "the store denies access",
            where=where,
            found=first_line(error),
            hint="check the credentials and what they may do",
        )
    if "Credential" in type(error).__name__ or type(error).__name__ == "ProfileNotFound":
        return D2CError(
            "there are no credentials for this store",
            where=where,
            found=first_line(error),
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public one, FSSPEC_S3_ANON=1",
        )
    return UnavailableError(
        "the store did not do as asked",
        where=where,
        found=first_line(error),
        hint="check the address and the network, then run the same command again: what was transferred is kept",
    )
