"""What the stages' frozen configurations share: identity (what decides the bytes) and its comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_EXECUTION = "execution"


def execution(default: Any = dataclasses.MISSING) -> Any:
    """A field that says where and how fast a job runs, never what it computes: it is not part of the identity."""
    return dataclasses.field(default=default, metadata={_EXECUTION: True})


def identity(config: Any) -> dict[str, Any]:
    """The fields of a frozen config that decide its result, as plain JSON values."""
    return {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if not field.metadata.get(_EXECUTION)
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each field that differs: ``name: old -> new``."""
    return [
        f"{name}: {_short(old.get(name))} -> {_short(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return identity(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:18]}...{text[-18:]}"
