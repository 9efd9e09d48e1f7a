"""The benchmark's page: every figure comes from the results, and noise is called noise."""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFont
from scipy import stats

ROOT = Path(__file__).parent.parent


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "benchmarks"))

    def load(name: str) -> ModuleType:
        __import__(name)
        return sys.modules[name]

    return load


def trained(method: str, seed: int, value: float, **others: Any) -> dict[str, Any]:
    measures = ("distance", "class_distance", "held_out", "precision", "recall", "coverage", "copies_pixels")
    row = {
        "domain": "cifar10", "level": "bc", "method": method, "budget": 10, "seed": seed, "attach": "none",
        "scorer": "own", "objective": "sit", "steps": 3000,
        "figures": {**dict.fromkeys([*measures, "copies_features"], value), "held_out_bins": [value] * 4,
                    "class_covariance": "full"},
        "costs": {"train": 60.0, "sample": 30.0, "device": "cpu"}, "copies_flagged": False,
        "protocol": {"passes_per_image": 960.0, "recipe": "small", "batch_size": 32, "samples": 2000,
                     "reference_images": 500, "sampler": {"method": "euler", "steps": 20, "guidance": 1.5}},
    }  # fmt: skip
    return {**row, **others}


def selected(method: str, z: float) -> dict[str, Any]:
    measures = ("distance", "class_distance", "recall", "coverage")
    found = {"value": 1 + z / 10, "random_mean": 1.0, "random_sd": 0.1, "z": z}
    return {"domain": "cifar10", "level": "a", "method": method, "budget": 10, "seconds": 1.0,
            "measures": dict.fromkeys(measures, found)}  # fmt: skip


FACTS = {
    "domain": "cifar10", "size": 16, "images": 500, "classes": 10, "scorer": "sit-tiny/4", "judge": 0.7,
    "trust": {"evaluations": 8, "split_half": 0.9}, "chooser": {"accuracy": 0.75}, "machine": "a machine",
}  # fmt: skip


def left(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "cifar10" / "results").mkdir(parents=True)
    (folder / "cifar10" / "facts.json").write_text(json.dumps(FACTS))
    for number, row in enumerate(rows):
        name = f"a-{number}" if row["level"] == "a" else str(number)
        (folder / "cifar10" / "results" / f"{name}.json").write_text(json.dumps(row))


def test_the_page_says_which_differences_are_noise(scripts: Any, tmp_path: Path) -> None:
    random, better, alike = (3.0, 3.1, 3.2), (2.0, 2.1, 2.15), (2.9, 3.1, 3.4)
    rows = [trained("random", seed, value) for seed, value in enumerate(random)]
    rows += [trained("kernel", seed, value) for seed, value in enumerate(better)]
    rows += [trained("interval", seed, value) for seed, value in enumerate(alike)]
    left(tmp_path, [*rows, trained("ot", 0, 1.0), selected("kernel", -4.5)])
    scripts("bench_page").main(tmp_path, "cifar10", tmp_path)
    page = (tmp_path / "cifar10.md").read_text()
    told = {line.split("`")[1]: line for line in page.splitlines() if "against `random`" in line}
    # One run says nothing about noise.
    assert set(told) == {"kernel", "interval"}
    assert stats.ttest_rel(better, random).pvalue < 0.05 < stats.ttest_rel(alike, random).pvalue
    gaps = np.subtract(better, random)
    gap, error = gaps.mean(), gaps.std(ddof=1) / np.sqrt(3)
    assert f"| {gap:+.2f} ({gap / error:+.1f}): better |" in told["kernel"]
    assert "| +0.03 (+0.4): noise |" in told["interval"]
    assert "Is the paper's interval sampling better than random?* class FD: noise in 1 of 1" in page
    assert "| kernel | 0.550 (-4.5) |" in page
    assert "6 of 60 runs of level C." in page
    # What others compute with is all there.
    table = pq.read_table(tmp_path / "cifar10.parquet").to_pylist()
    assert sorted(row["figures_held_out"] for row in table if row["method"] == "random") == sorted(random)
    assert len(table) == len(rows) + 2
    assert 'aria-label="CIFAR-10, 10 images a class, 3,000 steps: runs' in (tmp_path / "cifar10.svg").read_text()
    assert (tmp_path / "cifar10.html").read_text().count("<svg") == 1


