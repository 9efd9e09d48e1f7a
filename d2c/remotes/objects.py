"""Any store that fsspec reaches: s3:// with the extra ``s3``, others with their own packages."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from d2c.errors import D2CError, UsageError
from d2c.remotes.base import EXTRAS, NotThereError, Outgoing, UnavailableError, first_line, known_inside, shown
from formats.errors import FormatError
from formats.layout import MANIFEST, OWNED, SUMS

_CHUNK = 1 << 24
_PART = 1 << 26
"""Bytes of a part of an upload in parts: S3 makes the tag of such an object from the hashes of its parts."""
_MOST_PARTS = 10_000


def connect(url: str, scheme: str) -> tuple[Any, str]:
    """The file system behind ``url``, and the place in it that the URL names.

    Raises:
        UsageError: the scheme is unknown.
        D2CError: the package that reaches such a store is not installed.
    """
    import fsspec

    options = {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        fs, root = fsspec.core.url_to_fs(url.rstrip("/"), **options)
    except ImportError as error:
        install = 'pip install "d2c-toolkit[s3]"' if scheme in ("s3", "s3a") else str(error)
        raise D2CError(f"{scheme}:// needs a package that is not installed", where=shown(url), hint=install) from error
    except ValueError as error:
        known = ["s3", "hf", "file", *fsspec.available_protocols()]
        close = difflib.get_close_matches(scheme.lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}://?" if close else None
        raise UsageError(
            "this URL cannot be opened", found=shown(url), expected="s3://, hf:// or a path", hint=hint
        ) from error
    except Exception as error:
        # Some stores, such as ftp, connect as soon as they are named.
        raise store_error(error, shown(url)) from error
    return fs, root


class ObjectStore:
    """Files below a prefix.

    Raises:
        UsageError: the scheme is unknown.
        D2CError: the package that reaches such a store is not installed.
    """

    revision = None

    def __init__(self, url: str, scheme: str) -> None:
        self.url = shown(url).rstrip("/")
        self._s3, self._http = scheme in ("s3", "s3a"), scheme in ("http", "https")
        self._tags: dict[str, str] = {}
        self._fs, self._root = connect(url, scheme)

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

    def holds(self, file: Outgoing, *, closely: bool = False) -> bool:
        if self._s3 and not closely:
            with self._told(f"{self.url}/{file.name}"):
                bucket, key, _ = self._fs.split_path(self._place(file.name))
                facts = self._fs.call_s3("head_object", Bucket=bucket, Key=key)
            # S3 itself makes an object's tag from the MD5 of its bytes: equal tags are believed.
            if facts.get("ETag", "").strip('"') == self._tag(file):
                return True
            # Under such encryption the tag says nothing of the bytes: what was noted at the upload is believed.
            if "aws:kms" in facts.get("ServerSideEncryption", "") or "SSECustomerAlgorithm" in facts:
                return bool(facts["Metadata"].get("sha256") == file.sha256)
        # Nothing else that a store says of a file is believed.
        digest = hashlib.sha256()
        for start in range(0, file.bytes, _CHUNK):
            digest.update(self.read(file.name, start, min(start + _CHUNK, file.bytes)))
        return digest.hexdigest() == file.sha256

    def _tag(self, file: Outgoing) -> str:
        if file.sha256 not in self._tags:
            self._tags[file.sha256] = s3_tag(file.path, _part_size(file.bytes))
        return self._tags[file.sha256]

    def read(self, name: str, start: int, end: int) -> bytes:
        with self._told(f"{self.url}/{name}"):
            try:
                if not (self._s3 or self._http):
                    return bytes(self._fs.cat_file(self._place(name), start=start, end=end))[: end - start]
                from fsspec.asyn import sync

                piece = self._s3_piece if self._s3 else self._http_piece
                return bytes(sync(self._fs.loop, piece, self._place(name), start, end))
            except Exception as error:
                if _past_the_end(error):
                    return b""
                raise

    async def _s3_piece(self, place: str, start: int, end: int) -> bytes:
        bucket, key, _ = self._fs.split_path(place)
        answer = await self._fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")
        body = answer["Body"]
        try:
            whole = answer["ResponseMetadata"]["HTTPStatusCode"] == 200
            return await _taken(body.read, start if whole else 0, end - start)
        finally:
            body.close()

    async def _http_piece(self, place: str, start: int, end: int) -> bytes:
        session = await self._fs.set_session()
        # Unasked compression would make the server ignore the range.
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        async with session.get(self._fs.encode_url(place), headers=headers) as answer:
            self._fs._raise_not_found_for_status(answer, place)
            return await _taken(answer.content.read, start if answer.status == 200 else 0, end - start)

    def alone(self) -> nullcontext[None]:
        # There are no locks on such stores: `send` and its caller look again at what lies there.
        return nullcontext()

    def send(
        self, files: Sequence[Outgoing], stale: Sequence[str], sent: Callable[[int], None], check: Callable[[], None]
    ) -> None:
        if any(file.name == MANIFEST for file in files):
            self.withdraw()
        for name in stale:
            self._remove(name)
        for file in files:
            if file.name == MANIFEST:
                check()
            options: dict[str, Any] = {}
            if self._s3:
                options = {"Metadata": {"sha256": file.sha256}, "chunksize": _part_size(file.bytes)}
            with self._told(f"{self.url}/{file.name}"):
                self._fs.put_file(str(file.path), self._place(file.name), **options)
            sent(file.bytes)

    def withdraw(self) -> None:
        self._remove(MANIFEST)

    def _remove(self, name: str) -> None:
        with self._told(f"{self.url}/{name}"):
            if self._fs.exists(self._place(name)):
                self._fs.rm_file(self._place(name))

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _told(self, where: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise store_error(error, where) from error


async def _taken(read: Callable[[int], Awaitable[bytes]], skip: int, size: int) -> bytes:
    """The bytes [skip, skip + size) of a body, of which no more than that is read, however much there is."""
    data = bytearray()
    while len(data) < size and (piece := await read(min(_CHUNK, skip + size - len(data)))):
        data += piece[skip:]
        skip -= min(skip, len(piece))
    return bytes(data[:size])


def _part_size(size: int) -> int:
    return max(_PART, -(-size // _MOST_PARTS))


def s3_tag(path: Path, part: int) -> str:
    """The tag that S3 gives to a file sent in parts of ``part`` bytes; below two parts it is sent as a whole."""
    if path.stat().st_size < 2 * part:
        part = max(1, path.stat().st_size)
    with path.open("rb") as stream:
        sums = [hashlib.md5(piece, usedforsecurity=False) for piece in iter(lambda: stream.read(part), b"")]
    if len(sums) < 2:
        return (sums or [hashlib.md5(usedforsecurity=False)])[0].hexdigest()
    return f"{hashlib.md5(b''.join(s.digest() for s in sums), usedforsecurity=False).hexdigest()}-{len(sums)}"


def _past_the_end(error: Exception) -> bool:
    """Whether a store says that a file ends before the bytes that were asked for."""
    answer = getattr(error.__cause__, "response", None) or {}
    return getattr(error, "status", None) == 416 or answer.get("Error", {}).get("Code") in ("InvalidRange", "416")


def store_error(error: Exception, where: str) -> FormatError:
    """What a store's own error means. S3's travels as the cause of the one that s3fs raises."""
    if known := known_inside(error):
        return known
    where = shown(where)
    answer = getattr(error.__cause__, "response", None) or {}
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
