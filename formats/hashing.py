"""Digests. xxh3-128 finds accidents at memory speed; sha256 is what other tools check and what resists tampering."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

_CHUNK = 1 << 20


def xxh3(data: bytes | memoryview) -> str:
    """xxh3-128 of ``data`` as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def xxh3_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, read in 1 MiB pieces."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, as coreutils prints it."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def xxh3_array(array: np.ndarray[Any, Any]) -> str:
    """xxh3-128 of an array's C-order little-endian bytes; its dtype and shape are not part of it."""
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return xxh3(np.ascontiguousarray(little).tobytes())


def xxh3_lines(lines: Iterable[str]) -> str:
    """xxh3-128 over ``lines``, each ended by a newline, in the order given."""
    digest = xxhash.xxh3_128()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, UTF-8, two-space indent and one final LF: the same bytes for the same value.

    Raises:
        ValueError: ``value`` holds NaN or infinity, which JSON cannot express.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def parse_json(text: str) -> Any:
    """Parse JSON as every reader takes it, so that `canonical_json` can express the value.

    Raises:
        ValueError: this is no JSON, or names a field twice, or holds NaN, infinity or half a surrogate pair, or is
            nested too deeply.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        # Readers differ in which of the two they take.
        raise ValueError("an object names something twice")
    return found


def xxh3_json(value: Any) -> str:
    """xxh3-128 of the canonical JSON of ``value``."""
    return xxh3(canonical_json(value).encode())
