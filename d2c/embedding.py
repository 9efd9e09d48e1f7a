"""Embed: one feature vector for each scored image, for selectors that look at images and not only at scores.

A stage of its own: features cost a pass over all images, and serve every selection after that. They come from the
scorer (no download), from any vision encoder that `attach` knows, or from a user's own Parquet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from d2c import batches, runtime
from d2c.config import execution
from d2c.encoding import is_scorer, open_for_scores, public_name, slug, weights_stamp
from d2c.errors import D2CError
from d2c.own_table import pieces, read_keys
from d2c.parts import Part, ToDo, require_all, split, work
from d2c.picks import check_same
from d2c.progress import Bar, Progress, Silent
from d2c.runtime import Ranks
from d2c.workspace import FEATURES, SCORES, Record, Stage, Workspace
from formats.files import atomic, read_table, table_facts, write_table
from formats.hashing import sha256_file, xxh3_lines

GRID = 16
"""Side of the token grid of encoders other than the scorer: 224 px for a /14 model, as they were trained."""
LARGEST = 1e15
"""Numbers of a user's features, at most: squared distances in thousands of dimensions must fit 32 bits."""
_PART = 1024


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """Features of all scored images by ``encoder``: a name as `attach` takes it, or a Parquet file.

    Of an encoder's tokens the mean is taken. A Parquet file has a column ``key`` and one column of lists of numbers.
    """

    workspace: Path = execution()
    encoder: str = "scorer"
    batch_size: int = 64
    precision: str = "auto"
    seed: int = 0
    device: str = execution("auto")
    gpus: int = execution(1)
    threads: int = execution(4)
    overwrite: bool = execution(False)

    @property
    def is_table(self) -> bool:
        """The features are the user's own."""
        return self.encoder.endswith(".parquet")

    def asked(self) -> dict[str, Any]:
        """The identity."""
        if self.is_table:
            return {"encoder": "parquet"}
        asked = {"encoder": self.encoder, "batch_size": self.batch_size, "precision": self.precision}
        # Only the scorer is shown noisy images.
        return {**asked, "seed": self.seed} if is_scorer(self.encoder) else asked


@dataclass(frozen=True)
class Plan:
    """What `run` will do."""

    config: EmbeddingConfig
    stage: Stage
    reasons: list[str]
    inputs: dict[str, str]
    images: int


@dataclass(frozen=True)
class Result:
    """Features [N, D] of the scored images in key order: ``name`` is their folder's."""

    name: str
    record: Record


@dataclass(frozen=True)
class _Job:
    config: EmbeddingConfig
    stage: Stage
    todo: ToDo
    progress: Progress


def plan(config: EmbeddingConfig) -> Plan:
    """Say which features there are already.

    Raises:
        D2CError: there are no scores yet, or no such Parquet file.
    """
    workspace = Workspace(config.workspace)
    scores = workspace.scores.require("d2c score DIR")
    device = runtime.resolve_device(config.device)
    if config.is_table and not Path(config.encoder).is_file():
        raise D2CError("there is no such table of features", where=config.encoder, expected="a Parquet file")
    inputs = _inputs(config, workspace, scores)
    images = int(scores.summary["images"])
    found = [
        _planned(replace(config, precision=precision), inputs, images)
        for precision in runtime.precisions(config.precision, device)
    ]
    return next((one for one in found if not one.reasons), found[0])


def _planned(config: EmbeddingConfig, inputs: dict[str, str], images: int) -> Plan:
    named = config.asked() | ({"file": inputs["weights"]} if config.is_table else {})
    stage = Workspace(config.workspace).features(slug(config.encoder, named))
    reasons = ["--overwrite"] if config.overwrite else stage.stale(config.asked(), inputs)
    return Plan(config, stage, reasons, inputs, images)


