"""Which store a URL or path means."""

from __future__ import annotations

import re
from pathlib import Path

from d2c.errors import UsageError
from d2c.remotes.base import Store, shown
from d2c.remotes.folder import Folder
from d2c.remotes.hub import MAIN, Hub
from d2c.remotes.objects import ObjectStore

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(.*)", re.DOTALL)
_HUB = re.compile(r"hf://(?:datasets/)?((?!(?:datasets|models|spaces|buckets)/)[\w.-]+/[\w.-]+)(?:@(.+))?")


def open_store(url: str, *, private: bool = False) -> Store:
    """The store at a URL or local path; nothing is contacted yet.

    Raises:
        UsageError: the URL is malformed, or its scheme unknown.
        D2CError: the package that reaches such a store is not installed.
    """
    if not url.strip():
        raise UsageError(
            "a place is needed where the artifact is, or goes", found="nothing", expected="a URL or a path"
        )
    match = _URL.fullmatch(url)
    scheme = match[1] if match else "file"
    if match and not (match[2].startswith("//") and match[2].strip("/")):
        raise UsageError(
            "this looks like a URL and is none",
            found=shown(url),
            expected=f"{scheme}://...",
            hint=f"for a local path write ./{shown(url)}",
        )
    if private and scheme != "hf":
        raise UsageError("--private is for the hub", found=shown(url), expected="hf://ORG/NAME")
    if scheme == "hf":
        named = _HUB.fullmatch(url)
        if not named:
            raise UsageError("this names no data set on the hub", found=url, expected="hf://ORG/NAME[@REVISION]")
        return Hub(url, named[1], named[2] or MAIN, private)
    if scheme == "file":
        return Folder(Path(url.removeprefix("file://")))
    return ObjectStore(url, scheme)
