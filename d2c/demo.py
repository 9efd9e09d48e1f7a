"""The whole path on real data that ships inside a dependency: scikit-learn's 1,797 handwritten digits.

Everything runs through the same pipeline as a user's own data. Two arms are trained for the same steps, with several
seeds each: the condensed and enriched artifact, and a random subset of the same size without attachments.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d2c import charts, fid, fid_pipeline, picks, pipeline, report, score_pipeline, training
from d2c.batches import load
from d2c.errors import D2CError
from d2c.generator import grid, save_png
from d2c.pipeline import PackRequest
from d2c.progress import Progress, Silent
from d2c.recipe import recipe
from d2c.runs import Run
from d2c.sampling import SamplerConfig
from d2c.score_pipeline import ScoreRequest
from d2c.sources import open_source
from d2c.workspace import SCORES, Workspace
from formats import verify
from formats.files import read_json, read_table

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MODEL, RECIPE, RATIO = "sit-tiny/2", "small", 0.1
MEASURED = ("distance", "class_distance", "precision", "recall", "copy_rate")
ARMS = {"condensed": "D2C: interval + text + vision", "random": "random subset, no attachments"}


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Where the demo writes, and how long it trains: ``steps`` for each of two arms times ``seeds``."""

    out: Path = Path("d2c-demo")
    seeds: int = 3
    steps: int = 500
    scorer_steps: int = 600
    samples: int = 500
    device: str = "cpu"
    seed: int = 0

    @property
    def run_seeds(self) -> range:
        """The seeds of each arm's runs."""
        return range(self.seed, self.seed + self.seeds)


@dataclass(frozen=True)
class Result:
    """Where the report is. ``arms``: mean and standard deviation over seeds; ``rows``: every run by itself."""

    report: Path
    grid: Path
    space: str
    arms: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    commands: list[str]
    seconds: float


@dataclass
class _Demo:
    config: DemoConfig
    progress: Progress
    commands: list[str] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.config.out

    def command(self, *words: object) -> None:
        """Tell the newcomer what to type for the same step; the line does just what follows."""
        line = shlex.join(["d2c", *map(str, words)])
        self.commands.append(line)
        self.progress.say(f"$ {line}")

    @property
    def place(self) -> list[object]:
        """The options that say where."""
        return ["--workspace", self.out / "workspace", "--device", self.config.device]


def plan(config: DemoConfig) -> dict[str, Any]:
    """What `run` would do: number of training runs, and each path it writes, whether that exists, and what it is."""
    runs = [(arm, seed) for seed in config.run_seeds for arm in ARMS]
    measured = f"{config.steps} steps of {MODEL}, measured with {config.samples} images"
    writes = {
        config.out / "digits": "1,797 digits as PNG, a folder a class",
        config.out / "workspace": f"a scorer of {config.scorer_steps} steps, scores, selections, attachments",
        **{_shards(config, *run): f"an artifact, {ARMS[run[0]]}" for run in runs},
        **{_run_folder(config, *run): measured for run in runs},
        config.out / "report.html": "the report, with picks.png",
    }
    rows = [{"path": str(path), "exists": path.exists(), "what": what} for path, what in writes.items()]
    return {"runs": len(runs), "writes": rows}


def run(config: DemoConfig, progress: Progress | None = None) -> Result:
    """Run or resume the demo in ``config.out`` and write ``report.html``."""
    start = time.perf_counter()
    demo = _Demo(config, progress or Silent())
    write_digits(config.out / "digits")
    source = config.out / "digits"
    demo.command("score", source, "--scorer-steps", config.scorer_steps, *_seed(config.seed), *demo.place)
    workspace, steps = config.out / "workspace", config.scorer_steps
    request = ScoreRequest(
        source=str(source), workspace=workspace, scorer_steps=steps, device=config.device, seed=config.seed
    )
    score_pipeline.score(request, demo.progress)
    rows = []
    for seed in config.run_seeds:
        for arm in ARMS:
            shards = _pack(demo, arm, seed)
            rows.append(_train_and_measure(demo, arm, seed, shards))
    page, space = _write_report(demo, rows)
    return Result(
        report=page,
        grid=_run_folder(config, "condensed", config.seed) / "fid" / fid.GRID,
        space=space,
        arms=[{"arm": ARMS[arm], **{name: _spread(_values(rows, arm, name)) for name in MEASURED}} for arm in ARMS],
        rows=rows,
        commands=demo.commands,
        seconds=round(time.perf_counter() - start, 1),
    )