def run(plan: Plan, progress: Progress | None = None) -> Result:
    """Compute what is missing, in parts, then join the parts into one array in key order.

    Raises:
        D2CError: the user's table lacks images, or is no table of features.
    """
    if plan.reasons:
        device = runtime.resolve_device(plan.config.device)
        lock = runtime.once(plan.stage.lock)
        try:
            runtime.once(lambda: plan.stage.begin(plan.config.asked(), plan.inputs))
            if plan.config.is_table:
                runtime.once(lambda: _take(plan))
            else:
                parts = split(plan.images, _PART, plan.stage.path / "parts", ".parquet")
                job = _Job(plan.config, plan.stage, ToDo.of(parts), progress or Silent())
                workers = min(plan.config.gpus, max(1, len(job.todo.parts)))
                runtime.launch(_embed_parts, job, workers=workers, device=device)
                runtime.once(lambda: _join(plan, parts, device.type))
        finally:
            if lock:
                lock.release()
    return Result(plan.stage.path.name, plan.stage.require("d2c select --features ENCODER"))


def load(workspace: Workspace, name: str) -> npt.NDArray[np.floating]:
    """Finished features [N, D], memory-mapped, in key order of the scores: float16, or float32 of a user's table."""
    found: npt.NDArray[np.floating] = np.load(workspace.features(name).output(FEATURES), mmap_mode="r")
    return found


def _inputs(config: EmbeddingConfig, workspace: Workspace, scores: Record) -> dict[str, str]:
    """What decides the features beside the options: by content, so that more evaluations compute none again."""
    table = read_table(workspace.scores.output(SCORES), columns=["key", "xxh3", "label"])
    keys = table["key"].to_pylist()
    inputs = {
        "images": _paired(keys, table["xxh3"].to_pylist()),
        "weights": sha256_file(Path(config.encoder)) if config.is_table else weights_stamp(config.encoder),
        "scorer": "",
    }
    if config.is_table:
        inputs["precision"] = "float32"  # an earlier state of this code kept 16 bits
    else:
        inputs["size"] = str(scores.config["size"])
    if is_scorer(config.encoder):
        facts, labels = scores.summary["scorer"], table["label"].to_numpy()
        # The scorer is told each image's class, by its own number.
        told = labels if facts.get("classes") is None else np.array(facts["classes"])[labels]
        inputs |= {
            "scorer": facts["facts"]["weights_xxh3"],
            "objective": str(scores.config["objective"]),
            "codec": str(scores.config["codec"]),
            "codec weights": scores.inputs["codec"],
            "classes": _paired(keys, told.tolist()),
        }
    return inputs


def _paired(keys: Sequence[str], values: Sequence[object]) -> str:
    return xxh3_lines(f"{key}\t{value}" for key, value in zip(keys, values, strict=True))


def _embed_parts(ranks: Ranks, job: _Job) -> None:
    config, workspace = job.config, Workspace(job.config.workspace)
    scores = workspace.scores.require("d2c score DIR")
    device = runtime.resolve_device(config.device)
    with runtime.one_thread(device):
        grid = int(scores.summary["scorer"]["grid"]) if is_scorer(config.encoder) else GRID
        source, encoder, classes = open_for_scores(config.encoder, grid, workspace, device, config.seed)
        scored = read_table(workspace.scores.output(SCORES), columns=["key", "xxh3"]).combine_chunks()
        # The scored row of each image of the source; null of those that have no score.
        row_of = pc.index_in(pa.array(source.keys), value_set=scored["key"].combine_chunks())
        order = source.storage_order()
        order = order[row_of.is_valid().to_numpy(zero_copy_only=False)[order]]
        size = int(scores.config["size"])

        def make(part: Part, bar: Bar) -> None:
            keys: list[str] = []
            found: list[npt.NDArray[np.float16]] = []
            rows = order[part.items.start : part.items.stop].tolist()
            for batch in batches.load(source, rows, size, batch=config.batch_size, threads=config.threads):
                if batch.bad:
                    raise D2CError(
                        "a scored image can no longer be read",
                        where=f"{source.location}: {batch.bad[0].key}",
                        found=batch.bad[0].reason,
                        hint="run d2c score again: it takes note of what changed",
                    )
                for index, digest in zip(batch.indices.tolist(), batch.digests, strict=True):
                    check_same(source, source.keys[index], digest, scored["xxh3"][row_of[index].as_py()].as_py())
                with runtime.autocast(config.precision, device):
                    tokens = encoder.encode(batch.pixels, classes[source.labels[batch.indices]])
                patches = tokens[:, -encoder.info.tokens :].astype(np.float32)
                found.append(patches.mean(axis=1).astype(np.float16))
                keys += [source.keys[index] for index in batch.indices]
                bar.advance(len(batch) * ranks.world)
            write_table(part.path, pa.table({"key": keys, "features": _lists(np.concatenate(found))}))

        work(job.todo, make, ranks=ranks, stage=job.stage, progress=job.progress, label="embed")


