"""The directory where stages meet. A stage's record is written last: no record, not finished.

Layout: ``clusters/  scorer/<options>-<source>/{shards,run}  pilot/  scores/  features/<encoder>/  confidence/<encoder>/
selection/<name>/  attachments/text/<encoder>/  attachments/<selection>/<encoder>/  judge/  reference/<space>/``. Each
stage's folder holds ``stage.json`` (its record), ``begun.json`` (what an unfinished run was asked for), ``cost.jsonl``
(seconds of work, a line a part) and its own files. ``packed/`` knows the artifacts that were packed from here.
"""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from d2c.config import differences
from d2c.errors import D2CError
from formats.errors import IntegrityError
from formats.files import read_json, remove_tree, write_json
from formats.hashing import xxh3_file, xxh3_json
from formats.lock import WriterLock

RECORD, BEGUN, COST = "stage.json", "begun.json", "cost.jsonl"
SCORES, BAD_FILES, CLASSES = "scores.parquet", "bad_files.parquet", "classes.json"
DUPLICATES, LEAKS = "duplicates.parquet", "leaks.parquet"
SELECTION = "selection.parquet"
FEATURES = "features.npy"
CROSS_ENTROPIES = "cross_entropies.npy"
_HERE = "workspace:"


@dataclass(frozen=True)
class Record:
    """What a finished stage was asked for and what it left."""

    kind: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]
    """File name -> xxh3-128 of its bytes."""
    summary: dict[str, Any]
    cost: dict[str, Any]

    @property
    def digest(self) -> str:
        """Changes when an output changes, and not when only the cost does."""
        return xxh3_json({"kind": self.kind, "version": self.version, "outputs": self.outputs})