def test_arms_are_compared_with_their_like_alone(scripts: Any) -> None:
    rows = [trained("random", seed, 3.0 + seed / 10) for seed in range(3)]
    rows += [trained("random", seed, 1.0 + seed / 9, attach="both") for seed in range(3)]
    rows += [trained("full", seed, 2.0 + seed / 10, budget=0) for seed in range(1, 4)]
    groups = scripts("bench_arms").grouped(rows)
    assert {key[1]: list(arms) for key, arms in groups.items()} == {"none": ["full", "random"], "both": ["random"]}
    found = scripts("bench_arms").comparisons(groups)
    assert {(one.question, one.words): round(one.gap("distance")[0], 6) for one in found} == {
        ("attach", "`random`, text and vision against nothing attached"): round(1 / 9 - 2.1, 6),
    }  # full data shares only two seeds with random


def test_all_images_hold_out_others_so_their_runs_are_not_paired(scripts: Any) -> None:
    few, all_of_them = (3.0, 3.5, 4.2), (2.0, 2.9, 2.1)
    rows = [trained("random", seed, value) for seed, value in enumerate(few)]
    rows += [trained("full", seed, value, budget=0) for seed, value in enumerate(all_of_them)]
    (found,) = scripts("bench_arms").comparisons(scripts("bench_arms").grouped(rows))
    gap, errors, _ = found.gap("held_out")
    test = stats.ttest_ind(few, all_of_them, equal_var=False)
    assert (gap, errors) == (pytest.approx(np.mean(few) - np.mean(all_of_them)), pytest.approx(test.statistic))
    assert "not paired" in found.words


def test_a_gap_that_never_varies_is_not_tested(scripts: Any) -> None:
    rows = [trained(method, seed, value) for method, value in (("random", 3.0), ("kernel", 2.5)) for seed in range(3)]
    (found,) = scripts("bench_arms").comparisons(scripts("bench_arms").grouped(rows))
    assert found.cell("class_distance") == "-0.50 (+nan): noise"


def test_a_rule_is_held_against_random_draws_by_every_scorer_and_attachment(scripts: Any) -> None:
    rows = [trained("random", seed, 3.0 + seed / 10) for seed in range(3)]
    rows += [trained("interval", seed, 2.0 + seed / 9, scorer="weak") for seed in range(3)]
    rows += [trained("random", seed, 1.0 + seed / 8, attach="both") for seed in range(3)]
    rows += [trained("interval", seed, 1.5 + seed / 7, attach="both") for seed in range(3)]
    rows += [trained("interval", seed, 1.5 + seed / 7, attach="text") for seed in range(3)]
    found = scripts("bench_arms").comparisons(scripts("bench_arms").grouped(rows))
    gaps = {one.words: one.gap("distance")[0] for one in found if one.question == "interval"}
    assert gaps == {
        "`interval`, by a scorer trained for a tenth of the steps, against `random`": pytest.approx(1 / 9 - 1.1),
        "`interval` against `random`, both with text and vision": pytest.approx(0.5 + 1 / 7 - 1 / 8),
    }


