"""The benchmark: does choosing and attaching help, on this data, beside random? Only public commands; resumable.

python docs/benchmarks/bench.py OUT --images SOURCE --level a          # subsets by distance, no training: minutes
python docs/benchmarks/bench.py OUT --images SOURCE --level b          # ten rules trained, 3 runs each: hours
python docs/benchmarks/bench.py OUT --images SOURCE --level c          # 1,000 passes an image, 5 runs: many hours
python docs/benchmarks/bench_page.py OUT cifar10                       # the page, from what is finished

Each level first says what is left and how long that should take. Kill it at any moment; run it again. `--domain` names
the data in the results, `own` any labelled images; `longtail`, `unlabelled` and `glyphs` are made or read in their own
ways (see `DOMAINS`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from bench_cells import AGAIN, DOMAINS, FEATURES_ALONE, MODELS, Cell, cells
from machine import machine, note

from d2c.selectors import METHODS
from formats.files import read_json, write_json

HERE = Path(__file__).parent
LEVEL_A = (*METHODS, "gradient")
"""`gradient`: interval sampling by the mean squared gradient of the pixels, which needs no model."""


class Bench:
    """One domain in one folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.domain, self.rules = args.domain, DOMAINS[args.domain]
        self.images, self.reference, self.jobs, self.size = args.images, args.reference, args.jobs, args.size
        self.out: Path = args.out / args.domain
        self.results = self.out / "results"
        self.chooser, self.teacher = self.out / "chooser.parquet", self.out / "teacher.safetensors"
        self._packing = threading.Lock()

    def d2c(self, command: str, *options: object, workspace: str = "workspace") -> dict[str, Any]:
        """Run a command of the toolkit; its JSON."""
        words = [sys.executable, "-m", "d2c_cli", command, *map(str, options), "--json"]
        env = {
            **os.environ, "D2C_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
            "D2C_WORKSPACE": str(self.out / workspace),
        }  # fmt: skip
        done = subprocess.run(words, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}\n{done.stderr[-2000:]}\n{done.stdout[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def prepare(self) -> None:
        """Score the source, and train beside it the network whose features choose."""
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(self._score, "workspace", max(1, self.jobs - 1))]
            if self.rules.labels == "source":
                jobs.append(pool.submit(self._script, "chooser.py", self.chooser))
            for job in jobs:
                job.result()

    def _score(self, workspace: str, processes: int, *options: object) -> None:
        common = ("--size", self.size, "--codec", "rgb", "--evals", 8, "--labels", self.rules.labels)
        scorer = options or ("--scorer", "train", "--scorer-model", MODELS["sit"])
        self.d2c("score", self.images, *common, *scorer, "--gpus", processes, workspace=workspace)

    def _script(self, name: str, *options: object) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        words = [sys.executable, HERE / name, self.images, *options]
        subprocess.run(list(map(str, words)), env=env, check=True, stdout=sys.stderr)

    def choice(self, method: str, budget: int, seed: int, scorer: str = "own") -> list[object]:
        """The options that select."""
        if method == "full":
            # The rest is held out.
            return ["--ratio", 0.98, "--balance", "proportional", "--method", "random"]
        rule = ["--method", "interval", "--score", "gradient"] if method == "gradient" else ["--method", method]
        if method in METHODS and METHODS[method].features:
            # Without labels there is nothing to train a network of one's own on.
            rule += ["--features", self._features(scorer) if self.rules.labels == "source" else "scorer"]
        return ["--per-class", budget, *rule, "--seed", seed]

    def _features(self, scorer: str) -> Path:
        if scorer not in AGAIN:
            return self.chooser
        other = self.out / f"chooser-{scorer}.parquet"
        self._script("chooser.py", other, "--seed", 1 + AGAIN[scorer])
        return other

    def distances(self, method: str, budget: int) -> None:
        """Level A: one selection beside random ones."""
        page = self.out / "pages" / f"{method}-{budget}.html"
        found = self.d2c("select", *self.choice(method, budget, 0), "--report", page)
        stage = read_json(self.out / "workspace" / "selection" / found["selection"] / "stage.json")
        rows = {(row["space"], row["measure"]): row for row in found["beside_random"]}
        measures = {
            measure: {key: row[key] for key in ("value", "random_mean", "random_sd", "z")}
            for (space, measure), row in rows.items()
            if space == "A classifier of this data"
        }
        self._keep(f"a-{method}-{budget}", {"level": "a", "method": method, "budget": budget, "measures": measures,
                                           "seconds": stage["cost"]["seconds"]})  # fmt: skip

    def train(self, cell: Cell) -> None:
        """One run: packed, trained, measured."""
        start = time.perf_counter()
        shards, run = self.out / "shards" / cell.shards, self.out / "runs" / cell.name
        # Rules that look at features alone need no other scores.
        usual = cell.scorer == "own" or (cell.scorer in AGAIN and cell.method in FEATURES_ALONE)
        workspace = "workspace" if usual else f"workspace-{cell.scorer}"
        with self._packing:
            if not usual:
                self._rescore(cell.scorer)
            text = "hashed" if cell.attach in ("text", "both") else "none"
            vision = "none"
            if cell.attach in ("vision", "both"):
                vision = self._taught()
            choice = self.choice(cell.method, cell.budget, cell.seed, cell.scorer)
            name = self.d2c("select", *choice, workspace=workspace)["selection"]
            self.d2c("pack", "--selection", name, "--seed", cell.seed, "--text", text, "--vision", vision,
                     "--grid", self.size // 4, "--licence", "LicenseRef-benchmark", "--out", shards,
                     workspace=workspace)  # fmt: skip
        changes = ["--set", f"flip={'grid' if self.rules.mirror else 'none'}"]
        changes += ["--set", "objective=eps"] if cell.objective == "dit" else []
        self.d2c("train", shards, "--model", MODELS[cell.objective], "--recipe", "small", "--steps", cell.steps,
                 "--seed", cell.seed, *changes, "--held-out", self.images, "--watch-every", 1000,
                 "--keep-checkpoints", 1, "--out", run)  # fmt: skip
        found = self._measured(cell)
        self._keep(cell.name, {**found, "wall_seconds": round(time.perf_counter() - start, 1)})
        for state in (run / "checkpoints").glob("*"):  # the averaged weights stay
            state.unlink()

    def measure(self, cell: Cell) -> None:
        """Measure a finished run again, as runs are measured now."""
        spent = read_json(self.results / f"{cell.name}.json")["wall_seconds"]
        self._keep(cell.name, {**self._measured(cell), "wall_seconds": spent})

    def _measured(self, cell: Cell) -> dict[str, Any]:
        """A run beside real images, in the judge's features and in the teacher's."""
        run = self.out / "runs" / cell.name
        against = ["--reference", self.reference] if self.rules.reference else []
        if self.rules.labels == "source":
            with self._packing:
                against += ["--second", self._taught()]
        self.d2c("fid", run, "--samples", 2000, "--sampling-steps", 20, *against)
        report = read_json(run / "fid" / "fid.json")
        clock = json.loads((run / "memorisation.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        row = report["rows"][0]
        figures = {name: row[name] for name in ("distance", "second_distance", "class_distance", "class_covariance")}
        figures |= {name: row[name] for name in ("precision", "recall", "density", "coverage")}
        figures |= {f"copies_{space}": report["copying"][space]["rate"] for space in ("pixels", "features")}
        figures |= {name: clock[name] for name in ("held_out", "held_out_bins", "train", "train_bins")}
        anchor = ("name", "n", "distance", "second_distance", "class_distance")
        return {
            "level": "bc", **asdict(cell), "figures": figures, "copies_flagged": report["copying"]["flagged"],
            "costs": report["costs"],
            "protocol": {key: value for key, value in report["protocol"].items() if key != "training_seed"},
            "anchors": [{key: row[key] for key in anchor} for row in report["rows"][1:]],
        }  # fmt: skip

    def _taught(self) -> str:
        """The encoder whose tokens are attached, trained at need."""
        mirror = ["--mirror"] if self.rules.mirror else []
        self._script("teacher.py", self.teacher, "--size", self.size, *mirror)
        return f"timm:test_vit:{self.teacher}"

    def _rescore(self, scorer: str) -> None:
        if scorer in AGAIN:
            self._score(f"workspace-{scorer}", self.jobs, "--scorer-model", MODELS["sit"], "--seed", AGAIN[scorer])
            return
        if scorer == "weak":
            self._score(f"workspace-{scorer}", self.jobs, "--scorer-model", MODELS["sit"], "--scorer-steps", 200)
            return
        shards, run = self.out / "shards" / "scorer-tenth", self.out / "runs" / "scorer-tenth"
        self.d2c("pack", "--ratio", 0.1, "--method", "random", "--seed", 100, "--text", "none", "--vision", "none",
                 "--licence", "LicenseRef-benchmark", "--out", shards)  # fmt: skip
        self.d2c("train", shards, "--model", MODELS["sit"], "--recipe", "small", "--set", "flip=none", "--out", run)
        self._score(f"workspace-{scorer}", self.jobs, "--scorer", run)

    def _keep(self, name: str, row: dict[str, Any]) -> None:
        write_json(self.results / f"{name}.json", {"domain": self.domain, **row})

    def facts(self) -> None:
        """What the page says of the networks that scored, taught and judged."""
        read = {
            name: read_json(self.out / "workspace" / name / "stage.json")["summary"] for name in ("scores", "judge")
        }
        scores, networks = read["scores"], {"chooser": self.chooser, "teacher": self.teacher}
        write_json(self.out / "facts.json", {
            "domain": self.domain, "size": self.size, "images": scores["images"], "classes": len(scores["classes"]),
            "scorer": scores["scorer"]["facts"]["model"], "trust": scores["rank_correlation"],
            **{name: read_json(path.with_suffix(".json")) for name, path in networks.items() if path.exists()},
            "judge": read["judge"]["accuracy"],
            "machine": machine(("torch", "numpy", "scipy", "scikit-learn", "timm")).replace("\n", " "),
        })  # fmt: skip

    def left(self, names: Iterable[str]) -> set[str]:
        return {name for name in names if not (self.results / f"{name}.json").exists()}

    def dated(self, name: str) -> bool:
        """Whether a run was measured before there was a figure that runs have now."""
        return "second_distance" not in read_json(self.results / f"{name}.json")["figures"]

    def seconds(self, runs: Iterable[Cell]) -> float:
        """What ``runs`` should take on one core, going by finished ones."""
        rows = [row for path in self.results.glob("*.json") if (row := read_json(path))["level"] == "bc"]
        step = median(row["costs"]["train"] / row["steps"] for row in rows) if rows else 0.04
        rest = median(row["wall_seconds"] - row["costs"]["train"] for row in rows) if rows else 60
        return sum(rest + step * cell.steps for cell in runs)

    def all_of(self, jobs: dict[str, Callable[[], None]], left: set[str], seconds: float) -> None:
        """Say how long what is ``left`` should take, ``seconds`` on one core, and do it."""
        todo = [(name, job) for name, job in jobs.items() if name in left]
        hours = seconds / self.jobs / 3600
        done = len(jobs) - len(todo)
        note(f"{self.domain}: {done} done, {len(todo)} to do, about {hours:.1f} h at {self.jobs} at a time")
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(job) for _, job in todo]
            for (name, _), future in zip(todo, futures, strict=True):
                try:
                    future.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True, wait=False)
                    raise
                note(f"done: {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", required=True, help="what `d2c score` takes")
    parser.add_argument("--reference", help="what to measure against, where that is not the scored images")
    parser.add_argument("--domain", choices=list(DOMAINS), default="cifar10")
    parser.add_argument("--level", choices=["a", "b", "c"], default="a")
    parser.add_argument("--only", default="", help="regular expression: only cells with such a name")
    parser.add_argument("--again", action="store_true", help="measure finished runs again where a figure is missing")
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    args = parser.parse_args()
    args.out = args.out.absolute()
    if args.level == "c" and not cells("c", args.domain):
        parser.error(f"{args.domain} has no level C")
    bench = Bench(args)
    bench.prepare()
    wanted = re.compile(args.only)
    if args.level == "a":
        pairs = [(method, budget) for budget in (10, 50, 100) for method in LEVEL_A]
        chosen = {f"a-{m}-{b}": lambda m=m, b=b: bench.distances(m, b) for m, b in pairs}
        jobs = {name: job for name, job in chosen.items() if wanted.search(name)}
        for name in bench.left(list(jobs)[:1]):
            jobs[name]()  # alone, since it trains the judge
        left = bench.left(jobs)
        bench.all_of(jobs, left, 15 * len(left))
    else:
        found = {cell.name: cell for cell in cells(args.level, args.domain) if wanted.search(cell.name)}
        left = bench.left(found)
        if args.again:
            trained = {name: lambda cell=cell: bench.measure(cell) for name, cell in found.items() if name not in left}
            dated = {name for name in trained if bench.dated(name)}
            bench.all_of(trained, dated, 60 * len(dated))
        else:
            jobs = {name: lambda cell=cell: bench.train(cell) for name, cell in found.items()}
            bench.all_of(jobs, left, bench.seconds(found[name] for name in left))
    bench.facts()


if __name__ == "__main__":
    main()