@dataclass(frozen=True)
class Stage:
    """One stage's folder in the workspace."""

    path: Path
    kind: str
    version: int

    def record(self) -> Record | None:
        """The finished stage's record, or None where the stage has not finished."""
        if not (self.path / RECORD).exists():
            return None
        value = read_json(self.path / RECORD)
        if value.get("version", 0) > self.version:
            raise D2CError(
                f"the {self.kind} stage was written by a newer d2c",
                where=self.path,
                found=f"version {value['version']}",
                expected=f"at most {self.version}",
                hint="upgrade with: pip install -U d2c-toolkit",
            )
        return Record(**value)

    def require(self, command: str) -> Record:
        """The record, or an error that names the command which makes it."""
        record = self.record()
        if record is None:
            raise D2CError(f"there are no finished {self.kind} here yet", where=self.path, hint=f"run: {command}")
        return record

    def output(self, name: str) -> Path:
        """The path of an output, its bytes compared with the record.

        Raises:
            IntegrityError: they changed since the stage finished.
        """
        record = self.require("the command that makes it")
        path, expected = self.path / name, record.outputs[name]
        found = xxh3_file(path) if path.exists() else "no such file"
        if found != expected:
            raise IntegrityError(
                "a file in the workspace changed since its stage finished",
                where=path,
                found=found,
                expected=expected,
                hint=f"delete {self.path} and run the same command again",
            )
        return path

    def stale(self, config: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
        """Why the stage must run: empty when it is finished, was asked the same, and its files are all there."""
        record = self.record()
        if record is None:
            return ["an interrupted run is resumed"] if self._begun_as(config, inputs) else ["not run yet"]
        reasons = []
        if record.version != self.version:
            reasons.append(f"stage version: {record.version} -> {self.version}")
        reasons += differences(record.config, config)
        reasons += [f"{line.split(':')[0]} changed" for line in differences(record.inputs, inputs)]
        return reasons + [f"{name} is missing" for name in record.outputs if not (self.path / name).exists()]

    def begin(self, config: Mapping[str, Any], inputs: Mapping[str, str], *, keep: bool = False) -> None:
        """Prepare the folder: keep the parts of an interrupted run that was asked the same, else start anew.

        With ``keep`` nothing is removed: for a stage whose parts lie in folders of what they were asked for, and that
        calls `unfinish` before it touches what an earlier run has left.
        """
        if not keep and (self.record() is not None or not self._begun_as(config, inputs)):
            remove_tree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / BEGUN, self._asked(config, inputs))

    def unfinish(self) -> None:
        """Take back that the stage is finished: its outputs are about to be replaced."""
        (self.path / RECORD).unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing this stage at the same time.

        Raises:
            FormatError: one does already.
        """
        lock = self.lock()
        try:
            yield
        finally:
            lock.release()

    def lock(self, patience: float = 0.0) -> WriterLock:
        """The same, for callers that cannot hold a block open: release it when done. A kill releases it too."""
        return WriterLock(self.path.with_name(f"{self.path.name}.lock"), patience)

    def refresh(self, **summary: Any) -> None:
        """Bring facts up to date that are not outputs, such as where the source lies now."""
        record = self.record()
        if record is not None and any(record.summary.get(name) != value for name, value in summary.items()):
            write_json(self.path / RECORD, asdict(replace(record, summary={**record.summary, **summary})))

    def spend(self, seconds: float, **what: Any) -> None:
        """Note ``seconds`` of one worker's time. Appended as one short line, so that workers may share the file."""
        with (self.path / COST).open("a", encoding="utf-8") as stream:
            # The newline comes first, so that a line torn by a full disk spoils no other.
            stream.write("\n" + json.dumps({"seconds": round(seconds, 3), **what}))

    @contextmanager
    def spending(self, **what: Any) -> Iterator[None]:
        """Note the time that the block takes, if it succeeds."""
        start = time.perf_counter()
        yield
        self.spend(time.perf_counter() - start, **what)

    def forget_cost(self) -> None:
        """Begin to count anew."""
        (self.path / COST).unlink(missing_ok=True)

    def spent(self) -> float:
        """Seconds of work so far, summed over workers and interrupted runs; torn lines are left out."""
        path = self.path / COST
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        total = 0.0
        for line in lines:
            # Two nodes may write over each other where a file system does not append as a whole.
            with suppress(ValueError, TypeError, KeyError):
                total += float(json.loads(line)["seconds"])
        return total

    def finish(self, outputs: Sequence[str], summary: Mapping[str, Any], *, device: str) -> Record:
        """Write the record, last of all."""
        begun = read_json(self.path / BEGUN)
        record = Record(
            kind=self.kind,
            version=self.version,
            config=begun["config"],
            inputs=begun["inputs"],
            outputs={name: xxh3_file(self.path / name) for name in sorted(outputs)},
            summary=dict(summary),
            cost={"seconds": round(self.spent(), 1), "device": device},
        )
        write_json(self.path / RECORD, asdict(record))
        (self.path / BEGUN).unlink()
        return record

    def _asked(self, config: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
        return {"kind": self.kind, "version": self.version, "config": dict(config), "inputs": dict(inputs)}

    def _begun_as(self, config: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
        begun = self.path / BEGUN
        return begun.exists() and read_json(begun) == self._asked(config, inputs)


@dataclass(frozen=True)
class Workspace:
    """The stages' folders, by name."""

    path: Path

    @property
    def scorer(self) -> Path:
        """The scorer that `score` trained: its artifact and its run."""
        return self.path / "scorer"

    @property
    def scores(self) -> Stage:
        return Stage(self.path / "scores", "scores", 3)

    @property
    def judge(self) -> Stage:
        return Stage(self.path / "judge", "judge", 1)

    def reference(self, name: str) -> Stage:
        """Features of real images in one feature space."""
        return Stage(self.path / "reference" / name, "reference", 1)

    @property
    def clusters(self) -> Stage:
        """Numbers of the clusters that serve as classes of an unlabelled source."""
        return Stage(self.path / "clusters", "clusters", 1)

    @property
    def pilot(self) -> Stage:
        """How many evaluations a wanted rank correlation takes, tried on a few images."""
        return Stage(self.path / "pilot", "pilot", 1)

    def features(self, name: str) -> Stage:
        """One feature vector per scored image."""
        return Stage(self.path / "features" / name, "features", 1)

    def confidence(self, features: str) -> Stage:
        """One cross-entropy per scored image, of a classifier of the features of this name."""
        return Stage(self.path / "confidence" / features, "confidence", 1)

    def selection(self, name: str) -> Stage:
        return Stage(self.path / "selection" / name, "selection", 1)

    def selected(self, name: str) -> Record:
        """The record of the selection ``name``, which was made from the scores that are there.

        Raises:
            D2CError: nothing is scored, there is none of this name, or the images were scored again since.
        """
        scores, stage = self.scores.require("d2c score DIR"), self.selection(name)
        record = stage.record()
        if record is None:
            there = sorted(path.parent.name for path in (self.path / "selection").glob(f"*/{RECORD}"))
            close = difflib.get_close_matches(name, there, cutoff=0.6)
            raise D2CError(
                "there is no such selection",
                where=self.path,
                found=name,
                expected=", ".join(there) or "none yet",
                hint=f"did you mean {', or '.join(close)}?" if close else "make it with: d2c select --ratio R",
            )
        if record.inputs.get("scores") != scores.digest:
            raise D2CError(
                "the images were scored again since this selection was made",
                where=stage.path,
                hint="run the same d2c select again",
            )
        return record

    def text(self, name: str) -> Stage:
        """Text embeddings, one per class."""
        return Stage(self.path / "attachments" / "text" / name, "text attachment", 1)

    def vision(self, selection: str, name: str) -> Stage:
        """Vision tokens, one grid per picked image."""
        return Stage(self.path / "attachments" / selection / name, "vision attachment", 3)

    def note_packed(self, manifest: Path) -> None:
        """Remember that the artifact of this manifest was packed from here."""
        if not self.has_packed(manifest):
            write_json(self._packed(manifest), {"manifest": str(manifest.resolve())})

    def has_packed(self, manifest: Path) -> bool:
        """Whether the artifact of this manifest, byte for byte, was packed from here, wherever it lies now."""
        return self._packed(manifest).exists()

    def _packed(self, manifest: Path) -> Path:
        return self.path / "packed" / f"{xxh3_file(manifest)}.json"

    def classes(self) -> list[dict[str, Any]]:
        """The scored source's classes: id, name, source_id, count."""
        return list(read_json(self.scores.path / CLASSES))

    def remember(self, name: str) -> str:
        """``name`` of a file or folder so that it is found again from anywhere, and after the workspace has moved."""
        path = Path(name)
        if not path.exists():
            return name  # a hub id
        resolved, root = path.resolve(), self.path.resolve()
        return f"{_HERE}{resolved.relative_to(root)}" if resolved.is_relative_to(root) else str(resolved)

    def recall(self, name: str) -> str:
        """The inverse of `remember`."""
        return str(self.path / name.removeprefix(_HERE)) if name.startswith(_HERE) else name

    def current(self, what: str) -> Any | None:
        """What the last `select` or `attach` left as the one to use: ``selection`` or ``attachments/<selection>``."""
        pointer = self.path / what / "current.json"
        return read_json(pointer) if pointer.exists() else None

    def set_current(self, what: str, value: Any) -> None:
        write_json(self.path / what / "current.json", value)
