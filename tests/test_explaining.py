"""Why an image is in or out, in words that are true, and how two selections differ."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from d2c import pipeline
from d2c.comparing import compare, difference
from d2c.errors import D2CError, UsageError
from d2c.explaining import Case, explain
from d2c.pipeline import SelectRequest
from d2c.selectors import METHODS, Candidates
from d2c.workspace import SELECTION, Workspace
from d2c_cli.app import app
from formats.files import read_json, read_table, write_json, write_table
from formats.hashing import xxh3_file


def d2c(*args: str | Path) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="d2c", catch_exceptions=False)


def select(workspace: Path, **options: Any) -> str:
    made, _ = pipeline.select(SelectRequest(workspace=workspace, device="cpu", **{"per_class": (5,), **options}))
    return made[-1][1].name


def keys(workspace: Path, name: str) -> list[str]:
    return list(read_table(workspace / "selection" / name / SELECTION)["key"].to_pylist())


def replace_table(workspace: Path, file: str, row: dict[str, Any]) -> None:
    """Let one row be all that the scores' ``file`` holds."""
    stage = Workspace(workspace).scores
    write_table(stage.path / file, pa.Table.from_pylist([row], schema=read_table(stage.path / file).schema))
    record = read_json(stage.path / "stage.json")
    record["outputs"][file] = xxh3_file(stage.path / file)
    write_json(stage.path / "stage.json", record)


def case(method: str, row: int, *, size: int = 40, budget: int = 5, seed: int = 0, **asked: Any) -> Case:
    """Scores fall with the row: row 0 has the last rank."""
    candidates = Candidates([f"{i:03d}" for i in range(size)], np.arange(size, 0, -1, dtype=np.float64), seed=seed)
    chosen = METHODS[method].select(candidates, budget, np.empty(0, dtype=np.int64))
    return Case({"method": method, **asked}, candidates, row, chosen)


def test_interval_names_the_ranks_around_an_image_that_is_out() -> None:
    # 5 of 68: every tenth rank, 0 to 40.
    def why(rank: int) -> str:
        return case("interval", 67 - rank, size=68).why()

    assert why(22) == "interval takes ranks 20 and 30; rank 22 lies between them"
    assert why(21) == "interval takes ranks 20 and 30; rank 21 lies between them"
    assert why(29) == "interval takes ranks 20 and 30; rank 29 lies between them"
    assert why(50) == "rank 50 lies beyond the last rank that interval takes, 40"
    assert why(30) == "interval takes equally distant ranks, 0, 10, 20 ... 40, and rank 30 is one of them"


def test_interval_calls_no_ranks_equally_distant_that_are_not() -> None:
    # 5 of 40: steps of 5.92, rounded down.
    assert case("interval", 39 - 11).why() == (
        "interval takes evenly spread ranks, 0, 5, 11 ... 23, and rank 11 is one of them"
    )
    assert case("interval", 39 - 12).why() == "interval takes ranks 11 and 17; rank 12 lies between them"


def test_methods_of_one_end_name_where_the_picks_stop() -> None:
    assert case("min", 39 - 7).why() == "its rank is 7, and ranks 0 to 4 are picked"
    assert case("max", 39 - 7).why() == "its rank is 7, and ranks 35 to 39 are picked"
    assert case("medium", 39 - 7).why() == "its rank is 7, and the middle ones are picked, 17 to 21"


@settings(max_examples=60, deadline=None)
@given(row=st.integers(0, 39), seed=st.integers(0, 3), method=st.sampled_from(["random", "random-window"]))
def test_a_draw_below_the_budget_is_a_pick_and_no_other(row: int, seed: int, method: str) -> None:
    found = case(method, row, seed=seed)
    if "easiest 74%" in found.why():
        assert not found.picked
        assert found.ranks()[row] >= 30
    else:
        draw, of, budget = _numbers(found.why())
        assert (draw <= budget) == found.picked
        assert (of, budget) == (30 if method == "random-window" else 40, 5)


def _numbers(why: str) -> list[int]:
    """draw, of and budget of "by the seed S it is draw D of N, and the first B are picked"."""
    return [int(word.strip(",")) for word in why.split() if word.strip(",").isdigit()][1:]


def test_the_pool_of_easy_images_is_the_reason_where_it_is() -> None:
    assert case("min", 39 - 25, easiest=0.5).why() == (
        "only the easiest 50% of its class may be picked, which end at rank 19"
    )


@pytest.mark.parametrize("easiest", [0.1, 0.5, 0.8, None])
def test_a_window_of_the_easiest_is_explained_as_it_was_drawn(workspace: Path, easiest: float | None) -> None:
    name = select(workspace, method="random-window", easiest=easiest)
    picked = set(keys(workspace, name))
    for row in read_table(workspace / "scores" / "scores.parquet").to_pylist():
        found = explain(Workspace(workspace), row["key"], name)
        outside = found["why"].startswith("only the easiest")
        if not outside:
            draw, of, budget = _numbers(found["why"])
            assert (draw <= budget) == (row["key"] in picked)
        # 74 % of the easiest, and no fewer than are asked for.
        left = max(5, round((easiest or 1) * found["class_images"]))
        assert outside == (found["class_rank"] >= max(5, round(0.74 * left)))
        assert outside or of == max(5, round(0.74 * left))


