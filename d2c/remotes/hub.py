"""A data set on the Hugging Face Hub, or on what HF_ENDPOINT names, through huggingface_hub's own request layer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

from d2c.errors import D2CError
from d2c.remotes.base import EXTRAS, NotThereError, Outgoing, UnavailableError, first_line, known_inside
from formats.errors import FormatError
from formats.layout import MANIFEST, OWNED, SUMS

MAIN = "main"
_CHUNK = 1 << 20
_PATIENCE = 60.0
"""Seconds without a byte after which a request is made anew."""


class Hub:
    """A data set repository. A push is one commit, so readers of any revision see a whole artifact or none."""

    def __init__(self, url: str, repo: str, revision: str, private: bool) -> None:
        from huggingface_hub import HfApi

        self.url, self._repo, self._asked, self._private = url, repo, revision, private
        self._api = HfApi()

    @property
    def revision(self) -> str | None:
        return self._head

    @cached_property
    def _head(self) -> str:
        """The commit that the revision names, asked once so that all files come from the same one."""
        with self._told():
            info = self._api.dataset_info(self._repo)
        if self._private and not info.private:
            raise D2CError(
                "the data set is on the hub already, and public",
                where=self.url,
                expected="a private one",
                hint="choose another name, make it private on the hub, or leave --private out",
            )
        with self._told():
            return str(self._api.dataset_info(self._repo, revision=self._asked).sha)

    @cached_property
    def _tree(self) -> dict[str, Any]:
        try:
            return self._listed(self._head)
        except NotThereError:
            return {}

    def _listed(self, revision: str) -> dict[str, Any]:
        ours = (MANIFEST, SUMS, *EXTRAS)
        with self._told():
            tree = self._api.list_repo_tree(self._repo, recursive=True, revision=revision, repo_type="dataset")
            files = {entry.path: entry for entry in tree if hasattr(entry, "size")}
        return {name: entry for name, entry in files.items() if name in ours or name.split("/")[0] in OWNED}

    def files(self) -> dict[str, int]:
        return {name: entry.size for name, entry in self._tree.items()}

    def holds(self, file: Outgoing, *, closely: bool = False) -> bool:
        # The hub names content by its hash, which it has computed itself.
        entry = self._tree[file.name]
        if entry.lfs is not None:
            return bool(entry.lfs.sha256 == file.sha256)
        # Small files lie in git itself, which names them by this.
        content = file.path.read_bytes()
        return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())  # noqa: S324

    def read(self, name: str, start: int, end: int) -> bytes:
        from huggingface_hub import hf_hub_url

        # The package exports these without saying so in its types.
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        url = hf_hub_url(self._repo, name, repo_type="dataset", revision=self._head, endpoint=self._api.endpoint)
        # Unasked compression would make the server ignore the range.
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        # A connection that breaks is for the caller to try again: in the middle of a body the library cannot.
        options: dict[str, Any] = {"headers": headers, "timeout": _PATIENCE, "retry_on_exceptions": ()}
        with self._told(name), http_stream_backoff("GET", url, **options) as response:
            if response.status_code == 416:  # the file ends before the range
                return b""
            if response.is_error:
                response.close()  # what it says stands in its headers; its body may be endless
            hf_raise_for_status(response)
            return _taken(response.iter_raw(_CHUNK), 0 if response.status_code == 206 else start, end - start)

    def alone(self) -> nullcontext[None]:
        # A commit names its parent: the hub refuses the later one of two.
        return nullcontext()

    def send(
        self, files: Sequence[Outgoing], stale: Sequence[str], sent: Callable[[int], None], check: Callable[[], None]
    ) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        parent = self._head if self._tree else None
        where: dict[str, Any] = {"repo_type": "dataset", "revision": self._asked}
        with self._told():
            self._api.create_repo(self._repo, repo_type="dataset", private=self._private or None, exist_ok=True)
            if self._asked != MAIN and not self._asked.startswith("refs/"):
                self._api.create_branch(self._repo, branch=self._asked, repo_type="dataset", exist_ok=True)
            # A new branch begins with what the main one holds.
            inherited = () if self._tree else self._listed(self._asked)
            doomed = sorted({*stale, *inherited} - {file.name for file in files})
            additions = []
            for file in files:
                # What a killed push has sent is known to the hub by its hash, and is not sent again.
                addition = CommitOperationAdd(file.name, str(file.path))
                self._api.preupload_lfs_files(self._repo, [addition], **where)
                additions.append(addition)
                sent(file.bytes)
            commit = self._api.create_commit(
                self._repo,
                [*additions, *(CommitOperationDelete(name) for name in doomed)],
                commit_message="Publish a d2c artifact",
                parent_commit=parent,
                **where,
            )
        # From here on this is about what was made, whatever others commit after it.
        self._head = commit.oid
        self._tree = self._listed(commit.oid)

    def withdraw(self) -> None:
        """Nothing: what another commit holds is not ours to change."""

    @contextmanager
    def _told(self, name: str = "") -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise _hub_error(error, f"{self.url}/{name}" if name else self.url) from error


def _taken(body: Iterable[bytes], skip: int, size: int) -> bytes:
    """The bytes [skip, skip + size) of a body, of which no more than that is read, however much there is."""
    data = bytearray()
    for piece in body:
        data += piece[skip:]
        skip -= min(skip, len(piece))
        if len(data) >= size:
            break
    return bytes(data[:size])


def _hub_error(error: Exception, where: str) -> FormatError:
    from huggingface_hub import errors

    if known := known_inside(error):
        return known
    cause: BaseException = error
    while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
        cause = cause.__cause__
    status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may do this"
    if isinstance(cause, errors.GatedRepoError) or status == 403:
        return D2CError("the hub denies access", where=where, found=first_line(cause), hint=login)
    if isinstance(cause, errors.RevisionNotFoundError):
        return NotThereError("the data set has no such revision", where=where, hint="check what stands behind the @")
    if isinstance(cause, errors.RepositoryNotFoundError):
        return NotThereError(
            "there is no such data set on the hub, or it is private", where=where, hint=f"check the name; or {login}"
        )
    if isinstance(cause, errors.EntryNotFoundError):
        return NotThereError("there is no such file", where=where)
    if status == 401:
        return D2CError("the hub does not know you", where=where, found=first_line(cause), hint=login)
    if isinstance(cause, ValueError):
        return D2CError("the hub refuses this", where=where, found=first_line(cause))
    return UnavailableError(
        "the hub did not do as asked",
        where=where,
        found=first_line(cause),
        hint="check the network and HF_ENDPOINT, then run the same command again: what was transferred is kept",
    )
