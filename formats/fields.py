"""Typed access to JSON from outside; every miss is an error that names file, field, found and expected."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.errors import FormatError

_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
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

    def _get(self, name: str, kind: type, expected: str) -> Any:
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
        if value < 0:
            raise FormatError(f"the field {self.prefix}.{name} is negative", where=self.where, found=value)
        return value

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

    def path(self, name: str) -> str:
        """A relative path whose parts never start with a dot, so it cannot leave the artifact."""
        return self._matching(name, _PATH, "a relative path of plain names")

    def _matching(self, name: str, pattern: re.Pattern[str], expected: str) -> str:
        value = self.text(name)
        if not pattern.fullmatch(value):
            raise FormatError(f"the field {name} is malformed", where=self.where, found=value[:80], expected=expected)
        return value
