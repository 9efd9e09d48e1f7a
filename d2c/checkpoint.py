"""Training state on disk: one safetensors file a checkpoint, no pickle, whole or not there at all.

Nothing random needs saving: the loop draws noise, times and batches from (seed, step).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from d2c.errors import D2CError
from formats.files import atomic

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class State:
    """``tensors`` by prefixed name (``model.*``, ``ema.*``, ``opt.*``) and small facts (step, run identity)."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
    """Write tensors and JSON facts as safetensors, whole or not at all."""
    contiguous = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        # One metadata entry: safetensors writes several in no fixed order, and equal states must give equal bytes.
        save_file(contiguous, temporary, metadata={"d2c": json.dumps(facts or {}, sort_keys=True)})
        # safetensors makes its files private; others who read the folder should read the weights too.
        temporary.chmod(0o644)


def load_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `save_tensors`.

    Raises:
        D2CError: the file is not readable safetensors.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dict)
            return tensors, json.loads((stream.metadata() or {}).get("d2c", "{}"))
    except (SafetensorError, OSError) as error:
        raise D2CError(
            "this file holds no readable weights", where=path, found=str(error), expected="a safetensors file"
        ) from error


def save(folder: Path, state: State, keep: int = 2) -> Path:
    """Write the state as ``<folder>/<step>.safetensors`` and delete all but the newest ``keep``."""
    path = folder / f"{state.step:08d}{SUFFIX}"
    save_tensors(path, state.tensors, {**state.facts, "step": state.step})
    for old in _all(folder)[:-keep]:
        old.unlink()
    return path


def latest(folder: Path, device: torch.device | str = "cpu") -> State | None:
    """The newest state, or None where there is none."""
    files = _all(folder)
    if not files:
        return None
    tensors, facts = load_tensors(files[-1], device)
    return State(int(facts["step"]), tensors, facts)


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix.``, without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The inverse of `under`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if path.stem.isdigit())
