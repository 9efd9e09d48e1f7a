"""Training state on disk: one safetensors file a checkpoint, no pickle, whole or not there at all.

Nothing random needs saving: the loop draws noise, times and batches from (seed, step).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from d2c.ema import Ema
from d2c.errors import D2CError
from d2c.sharding import host_copies, placed
from formats.files import atomic

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class State:
    """``tensors`` by prefixed name (``model.*``, ``ema.*``, ``opt.*``) and small facts (step, run identity)."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """Everything that changes from step to step; an enabled ``scaler`` means fp16."""

    model: nn.Module
    ema: Ema
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def state(self, step: int, facts: Mapping[str, Any]) -> State:
        """The state after ``step`` steps. The optimizer's hyperparameters are the recipe's and not part of it."""
        optimizer = {
            f"{index}.{name}": value
            for index, values in self.optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        tensors = {
            **prefixed(self.model.state_dict(), "model"),
            **prefixed(self.ema.state_dict(), "ema"),
            **prefixed(optimizer, "opt"),
        }
        scaler = {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}
        return State(step, tensors, {**facts, **scaler})

    def load(self, state: State) -> None:
        """The inverse of `state`; its tensors are whole, whether or not these parts are cut up."""
        weights, own = under(state.tensors, "model"), self.model.state_dict()
        self.model.load_state_dict({name: placed(value, own.get(name, value)) for name, value in weights.items()})
        self.ema.load_state_dict(under(state.tensors, "ema"))
        values = self.optimizer.state_dict()
        values["state"] = {}
        parameters = [value for group in self.optimizer.param_groups for value in group["params"]]
        for name, tensor in under(state.tensors, "opt").items():
            index, field = name.split(".")
            values["state"].setdefault(int(index), {})[field] = placed(tensor, parameters[int(index)])
        self.optimizer.load_state_dict(values)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state.facts["scaler"])


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


def save(folder: Path, state: State, keep: int = 2, every: int = 0) -> Path:
    """Write the state as ``<folder>/<step>.safetensors``.

    Older ones are deleted, but for the newest ``keep`` and those of steps that are multiples of ``every`` (0: none).
    """
    path = folder / f"{state.step:08d}{SUFFIX}"
    save_tensors(path, state.tensors, {**state.facts, "step": state.step})
    for old in _all(folder)[:-keep]:
        if not every or int(old.stem) % every:
            old.unlink()
    return path


class Saver:
    """Writes states from a thread, out of copies in host memory, so that training goes on meanwhile.

    Leaving the context waits for the last one. A failure to write is raised by the next call, or there. Of several
    ranks one ``writes``; the others bring what they hold of a state that is cut up.
    """

    def __init__(self, folder: Path, keep: int = 2, every: int = 0, *, writes: bool = True) -> None:
        self._folder, self._keep, self._every, self._writes = folder, keep, every, writes
        self._threads = ThreadPoolExecutor(1)
        self._writing: Future[Path] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        self.wait()

    def save(self, state: State) -> None:
        """Copy ``state`` and have it written (`save`); one at a time."""
        self.wait()
        copied = State(state.step, host_copies(state.tensors, keep=self._writes), state.facts)
        if self._writes:
            self._writing = self._threads.submit(save, self._folder, copied, self._keep, self._every)

    def wait(self) -> None:
        """Until the last state is on the disk."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None


def newest_step(folder: Path) -> int:
    """The step of the newest state, which is not read; 0 where there is none."""
    files = _all(folder)
    return int(files[-1].stem) if files else 0


def latest(folder: Path, device: torch.device | str = "cpu") -> State | None:
    """The newest state, or None where there is none."""
    files = _all(folder)
    if not files:
        return None
    tensors, facts = load_tensors(files[-1], device)
    return State(int(facts["step"]), tensors, facts)


def resume(folder: Path, parts: Parts) -> tuple[int, dict[str, Any]]:
    """Load the newest state into ``parts``, where there is one, and return its step and facts, else 0 and none.

    Nothing keeps the state alive afterwards: it is as large as the weights, averages and moments together.
    """
    state = latest(folder)
    if state is None:
        return 0, {}
    parts.load(state)
    return state.step, state.facts


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix.``, without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The inverse of `under`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if path.stem.isdigit())