def write_digits(folder: Path) -> None:
    """Write the digits as 8 x 8 greyscale PNGs, one folder a class; values 0..16 become 0..255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (image, target) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / NAMES[target] / f"{index:04d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)), path)


def _shards(config: DemoConfig, arm: str, seed: int) -> Path:
    # The condensed set has no randomness to repeat; each random draw is another subset.
    return config.out / ("shards" if arm == "condensed" else f"shards-random-{seed}")


def _seed(seed: int) -> list[object]:
    return ["--seed", seed] if seed else []


def _pack(demo: _Demo, arm: str, seed: int) -> Path:
    config = demo.config
    condensed = arm == "condensed"
    shards, chosen = _shards(config, arm, seed), config.seed if condensed else seed
    request = PackRequest(
        workspace=config.out / "workspace",
        out=shards,
        method="interval" if condensed else "random",
        ratio=RATIO,
        text=None if condensed else "none",
        vision=None if condensed else "none",
        licence="BSD-3-Clause",
        seed=chosen,
        device=config.device,
    )
    if not condensed or seed == config.seed:
        other = [] if condensed else ["--method", "random", "--text", "none", "--vision", "none"]
        where = ["--licence", request.licence, "--out", shards, *_seed(chosen), *demo.place]
        demo.command("pack", "--ratio", RATIO, *other, *where)
        pipeline.pack(request, demo.progress)
        demo.command("verify", shards, "--deep")
        found = verify(shards, "deep")
        if not found.ok:
            raise D2CError("the demo's artifact does not verify", where=shards, found=found.faults[0])
    return shards


def _run_folder(config: DemoConfig, arm: str, seed: int) -> Path:
    return config.out / "runs" / f"{arm}-{seed}"


def _train_and_measure(demo: _Demo, arm: str, seed: int, shards: Path) -> dict[str, Any]:
    config, out = demo.config, _run_folder(demo.config, arm, seed)
    # Mirrored digits are no digits.
    numbers = ["--model", MODEL, "--recipe", RECIPE, "--set", "flip=none", "--steps", config.steps, *_seed(seed)]
    demo.command("train", shards, *numbers, "--device", config.device, "--out", out)
    asked = recipe(RECIPE, steps=config.steps).changed(["flip=none"])
    settings = training.TrainingConfig(
        artifact=shards, out=out, model=MODEL, recipe=asked, seed=seed, device=config.device
    )
    trained = training.run(training.plan(settings), demo.progress)
    sampler, workspace = SamplerConfig(steps=20), config.out / "workspace"
    demo.command("fid", out, "--samples", config.samples, "--sampling-steps", sampler.steps, *demo.place)
    wanted = fid.FidConfig(
        judged=out, workspace=workspace, samples=config.samples, sampler=sampler, device=config.device
    )
    measured = fid_pipeline.measure(fid.plan(wanted), 1, demo.progress)
    row = measured.report["rows"][0]
    return {
        "arm": arm,
        "seed": seed,
        "distance": row["distance"],
        "class_distance": row["class_distance"],
        "precision": row["precision"],
        "recall": row["recall"],
        "copy_rate": measured.report["copying"]["features"]["rate"],
        "loss": trained.loss,
        "passes_per_image": trained.passes_per_image,
    }


def _write_report(demo: _Demo, rows: list[dict[str, Any]]) -> tuple[Path, str]:
    """The page, and what its distance may be called."""
    config = demo.config
    measured = read_json(_run_folder(config, "condensed", config.seed) / "fid" / fid.REPORT)
    path = config.out / "report.html"
    space = measured["space"]["distance"]
    sections = [
        report.section("What was measured", *_summary(rows, space, measured)),
        report.section("Results", _results(rows, space), _anchors(measured, space)),
        report.section("Which images", *_pictures(demo)),
        report.section("Training", _losses(config)),
        report.section("Samples", _samples(config)),
        report.section("What it cost", _costs(measured)),
        report.section("The same on your own images", report.code(demo.commands)),
    ]
    report.write(path, report.page("d2c demo: 1,797 handwritten digits, condensed to 10 %", sections))
    return path, space


def _values(rows: list[dict[str, Any]], arm: str, name: str) -> np.ndarray[Any, Any]:
    return np.array([row[name] for row in rows if row["arm"] == arm], dtype=np.float64)


def _spread(values: np.ndarray[Any, Any], digits: int = 3) -> str:
    if not np.isfinite(values).all():
        return "-"
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def _summary(rows: list[dict[str, Any]], space: str, measured: dict[str, Any]) -> list[str]:
    ours, theirs = _values(rows, "condensed", "distance"), _values(rows, "random", "distance")
    gap = theirs.mean() - ours.mean()
    noise = float(np.sqrt(ours.var(ddof=1) / len(ours) + theirs.var(ddof=1) / len(theirs))) if len(ours) > 1 else 0.0
    verdict = (
        "one seed an arm says nothing about noise"
        if not noise
        else f"that is {abs(gap) / noise:.1f} standard errors" + (": within the noise" if abs(gap) < 2 * noise else "")
    )
    better = "lower (better)" if gap > 0 else "higher (worse)"
    return [
        report.text(
            f"{space} of the condensed, enriched arm is {abs(gap):.3f} {better} than the random arm's; {verdict} "
            f"with {len(ours)} seeds an arm. Both arms train {MODEL} for the same steps on as many images "
            f"({measured['protocol']['images']}), each seen about {measured['protocol']['passes_per_image']:.0f} times."
        ),
        report.text(
            "A toy: tiny images, a tiny model and few steps, so that every stage runs in minutes on a laptop. The arms "
            "differ in selection and attachments together, and attachments alone speed up early training a great deal. "
            "It shows that the path works, not how good the method is on your data. " + " ".join(measured["notes"])
        ),
    ]


def _results(rows: list[dict[str, Any]], space: str) -> str:
    body = [[ARMS[arm], *(_spread(_values(rows, arm, name)) for name in MEASURED)] for arm in ARMS]
    header = ["arm", space, "per class", "precision", "recall", "copy rate"]
    return report.table("Mean ± standard deviation over seeds (and, for random, over subsets)", header, body)


def _anchors(measured: dict[str, Any], space: str) -> str:
    body = [
        [row["name"], f"{row['n']:,}", *(_spread(_column([row], name)) for name in ("distance", "class_distance"))]
        for row in measured["rows"]
    ]
    caption = "How to read it: replay scores the condensed set itself; random real and real are real images"
    return report.table(caption, ["images", "n", space, "per class"], body)


def _pictures(demo: _Demo) -> list[str]:
    workspace = Workspace(demo.out / "workspace")
    scores = read_table(workspace.scores.path / SCORES, columns=["key", "score"])
    manifest = read_json(demo.out / "shards" / "manifest.json")
    name = manifest["name"].split("-", 1)[1]
    chosen = picks.load(workspace, name)
    order = chosen.table.sort_by([("label", "ascending"), ("class_rank", "ascending")])
    source = open_source(demo.out / "digits")
    place = {key: index for index, key in enumerate(source.keys)}
    rows = [place[key] for key in order["key"].to_pylist()]
    pixels = np.concatenate([batch.pixels for batch in load(source, rows, 8, batch=256)])
    per_class = len(pixels) // len(NAMES)
    sheet = demo.out / "picks.png"
    save_png(grid(pixels, per_class, side=32), sheet)
    svg = charts.histogram(
        scores["score"].to_numpy(), chosen.table["score"].to_numpy(), label="scores", unit="denoising loss (score)"
    )
    trust = workspace.scores.require("d2c score")
    reliability = trust.summary["rank_correlation"]
    return [
        report.chart(
            svg, "Difficulty of every image, and of the picks: interval sampling leaves out the hardest quarter"
        ),
        report.picture(sheet, "The picks: a row per class, easiest on the left"),
        report.text(
            f"Two scorings with {reliability['evaluations']} evaluations an image would agree in rank with "
            f"Spearman {reliability['expected']:.2f} (split-half, inside a class)."
        ),
    ]


def _losses(config: DemoConfig) -> str:
    series = []
    for arm, name in ARMS.items():
        stats = Run(_run_folder(config, arm, config.seed)).stats()
        series.append((name, _column(stats, "step"), _column(stats, "denoising")))
    svg = charts.lines(series, label="training loss", x_unit="step", y_unit="denoising loss")
    return report.chart(svg, "Denoising loss on the training images: lower is not better by itself, it may be memory")


def _column(stats: list[dict[str, Any]], name: str) -> np.ndarray[Any, Any]:
    return np.array([line[name] for line in stats], dtype=np.float64)


def _samples(config: DemoConfig) -> str:
    figures = [
        report.picture(_run_folder(config, arm, config.seed) / "fid" / fid.GRID, f"{ARMS[arm]}, seed {config.seed}")
        for arm in ARMS
    ]
    closest = _run_folder(config, "condensed", config.seed) / "fid" / fid.CLOSEST
    pairs = report.picture(closest, "The 64 samples closest to a training image, each with it on the right")
    return report.side_by_side(*figures) + pairs


def _costs(measured: dict[str, Any]) -> str:
    costs = measured["costs"]
    body = [[name, f"{value:.1f}"] for name, value in costs.items() if isinstance(value, int | float)]
    return report.table(f"Seconds of one worker, {costs['device']}, first condensed run", ["stage", "seconds"], body)
