"""Typed access to JSON from outside; every miss is an error that names file, field, found and expected."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.errors import FormatError

_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_PATH = re.compile(rf"{_PART}(/{_PART}){{0,7}}")
_LARGEST = 2**63 - 1
_WIDEST = sys.float_info.max
_CONTENT_ID = re.compile(r"d2c1-xxh3-128:[0-9a-f]{32}")
_HEX = {32: re.compile(r"[0-9a-f]{32}"), 64: re.compile(r"[0-9a-f]{64}")}


@dataclass(frozen=True)
class Fields:
    """One JSON object ``record`` of the file ``where``; ``prefix`` is its place in the document.

    Raises:
        FormatError: every method, where the field is missing or of another kind.
    """

    record: Mapping[str, Any]
    where: str | Path
    prefix: str

    def _get(self, name: str, kind: type | tuple[type, ...], expected: str) -> Any:
        value = self.record.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            full = f"{self.prefix}.{name}" if self.prefix else name
            found = repr(value)[:80] if name in self.record else "nothing"
            raise FormatError(f"the field {full} is wrong", where=self.where, found=found, expected=expected)
        return value

    def text(self, name: str) -> str:
        return str(self._get(name, str, "a string"))

    def number(self, name: str) -> int:
        value = int(self._get(name, int, "an integer"))
        if not 0 <= value <= _LARGEST:
            what = f"the field {self.prefix}.{name} is out of range"
            raise FormatError(what, where=self.where, found=str(value)[:80], expected="0 or more, in 64 bits")
        return value

    def real(self, name: str) -> float:
        value = self._get(name, (int, float), "a number")
        if not abs(value) < _WIDEST:
            what = f"the field {self.prefix}.{name} is not finite"
            raise FormatError(what, where=self.where, found=str(value)[:80])
        return float(value)

    def texts(self, name: str) -> list[str]:
        values = list(self._get(name, list, "a list of strings"))
        return [Fields({name: value}, self.where, self.prefix).text(name) for value in values]

    def mapping(self, name: str) -> dict[str, Any]:
        return dict(self._get(name, dict, "an object"))

    def records(self, name: str) -> list[dict[str, Any]]:
        values = list(self._get(name, list, "a list of objects"))
        return [Fields({name: value}, self.where, self.prefix).mapping(name) for value in values]

    def numbers(self, name: str) -> list[int]:
        values = list(self._get(name, list, "a list of integers"))
        return [Fields({name: value}, self.where, self.prefix).number(name) for value in values]

    def digest(self, name: str, digits: int) -> str:
        return self._matching(name, _HEX[digits], f"{digits} hex digits")

    def content_id(self, name: str) -> str:
        return self._matching(name, _CONTENT_ID, "d2c1-xxh3-128: and 32 hex digits")

    def path(self, name: str) -> str:
        """A relative path whose parts never start with a dot, so it cannot leave the artifact; short enough to open."""
        return self._matching(name, _PATH, "a relative path of plain names")

    def _matching(self, name: str, pattern: re.Pattern[str], expected: str) -> str:
        value = self.text(name)
        if not pattern.fullmatch(value):
            raise FormatError(f"the field {name} is malformed", where=self.where, found=value[:80], expected=expected)
        return value
