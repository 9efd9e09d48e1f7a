"""The format's name and version, and the rule for which artifacts this reader accepts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from formats.errors import FormatError, VersionError

FORMAT_NAME = "d2c-artifact"
FORMAT_VERSION = "1.0"
READER_FEATURES = frozenset({"codec:i8-chrms1", "codec:u4-chrms1", "container:recipe"})
"""Entries of ``required_features`` that this reader understands."""

_NUMBER = re.compile(r"[0-9]{1,9}")
_MAJOR = int(FORMAT_VERSION.partition(".")[0])
_UPGRADE = "read it with a newer release: pip install -U d2c-toolkit"


def check_version(manifest: dict[str, Any], where: str | Path) -> None:
    """Accept every minor version of this reader's major whose required features are all known.

    Raises:
        FormatError: the manifest names no format, another format, or a version that is not ``major.minor``.
        VersionError: another major version, or a required feature that this reader lacks.
    """
    declared = manifest.get("format")
    name = declared.get("name") if isinstance(declared, dict) else None
    if not isinstance(declared, dict) or name != FORMAT_NAME:
        raise FormatError(
            "this manifest is not that of a d2c artifact",
            where=where,
            found=f"format name {name!r}",
            expected=repr(FORMAT_NAME),
            hint="give the folder that `d2c pack` wrote",
        )
    version = declared.get("version")
    parts = version.split(".") if isinstance(version, str) else []
    if len(parts) != 2 or not all(_NUMBER.fullmatch(part) for part in parts):
        raise FormatError("the format version is unreadable", where=where, found=repr(version), expected="major.minor")
    if int(parts[0]) != _MAJOR:
        raise VersionError(
            "this artifact has another major version of the format",
            where=where,
            found=f"format {version}",
            expected=f"format {_MAJOR}.x",
            hint=_UPGRADE,
        )
    required = declared.get("required_features", [])
    if not isinstance(required, list) or not all(isinstance(feature, str) for feature in required):
        raise FormatError("required_features is not a list of names", where=where, found=repr(required))
    unknown = sorted(set(required) - READER_FEATURES)
    if unknown:
        raise VersionError(
            "this artifact needs features that this reader lacks",
            where=where,
            found=", ".join(unknown),
            expected=", ".join(sorted(READER_FEATURES)),
            hint=_UPGRADE,
        )
