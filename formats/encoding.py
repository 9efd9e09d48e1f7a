"""From a sample to bytes, checked on the way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from formats.errors import FormatError
from formats.hashing import parse_json, xxh3
from formats.schema import Column, check_key

LONGEST_INFO = 8192
"""Bytes of a sample's facts."""


@dataclass(frozen=True)
class Sample:
    """One sample: key, class number, one array per column as stored, and small facts that JSON can hold.

    Facts that are None are not stored: every sample of an artifact has the same facts.
    """

    key: str
    label: int
    arrays: dict[str, np.ndarray[Any, Any]]
    info: dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """A sample as it is written: ``info`` is JSON, ``payloads`` the little-endian C-order bytes of every column."""

    key: str
    label: int
    info: str
    payloads: list[bytes]
    digests: list[str]


def encode(sample: Sample, columns: Sequence[Column]) -> Encoded:
    """Check a sample against the columns and turn it into bytes; nothing is cast.

    Raises:
        FormatError: key, label, columns, dtype, shape, a value that is not finite, or facts that are no JSON.
    """
    check_key(sample.key)
    where = f"sample {sample.key}"
    if not 0 <= sample.label < 2**31:
        raise FormatError("a label is a class number", where=where, found=sample.label, expected="0 or more")
    names = [column.name for column in columns]
    if set(sample.arrays) != set(names):
        raise FormatError(
            "a sample has other arrays than the columns",
            where=where,
            found=sorted(sample.arrays),
            expected=sorted(names),
        )
    payloads = [_payload(sample.arrays[column.name], column, where) for column in columns]
    try:
        known = {name: value for name, value in sample.info.items() if value is not None}
        info = json.dumps(known, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        length = len(info.encode())
    except (TypeError, ValueError) as error:
        raise FormatError("a sample's facts are not JSON", where=where, found=str(error)) from error
    if length > LONGEST_INFO:
        raise FormatError(
            "a sample's facts are too long", where=where, found=f"{length} bytes", expected=f"at most {LONGEST_INFO:,}"
        )
    return Encoded(sample.key, int(sample.label), info, payloads, [xxh3(payload) for payload in payloads])


def parse_info(text: str, key: str) -> dict[str, Any]:
    """The facts of sample ``key`` from their JSON.

    Raises:
        FormatError: they are no JSON object, or one of them is null.
    """
    try:
        facts = parse_json(text)
    except ValueError as error:
        raise FormatError("a sample's facts are not JSON", where=f"sample {key}", found=str(error)) from error
    if not isinstance(facts, dict) or None in facts.values():
        raise FormatError("a sample's facts are no object of values", where=f"sample {key}", found=text[:80])
    return facts


def finite(array: np.ndarray[Any, Any]) -> bool:
    """Whether no value is NaN or infinite; numbers of other kinds never are."""
    if array.dtype == np.float16:
        # numpy widens each half; their bits say it 5 to 8 times faster.
        return bool((array.view(np.uint16) & 0x7FFF).max() < 0x7C00)
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _payload(array: np.ndarray[Any, Any], column: Column, where: str) -> bytes:
    if array.dtype != column.numpy or array.shape != column.shape:
        raise FormatError(
            f"the array of column {column.name} is not as declared",
            where=where,
            found=f"{array.dtype} {array.shape}",
            expected=f"{column.numpy} {column.shape}",
        )
    if not finite(array):
        raise FormatError(
            f"column {column.name} holds NaN or infinity",
            where=where,
            hint="find what made it: a value beyond 65504 does not fit f2",
        )
    return np.ascontiguousarray(array).tobytes()
