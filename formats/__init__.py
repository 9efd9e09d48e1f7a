"""What is on disk: the d2c artifact, its writer, reader and verification. Needs numpy, pyarrow and xxhash only."""

from __future__ import annotations

from formats.artifact import Artifact, open_artifact
from formats.errors import FormatError, IntegrityError, VersionError
from formats.verify import verify

__all__ = [
    "D2C_TOOLKIT",
    "Artifact",
    "FormatError",
    "IntegrityError",
    "VersionError",
    "open_artifact",
    "verify",
]

D2C_TOOLKIT = True
"""Tells this package from the unrelated distribution that installs one of the same name."""