def test_a_rule_that_chose_anew_in_each_run_is_an_arm_beside_random_draws(scripts: Any) -> None:
    rows = [trained("random", seed, 3.0 + seed / 10) for seed in range(3)]
    rows += [trained("kernel", seed, 2.0 + seed / 9) for seed in range(3)]
    rows += [trained("kernel", 1, 2.5, scorer="second"), trained("kernel", 2, 3.6, scorer="third")]
    rows += [trained("kernel", 0, 3.0, scorer="second"), trained("kernel", 2, 3.1, scorer="second")]
    # Two subsets say little of others.
    rows += [trained("interval", 0, 2.0), trained("interval", 1, 2.5, scorer="second")]
    groups = scripts("bench_arms").grouped(rows)
    plain, second = groups["sit", "none", "own", 10, 3000], groups["sit", "none", "second", 10, 3000]
    assert {name: len(arm.runs) for name, arm in plain.items()} == {
        "kernel": 3, "kernel, anew": 3, "random": 3, "interval": 1,
    }  # fmt: skip
    assert {name: len(arm.runs) for name, arm in second.items()} == {"kernel": 3, "interval": 1}
    assert ("sit", "none", "third", 10, 3000) not in groups  # its one run is in the arm already
    (found,) = (one for one in scripts("bench_arms").comparisons(groups) if "anew" in one.words)
    assert found.words == "`kernel, anew` against `random`"
    assert found.gap("distance")[0] == pytest.approx(np.mean([2.0, 2.5, 3.6]) - 3.1)
    # One verdict a question: that of the runs whose error holds the luck of the subset.
    told = scripts("bench_arms").counted(scripts("bench_arms").comparisons(groups))
    assert [one.words for one in told if one.question == "rules"] == ["`kernel, anew` against `random`"]


def test_cells_share_an_artifact_only_where_their_images_are_the_same(scripts: Any) -> None:
    bench = scripts("bench")
    cell = bench.Cell("kernel", 10, 0)
    assert cell.shards == bench.Cell("kernel", 10, 1).shards == bench.Cell("kernel", 10, 0, objective="dit").shards
    others = [bench.Cell("random", 10, 0), bench.Cell("random", 10, 1), bench.Cell("kernel", 100, 0),
              bench.Cell("kernel", 10, 0, attach="both"), bench.Cell("kernel", 10, 0, scorer="weak")]  # fmt: skip
    assert len({cell.shards, *(one.shards for one in others)}) == 6
    for level in "bc":
        for domain in bench.DOMAINS:
            names = [cell.name for cell in bench.cells(level, domain)]
            assert len(names) == len(set(names))
    # Each run of a rule has a subset of its own, and random draws are those of its seed.
    chosen = {(cell.budget, cell.seed, cell.scorer) for cell in bench.cells("c", "cifar10") if cell.method == "kernel"}
    assert chosen == {(budget, *one) for budget in (10, 100) for one in enumerate(("own", *bench.AGAIN))}


def test_time_left_is_projected_from_the_steps_of_what_is_left(scripts: Any, tmp_path: Path) -> None:
    bench = scripts("bench")
    left(tmp_path, [{**trained("random", seed, 3.0), "wall_seconds": 100.0} for seed in range(2)])
    one = bench.Bench(argparse.Namespace(out=tmp_path, domain="cifar10", images="", reference="", jobs=1, size=16))
    # 60 seconds for 3,000 steps, and 40 for all else
    assert one.seconds([bench.Cell("random", 10, 2)]) == pytest.approx(100)
    assert one.seconds([bench.Cell("random", 100, 2, steps=30_000)] * 2) == pytest.approx(2 * 640)


def test_glyphs_are_rendered_once_a_font_that_looks_its_own(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    font = ImageFont.load_default(10)
    fonts = tmp_path / "fonts"
    fonts.mkdir()
    for name in ("One-Regular", "One-Copy", "Two"):
        (fonts / f"{name}.ttf").write_bytes(font.font_bytes)
    (fonts / "Broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(sys, "argv", ["glyphs.py", str(tmp_path / "g.tar"), str(fonts)])
    scripts("glyphs").main()
    with tarfile.open(tmp_path / "g.tar") as tar:
        names = tar.getnames()
        zero, letter = (np.asarray(Image.open(tar.extractfile(f"{name}/One.png"))) for name in ("digit-0", "lower-o"))
    assert (len(names), len(set(names))) == (62, 62)
    assert zero.shape == (32, 32)
    assert (zero < 128).sum() > (letter < 128).sum() > 0


@pytest.mark.parametrize("span", [(0.276, 0.314), (8.6, 12.5), (0.0, 1.0), (97.0, 1040.0), (3.0, 3.001)])
def test_ticks_are_few_round_and_inside(scripts: Any, span: tuple[float, float]) -> None:
    found = scripts("bench_figure").ticks(*span)
    assert 2 <= len(found) <= 7
    assert all(span[0] <= tick <= span[1] for tick in found)
