"""A training run's folder: which files it has, what it was asked for, its log and its costs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from d2c import checkpoint
from d2c.config import differences
from d2c.errors import D2CError
from d2c.recipe import RECIPES
from formats import Artifact, FormatError
from formats.files import read_json, sync_directory, write_bytes, write_json
from formats.lock import WriterLock

MODEL, RUN, WEIGHTS, TEXT = "model.json", "run.json", "ema.safetensors", "text.safetensors"
STATS, COST, DONE, CHECKPOINTS = "stats.jsonl", "cost.jsonl", "done.json", "checkpoints"
READINGS, CURVES, SAMPLES = "memorisation.jsonl", "curves.png", "samples"


@dataclass(frozen=True)
class Run:
    """The folder of a run."""

    path: Path

    def exists(self) -> bool:
        """Whether the folder holds a run at all, so that it may be continued or replaced."""
        return (self.path / RUN).exists()

    def begun(self) -> bool:
        """Whether anything of the run would be lost with its folder: a state, a line of its log, or its weights."""
        results = any((self.path / name).exists() for name in (DONE, WEIGHTS))
        return results or self.reached_steps() > 0 or bool(self.stats())

    def compiled(self) -> bool:
        """Whether the run that is here compiles its model."""
        return bool(read_json(self.path / RUN)["identity"].get("compile"))

    def finished_steps(self) -> int:
        """Steps of a finished run; 0 where it has not finished."""
        done = self.path / DONE
        return int(read_json(done)["step"]) if done.exists() else 0

    def reached_steps(self) -> int:
        """Steps that the folder's weights have taken, or can be continued from, finished or not."""
        return max(self.finished_steps(), checkpoint.newest_step(self.path / CHECKPOINTS))

    def matches(self, identity: Mapping[str, Any]) -> bool:
        """Whether the folder holds this very run, begun or finished. More steps than before continue a run.

        Raises:
            D2CError: it holds another run, or one that is past these steps, or something else.
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
        if not self.begun():
            return False  # it stopped before its first step, and may be asked for something else
        before = read_json(self.path / RUN)["identity"]
        changed = [line for line in differences(_flat(before), _flat(identity)) if not line.startswith("recipe.steps")]
        if changed:
            raise D2CError(
                "there is another run in this folder",
                where=self.path,
                found="; ".join(changed),
                hint="choose another folder with --out, or replace the run with --overwrite",
            )
        asked, reached = identity["recipe"]["steps"], self.reached_steps()
        if asked < reached:
            raise D2CError(
                "the run in this folder has taken more steps than these",
                where=self.path,
                found=f"{reached} steps taken, {asked} asked for",
                expected=f"--steps {reached} or more",
                hint="choose another folder with --out, or start again with --overwrite",
            )
        return True

    def lock(self) -> WriterLock:
        """Take the run for this process until `WriterLock.release`, or until the process ends in any way.

        The lock's file lies beside the folder, which --overwrite removes.

        Raises:
            D2CError: another process trains this run.
        """
        place = self.path.resolve()
        try:
            return WriterLock(place.with_name(f"{place.name}.lock"))
        except FormatError as error:
            raise D2CError(
                "another process is training this run",
                where=self.path,
                found=error.found,
                hint="wait until it is done, or choose another folder with --out",
            ) from error

    def open(self, identity: Mapping[str, Any], model: Mapping[str, Any], artifact: Artifact, *, text: bool) -> None:
        """Write what was asked for, and the text that sampling needs.

        From here on the run is unfinished: only with ``done.json`` are the steps in ``run.json`` those of the weights.
        """
        tables = {name: torch.from_numpy(artifact.table(name)) for name in ("text_embeds", "text_mask") if text}
        facts = {
            "identity": identity,
            "latent": artifact.manifest["latent"],
            "classes": [asdict(row) for row in artifact.classes],
            "artifact": self._relative(artifact.path),
            "licence": artifact.manifest["licence"],
        }
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / DONE).unlink(missing_ok=True)
        sync_directory(self.path)
        # First, since a folder without it is somebody else's.
        write_json(self.path / RUN, facts)
        checkpoint.save_tensors(self.path / TEXT, tables)
        write_json(self.path / MODEL, model)

    def artifact(self) -> Path:
        """Where the artifact lies that the run was trained on, when it was last asked for."""
        return Path(os.path.normpath(self.path.resolve() / read_json(self.path / RUN)["artifact"]))

    def moved_artifact(self, artifact: Path) -> None:
        """Note where the artifact lies now.

        Raises:
            D2CError: it has moved, and another process trains this run.
        """
        if read_json(self.path / RUN)["artifact"] == self._relative(artifact):
            return
        lock = self.lock()
        try:
            write_json(self.path / RUN, {**read_json(self.path / RUN), "artifact": self._relative(artifact)})
        finally:
            lock.release()

    def _relative(self, artifact: Path) -> str:
        # A project that moves with its artifacts and runs stays whole; two disks have only the root in common.
        target, here = artifact.resolve(), self.path.resolve()
        common = os.path.commonpath([target, here])
        return str(target) if common == here.anchor else os.path.relpath(target, here)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to ``stats.jsonl``: what was computed, never when."""
        _append(self.path / STATS, line)

    def stats(self) -> list[dict[str, Any]]:
        """The log so far; torn lines are left out."""
        return _lines(self.path / STATS)

    def note_reading(self, reading: Mapping[str, Any]) -> None:
        """Append what the memorisation clock read."""
        _append(self.path / READINGS, reading)

    def readings(self) -> list[dict[str, Any]]:
        """What the memorisation clock has read so far."""
        return _lines(self.path / READINGS)

    def forget_after(self, step: int) -> None:
        """Drop the log lines that an interrupted run wrote after its last checkpoint: they come again."""
        for path in (self.path / STATS, self.path / READINGS):
            if path.exists():
                kept = [line for line in _lines(path) if line["step"] <= step]
                write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def spend(self, seconds: float, *, step: int, device: str) -> None:
        """Note worker-seconds since the last call."""
        _append(self.path / COST, {"seconds": round(seconds, 3), "step": step, "device": device})

    def seconds(self) -> float:
        """Worker-seconds of training so far, over interrupted runs; what a kill lost is not in it."""
        return round(float(sum(line["seconds"] for line in _lines(self.path / COST))), 1)

    def diverged(self, identity: Mapping[str, Any], step: int) -> D2CError:
        """What to say, and to try, when the loss is no number any more."""
        used = identity["recipe"]
        slower = [one.name for one in RECIPES.values() if one.lr < used["lr"] and one.objective == used["objective"]]
        ways = ["--precision fp32"] if identity["precision"] != "fp32" else []
        ways += [f"--recipe {slower[0]}, which learns more slowly"] if slower else []
        return D2CError(
            "training diverged: the loss is not a number",
            where=self.path,
            found=f"step {step}",
            hint=f"try {', or '.join([*ways, 'a larger --batch-size'])}; with another --out, or with --overwrite",
        )

    def finish(self, stopped: str = "") -> None:
        """Say, last of all, that the run reached its last step, or why it was ``stopped`` before."""
        last = self.stats()[-1]
        write_json(
            self.path / DONE,
            {"step": last["step"], "loss": last["loss"], **({"stopped": stopped} if stopped else {})},
        )

    def stopped(self) -> str:
        """Why the run ended before its last step; empty where it did not."""
        done = self.path / DONE
        return str(read_json(done).get("stopped", "")) if done.exists() else ""


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    recipe = {f"recipe.{name}": value for name, value in identity["recipe"].items()}
    return {**{name: value for name, value in identity.items() if name != "recipe"}, **recipe}


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("ab+") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        # A kill may have torn the last line: what follows must not become part of it.
        torn = stream.read(1) not in (b"", b"\n")
        stream.write(("\n" * torn + json.dumps(line) + "\n").encode())


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [parsed for line in text.split("\n") if (parsed := _parsed(line)) is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None