def test_the_hardest_of_the_easiest_end_where_the_picks_do(workspace: Path) -> None:
    name = select(workspace, method="max", easiest=0.5)
    found = [explain(Workspace(workspace), key, name) for key in keys(workspace, name)]
    for one in found:
        own = [other["class_rank"] for other in found if other["class"] == one["class"]]
        assert one["why"].endswith(f"ranks {min(own)} to {max(own)} are picked")


@pytest.mark.parametrize("budget", [0, 40])
def test_a_class_that_gives_nothing_or_all_has_no_better_reason(budget: int) -> None:
    assert case("min", 3, budget=budget).why() in (
        "its class gives no images",
        "its class gives all images that it has",
    )


@pytest.mark.parametrize("method", ["interval", "match", "random"])
def test_every_image_is_explained_as_it_was_selected(workspace: Path, method: str) -> None:
    name = select(workspace, method=method, seed=3)
    picked = set(keys(workspace, name))
    table = read_table(workspace / "scores" / "scores.parquet").to_pylist()
    for row in table[::9]:
        found = explain(Workspace(workspace), row["key"], name)
        assert found["picked"] == (row["key"] in picked)
        own = sorted((other["score"], other["key"]) for other in table if other["label"] == row["label"])
        assert found["class_rank"] == own.index((row["score"], row["key"]))
        assert (found["score"], found["class_images"], found["class_picks"]) == (row["score"], len(own), 5)
        assert {near["key"] for near in found["nearest_picks"]} <= picked - {row["key"]}
        json.dumps(found)
        if method == "random":
            draw, _, budget = _numbers(found["why"])
            assert (draw <= budget) == found["picked"]


def test_methods_that_look_at_images_name_the_picks_nearest_in_features(workspace: Path) -> None:
    name = select(workspace, method="k-center")
    table = read_table(workspace / "scores" / "scores.parquet")
    features = np.load(next((workspace / "features").glob("*/features.npy"))).astype(np.float64)
    rows = {key: row for row, key in enumerate(table["key"].to_pylist())}
    picks = [key for key in keys(workspace, name) if key.startswith("dog/")]
    out = next(key for key in rows if key.startswith("dog/") and key not in picks)
    near = sorted(picks, key=lambda key: float(np.linalg.norm(features[rows[key]] - features[rows[out]])))
    found = explain(Workspace(workspace), out, name)
    assert [row["key"] for row in found["nearest_picks"]] == near[:3]
    assert found["nearest_picks"][0]["distance"] == pytest.approx(
        np.linalg.norm(features[rows[near[0]]] - features[rows[out]]), rel=1e-5
    )
    assert "no image far from a pick: it is not among its choices, and " in found["why"]
    inside = explain(Workspace(workspace), picks[2], name)
    assert inside["why"].endswith("it was choice 3 of 5")


def test_an_unknown_key_gets_the_ones_that_may_be_meant(workspace: Path) -> None:
    select(workspace)
    for typed, meant in (
        ("pets/cat/001.png", "did you mean cat/001.png?"),
        ("/data/pets/sea lion/002.png", "did you mean sea lion/002.png?"),
        ("024.png", "cat/024.png"),
        ("cat/01.png", "cat/0"),
    ):
        with pytest.raises(D2CError) as error:
            explain(Workspace(workspace), typed)
        assert meant in str(error.value)


@pytest.mark.parametrize(
    ("file", "row", "told"),
    [
        ("bad_files.parquet", {"key": "cat/x.png", "reason": "torn"}, r"could not be scored(.|\n)*torn"),
        (
            "duplicates.parquet",
            {"group": 0, "key": "cat/x.png", "label": 0, "kind": "near", "distance": 0.1}
            | {"twin": "cat/001.png", "kept": False, "conflict": False},
            r"dropped(.|\n)*duplicate of cat/001.png",
        ),
    ],
)
def test_an_image_without_a_score_is_explained_by_what_became_of_it(
    workspace: Path, file: str, row: dict[str, Any], told: str
) -> None:
    replace_table(workspace, file, row)
    select(workspace)
    with pytest.raises(D2CError, match=told):
        explain(Workspace(workspace), "cat/x.png")


def test_an_image_that_has_a_duplicate_is_shown_with_it(workspace: Path) -> None:
    row = {"group": 0, "key": "cat/002.png", "label": 0, "kind": "near", "distance": 0.1}
    row |= {"twin": "cat/001.png", "kept": True, "conflict": False}
    replace_table(workspace, "duplicates.parquet", row)
    select(workspace)
    assert explain(Workspace(workspace), "cat/002.png")["duplicate"]["twin"] == "cat/001.png"
    assert explain(Workspace(workspace), "cat/001.png")["duplicate"] is None