def _join(plan: Plan, parts: list[Part], device: str) -> None:
    require_all(parts)
    keys = read_table(Workspace(plan.config.workspace).scores.output(SCORES), columns=["key"])["key"].combine_chunks()
    dim = read_table(parts[0].path)["features"].type.list_size
    written = np.zeros(len(keys), dtype=bool)
    with atomic(plan.stage.path / FEATURES) as temporary:
        joined = np.lib.format.open_memmap(temporary, "w+", np.float16, (len(keys), dim))
        for part in parts:
            table = read_table(part.path)
            rows = pc.index_in(table["key"], value_set=keys).to_numpy()
            joined[rows], written[rows] = _matrix(table["features"]), True
        joined.flush()
        if not written.all():
            # Parts are runs of the source's storage, which was another when some of them were made.
            raise D2CError(
                "the images were stored in another order while their features were made",
                where=plan.stage.path,
                found=f"{int(written.sum())} of {len(keys)} images have features",
                hint=f"delete {plan.stage.path} and run the same command again",
            )
    summary = {"encoder": public_name(plan.config.encoder), "dim": dim, "images": len(keys)}
    plan.stage.finish([FEATURES], summary, device=device)


def _take(plan: Plan) -> None:
    path = Path(plan.config.encoder)
    given, (fields, _) = read_keys(path), table_facts(path)
    columns = [field.name for field in fields if _of_numbers(field.type)]
    if len(columns) != 1:
        raise D2CError(
            "this is no table of features",
            where=path,
            found=", ".join(field.name for field in fields),
            expected="a column key and one column of lists of numbers",
        )
    keys = read_table(Workspace(plan.config.workspace).scores.output(SCORES), columns=["key"])["key"].combine_chunks()
    missing = keys.filter(pc.invert(pc.is_in(keys, value_set=given.combine_chunks())))
    if len(missing):
        raise D2CError(
            "the table of features lacks scored images",
            where=path,
            found=f"{len(missing)} of {len(keys)} missing, the first: {missing[0]}",
            hint="keys are those of the scores: paths below the source",
        )
    # Where each row of the table goes; null where its image has no score.
    rows = pc.index_in(given, value_set=keys).combine_chunks()
    with atomic(plan.stage.path / FEATURES) as temporary:
        joined, start = None, 0
        for lists in pieces(path, columns[0]):
            own = rows.slice(start, len(lists))
            start += len(lists)
            if own.null_count == len(own):
                continue
            values = _rows(lists.filter(own.is_valid()), path, None if joined is None else joined.shape[1])
            if joined is None:
                joined = np.lib.format.open_memmap(temporary, "w+", values.dtype, (len(keys), values.shape[1]))
            joined[own.drop_null().to_numpy()] = values
        assert joined is not None
        joined.flush()
        summary = {"encoder": "a table of the user's own", "dim": joined.shape[1], "images": len(keys)}
    plan.stage.finish([FEATURES], summary, device="cpu")


def _rows(lists: pa.Array, path: Path, width: int | None) -> npt.NDArray[np.float32]:
    """Lists of numbers as rows [n, D], as selectors want them, of ``width`` numbers where that is known."""
    known = [] if width is None else [width]
    lengths = list(dict.fromkeys([*known, *pc.unique(pc.list_value_length(lists)).to_pylist()]))
    if len(lengths) != 1 or not lengths[0]:
        raise D2CError("features of one length are needed", where=path, found=f"lengths {lengths[:5]}")
    with np.errstate(over="ignore"):
        flat: npt.NDArray[np.float32] = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    values = flat.reshape(len(lists), -1)
    if not (np.abs(values) <= LARGEST).all():
        raise D2CError(
            "features must be finite, and no larger than can be squared",
            where=path,
            expected=f"nothing beyond {LARGEST:g}",
            hint="scale them",
        )
    return values


def _of_numbers(kind: Any) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)))


def _lists(features: npt.NDArray[np.float16]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])


def _matrix(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    flat: npt.NDArray[Any] = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), -1)
