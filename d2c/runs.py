"""A training run's folder: which files it has, what it was asked for, its log and its costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2c.config import differences
from d2c.errors import D2CError
from formats.files import read_json, write_bytes, write_json

MODEL, RUN, WEIGHTS, TEXT = "model.json", "run.json", "ema.safetensors", "text.safetensors"
STATS, COST, DONE, CHECKPOINTS = "stats.jsonl", "cost.jsonl", "done.json", "checkpoints"


@dataclass(frozen=True)
class Run:
    """The folder of a run."""

    path: Path

    def exists(self) -> bool:
        """Whether the folder holds a run at all, so that it may be continued or replaced."""
        return (self.path / RUN).exists()

    def finished_steps(self) -> int:
        """Steps of a finished run; 0 where it has not finished."""
        done = self.path / DONE
        return int(read_json(done)["step"]) if done.exists() else 0

    def matches(self, identity: Mapping[str, Any]) -> bool:
        """Whether the folder holds this very run, finished or not. More steps than before continue a run.

        Raises:
            D2CError: it holds another run, or something else.
        """
        if not self.exists():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise D2CError(
                    "there is something else where the run should go",
                    where=self.path,
                    expected="a new or empty folder, or an earlier run",
                    hint="choose another folder with --out",
                )
            return False
        before = read_json(self.path / RUN)["identity"]
        changed = [line for line in differences(_flat(before), _flat(identity)) if not line.startswith("recipe.steps")]
        if changed:
            raise D2CError(
                "there is another run in this folder",
                where=self.path,
                found="; ".join(changed),
                hint="choose another folder with --out, or replace the run with --overwrite",
            )
        return True

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to ``stats.jsonl``: what was computed, never when."""
        _append(self.path / STATS, line)

    def stats(self) -> list[dict[str, Any]]:
        """The log so far; a torn last line is left out."""
        return _lines(self.path / STATS)

    def forget_after(self, step: int) -> None:
        """Drop the log lines that an interrupted run wrote after its last checkpoint: they come again."""
        kept = [line for line in self.stats() if line["step"] <= step]
        write_bytes(self.path / STATS, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def spend(self, seconds: float, *, step: int, device: str) -> None:
        """Note worker-seconds since the last call."""
        _append(self.path / COST, {"seconds": round(seconds, 3), "step": step, "device": device})

    def seconds(self) -> float:
        """Worker-seconds of training so far, over interrupted runs; what a kill lost is not in it."""
        return round(float(sum(line["seconds"] for line in _lines(self.path / COST))), 1)

    def finish(self) -> None:
        """Say, last of all, that the run reached its last step."""
        last = self.stats()[-1]
        write_json(self.path / DONE, {"step": last["step"], "loss": last["loss"]})


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    recipe = {f"recipe.{name}": value for name, value in identity["recipe"].items()}
    return {**{name: value for name, value in identity.items() if name != "recipe"}, **recipe}


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]