def test_a_selection_of_older_scores_is_refused(workspace: Path) -> None:
    name = select(workspace)
    path = workspace / "selection" / name / "stage.json"
    write_json(path, {**read_json(path), "inputs": {"scores": "0" * 32}})
    with pytest.raises(D2CError, match="scored again"):
        explain(Workspace(workspace), "cat/001.png", name)
    with pytest.raises(UsageError, match="nothing is selected"):
        explain(Workspace(workspace.parent / "other"), "cat/001.png")


def test_a_selection_equals_itself(workspace: Path) -> None:
    name = select(workspace)
    found = compare(Workspace(workspace), name, name)
    assert found["jaccard"] == 1.0
    assert found["images"] == {"first": 15, "second": 15, "common": 15}
    assert (found["score"]["shift_sd"], found["score"]["ks"], found["class_shift"]) == (0.0, 0.0, 0.0)


def test_easy_against_hard_shares_nothing_and_shifts_the_score(workspace: Path) -> None:
    easy, hard = select(workspace, method="min"), select(workspace, method="max")
    found = compare(Workspace(workspace), easy, hard)
    assert found["images"]["common"] == 0
    # The classes of the fixture are more unlike each other than easy and hard images of one.
    assert found["score"]["shift_sd"] > 0.5
    assert 0 < found["score"]["ks"] <= 1
    assert all(row["shift_sd"] > 1 for row in found["classes"])
    # 5 of 40, of 30 and of 25 images
    assert found["common_by_chance"]["mean"] == pytest.approx(25 / 40 + 25 / 30 + 25 / 25)


def test_what_chance_shares_is_what_random_selections_share() -> None:
    labels, scores = np.repeat([0, 1], [60, 40]), np.arange(100.0)
    rng = np.random.default_rng(0)

    def draw() -> np.ndarray[Any, Any]:
        return np.sort(np.concatenate([rng.permutation(60)[:20], 60 + rng.permutation(40)[:25]]))

    found = [difference(labels, scores, ["a", "b"], draw(), draw()) for _ in range(300)]
    common = np.array([one["images"]["common"] for one in found])
    expected = found[0]["common_by_chance"]
    assert common.mean() == pytest.approx(expected["mean"], abs=4 * expected["sd"] / np.sqrt(300))
    assert common.std() == pytest.approx(expected["sd"], rel=0.2)


def test_classes_that_gain_or_lose_most_come_first() -> None:
    labels = np.repeat([0, 1, 2], 10)
    first, second = np.array([0, 1, 10, 11, 20, 21]), np.array([0, 1, 10, 20, 21, 22])
    found = difference(labels, np.arange(30.0), ["a", "b", "c"], first, second)
    assert [row["class"] for row in found["classes"]] == ["c", "b", "a"]
    assert found["class_shift"] == pytest.approx(1 / 6)


def test_the_commands_speak_json_and_text_and_files(workspace: Path, tmp_path: Path) -> None:
    first, second = select(workspace, method="min"), select(workspace, per_class=(3,))
    told = d2c("explain", "cat/001.png", "--workspace", workspace, "--selection", first, "--json")
    assert json.loads(told.stdout)["selection"] == first
    text = d2c("explain", "cat/001.png", "--workspace", workspace)
    assert (text.exit_code, second in text.stdout) == (0, True)
    # A workspace's own selection and a copy of its table are the same.
    (tmp_path / "mine.parquet").write_bytes((workspace / "selection" / second / SELECTION).read_bytes())
    told = d2c("diff", first, tmp_path / "mine.parquet", "--workspace", workspace, "--json")
    by_name = d2c("diff", first, second, "--workspace", workspace, "--json")
    assert json.loads(told.stdout)["images"] == json.loads(by_name.stdout)["images"]
    unknown = d2c("diff", first, second[:-1], "--workspace", workspace)
    assert (unknown.exit_code, second in unknown.stderr) == (1, True)


def test_explaining_loads_no_torch(workspace: Path) -> None:
    code = "import sys, d2c.explaining, d2c.comparing; assert 'torch' not in sys.modules"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


@pytest.mark.parametrize(
    ("table", "what"),
    [
        (None, "no such table"),
        ({"name": ["a"]}, "names no images"),
        ({"key": [1, 2]}, "not of the scored images"),
        ({"key": pa.array([], pa.string())}, "not of the scored images"),
    ],
)
def test_what_is_no_selection_is_told_apart(workspace: Path, tmp_path: Path, table: Any, what: str) -> None:
    name = select(workspace)
    if table is not None:
        pq.write_table(pa.table(table), tmp_path / "other.parquet")
    with pytest.raises(D2CError, match=what):
        compare(Workspace(workspace), name, str(tmp_path / "other.parquet"))


def test_a_selection_as_polars_writes_it_is_compared(workspace: Path, tmp_path: Path) -> None:
    name = select(workspace)
    keys = read_table(workspace / "selection" / name / SELECTION)["key"].cast(pa.large_string())
    pq.write_table(pa.table({"key": keys}), tmp_path / "other.parquet")
    assert compare(Workspace(workspace), name, str(tmp_path / "other.parquet"))["jaccard"] == 1
