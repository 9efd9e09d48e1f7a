"""Select: the paper's ranks, budgets, and what must not change a selection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c import pipeline, selection
from d2c.errors import UsageError
from d2c.pipeline import SelectRequest
from d2c.progress import Silent
from d2c.selection import SelectionConfig, class_quotas, select
from d2c.selectors import METHODS
from d2c.selectors.ranks import interval_ranks
from formats.files import read_json, write_json


def config(**options: Any) -> SelectionConfig:
    return SelectionConfig(workspace=Path("workspace"), **options)


def scores(sizes: list[int], seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    keys = [f"{label}/{i:04d}.png" for label, size in enumerate(sizes) for i in range(size)]
    return pa.table({"key": keys, "label": pa.array(labels, pa.int32()), "score": rng.gamma(2.0, 1.0, len(keys))})


@pytest.mark.parametrize(("budget", "interval", "last"), [(10, 96, 864), (50, 16, 784), (100, 10, 990)])
def test_the_papers_three_settings_take_every_kth_rank(budget: int, interval: int, last: int) -> None:
    ranks = interval_ranks(1300, budget, interval)
    assert ranks.tolist() == list(range(0, last + 1, interval))


def test_an_interval_that_overruns_a_small_class_shrinks_and_the_budget_is_kept() -> None:
    # ImageNet's smallest class has 732 images: 10 picks at k = 96 would need rank 864.
    ranks = interval_ranks(732, 10, 96)
    assert len(ranks) == 10
    assert ranks.tolist() == list(range(0, 730, 81))


def test_without_an_interval_the_picks_span_three_quarters_of_a_class() -> None:
    assert interval_ranks(1300, 10, None).tolist() == list(range(0, 865, 96))


@given(size=st.integers(1, 400), budget=st.integers(1, 400), interval=st.none() | st.integers(1, 500))
def test_ranks_are_distinct_inside_the_class_and_as_many_as_can_be(
    size: int, budget: int, interval: int | None
) -> None:
    ranks = interval_ranks(size, budget, interval)
    assert len(ranks) == min(size, budget)
    assert len(set(ranks.tolist())) == len(ranks)
    assert ranks.min() == 0
    assert ranks.max() < size


@settings(max_examples=40, deadline=None)
@given(st.permutations(list(range(60))), st.sampled_from(sorted(METHODS)))
def test_the_order_of_the_rows_changes_nothing(order: list[int], method: str) -> None:
    table, features = scores([20, 30, 10]), np.random.default_rng(1).normal(size=(60, 5)).astype(np.float32)
    asked = config(method=method, per_class=4)
    shuffled = select(table.take(order), asked, 3, features[order])
    assert shuffled.equals(select(table, asked, 3, features))


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.nested])
def test_smaller_budgets_lie_inside_larger_ones(method: str) -> None:
    table, features = scores([40, 25, 3]), np.random.default_rng(1).normal(size=(68, 5)).astype(np.float32)
    found = [
        set(select(table, config(method=method, total=budget, inside=inside), 3, features)["key"].to_pylist())
        for budget, inside in ((6, ()), (15, (6,)), (40, (6, 15)))
    ]
    assert found[0] < found[1] < found[2]


def test_only_the_easiest_are_picked_where_asked() -> None:
    table = scores([100, 100])
    picks = select(table, config(method="random", per_class=20, easiest=0.3), 2)
    assert picks["class_rank"].to_numpy().max() < 30
    # A class gives its budget even where the share is too small for it.
    assert select(table, config(method="random", per_class=20, easiest=0.1), 2).num_rows == 40


class Told(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.mark.parametrize(
    ("options", "empty"),
    [
        ({"total": (2,)}, 1),
        ({"ratio": (0.011,), "balance": "proportional"}, 2),
        ({"total": (3,)}, 0),
        ({"total": (2,), "method": "test_selection:only_the_first"}, 2),
    ],
)
def test_classes_that_get_no_image_are_told(
    workspace: Path, options: dict[str, Any], empty: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    told = Told()
    for _ in range(2):  # and again where the selection is there already
        results, _ = pipeline.select(SelectRequest(workspace=workspace, device="cpu", **options), told)
        assert results[0][1].classes == 3 - empty
        expected = [f"{empty} of 3 classes get no image"] if empty else []
        assert [line for line in told.warnings if "no image" in line] == expected
        told.warnings.clear()


def only_the_first(table: pa.Table, quotas: dict[int, int], features: None) -> list[str]:
    return list(table["key"].to_pylist()[:1])


def test_another_score_ranks_otherwise(workspace: Path) -> None:
    table = scores([50]).append_column("gradient", pa.array(np.arange(50.0)[::-1], pa.float32()))
    picks = select(table, config(method="min", per_class=2, score="gradient"), 1)
    assert picks["key"].to_pylist() == ["0/0049.png", "0/0048.png"]
    assert picks["score"].to_pylist() == [0.0, 1.0]
    with pytest.raises(UsageError, match="gradient"):
        selection.run(selection.plan(SelectionConfig(workspace=workspace, per_class=2, score="gradients")))
    result = selection.run(selection.plan(SelectionConfig(workspace=workspace, per_class=2, score="gradient")))
    assert result.table.num_rows == 6


def test_an_image_without_the_wanted_score_is_an_error() -> None:
    table = scores([5]).append_column("score_low_noise", pa.array([0.1, np.nan, 0.2, 0.3, 0.4]))
    with pytest.raises(UsageError, match="1 images have no score_low_noise"):
        select(table, config(per_class=2, score="score_low_noise"), 1)


def test_equal_scores_are_ordered_by_key() -> None:
    table = pa.table({"key": ["c", "a", "b"], "label": pa.array([0, 0, 0], pa.int32()), "score": [1.0, 1.0, 1.0]})
    assert select(table, config(per_class=2), 1)["key"].to_pylist() == ["a", "b"]


def test_every_class_gives_its_budget_and_a_small_class_all_it_has() -> None:
    picks = select(scores([100, 3, 50]), config(per_class=10), 3)
    assert np.bincount(picks["label"].to_numpy()).tolist() == [10, 3, 10]


def test_class_rank_is_the_rank_by_score_inside_the_class() -> None:
    table = scores([40, 40])
    picks = select(table, config(per_class=5, interval=7), 2)
    assert picks["class_rank"].to_pylist() == [0, 7, 14, 21, 28] * 2
    for row in picks.to_pylist():
        own = [
            s
            for s, label in zip(table["score"].to_pylist(), table["label"].to_pylist(), strict=True)
            if label == row["label"]
        ]
        assert sorted(own)[row["class_rank"]] == row["score"]


def test_a_smaller_random_budget_lies_inside_a_larger_one() -> None:
    table = scores([200, 150])
    small = select(table, config(method="random", per_class=10, seed=3), 2)["key"].to_pylist()
    large = select(table, config(method="random", per_class=50, seed=3), 2)["key"].to_pylist()
    assert set(small) < set(large)


def test_random_draws_differ_by_seed_and_are_unbiased_in_score() -> None:
    table = scores([2000])
    draws = [select(table, config(method="random", per_class=500, seed=s), 1) for s in range(4)]
    keys = [set(draw["key"].to_pylist()) for draw in draws]
    assert all(a != b for a in keys for b in keys if a is not b)
    means = [np.mean(draw["score"].to_numpy()) for draw in draws]
    # sd of one mean is sqrt(2)/sqrt(500) = 0.063 around the gamma's mean 2
    assert abs(np.mean(means) - 2.0) < 0.15


def test_a_ratio_is_shared_equally_by_the_classes() -> None:
    imagenet = np.full(1000, 1281)
    assert set(class_quotas(config(ratio=0.008), imagenet, 0.008).given.tolist()) == {10}
    assert set(class_quotas(config(ratio=0.02), np.full(10, 5000), 0.02).given.tolist()) == {100}
    assert set(class_quotas(config(ratio=0.0001), np.full(10, 100), 0.0001).given.tolist()) == {1}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": 0.1, "per_class": 3},
        {"ratio": 0.0},
        {"ratio": 1.5},
        {"per_class": 0},
        {"ratio": 0.1, "interval": 0},
        {"total": 0},
        {"ratio": 0.1, "total": 5},
        {"total": 10**20},
        {"per_class": 2**63 - 1},
        {"total": 30, "balance": "min:99999999999999999999999"},
        {"ratio": 0.1, "easiest": 0.0},
        {"ratio": 0.1, "method": "best"},
        {"ratio": 0.1, "balance": "fair"},
        {"per_class": 3, "balance": "sqrt"},
        {"ratio": 0.2, "inside": (0.1,)},
        {"ratio": 0.2, "inside": (0.3,), "method": "kernel"},
        {"total": 20, "inside": (8, 5), "method": "random"},
        {"total": 20, "inside": (20,), "method": "random"},
        {"total": 20, "inside": (0,), "method": "random"},
        {"ratio": 0.2, "inside": (0.1,), "method": "my.module:fn"},
    ],
)
def test_a_budget_that_makes_no_sense_is_a_usage_error(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        config(**options)


def test_different_selections_have_different_names() -> None:
    configs = [config(ratio=0.1), config(ratio=0.1, interval=5), config(ratio=0.2), config(ratio=0.1, method="random")]
    assert len({one.name for one in configs}) == 4
    assert configs[0].name == config(ratio=0.1).name


def test_a_seed_names_another_selection_only_where_it_chooses_one() -> None:
    assert config(ratio=0.1).name == config(ratio=0.1, seed=1).name
    assert config(ratio=0.1, method="random").name != config(ratio=0.1, method="random", seed=1).name


def test_two_classes_of_one_name_are_two_classes(workspace: Path) -> None:
    # ImageNet has two cranes and two maillots.
    record = read_json(workspace / "scores" / "stage.json")
    for row in record["summary"]["classes"]:
        row["name"] = "crane"
    write_json(workspace / "scores" / "stage.json", record)
    plan = selection.plan(SelectionConfig(workspace=workspace, ratio=12 / 95))
    assert (len(plan.names), plan.per_class, plan.images) == (3, 4, 12)


@pytest.mark.parametrize("column", ["key", "label", "xxh3", "losses", "scores"])
def test_what_cannot_be_a_score_is_refused_before_anything_is_computed(workspace: Path, column: str) -> None:
    request = SelectRequest(workspace=workspace, method="ot", per_class=(3,), score=column, device="cpu")
    with pytest.raises(UsageError, match="no such score") as caught:
        pipeline.select(request)
    assert "score_low_noise, score_mid_noise" in str(caught.value.expected)
    assert not (workspace / "features").exists()
    assert not (workspace / "selection").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"method": "kernel", "total": (2,), "balance": "min:1"}, "least shares"),
        ({"method": "no.such:rule", "features": "scorer", "total": (2,)}, "cannot be loaded"),
        ({"method": "kernel", "ratio": (0.2, 1.5)}, "share of all images"),
    ],
)
def test_what_cannot_be_selected_costs_no_features(workspace: Path, options: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        pipeline.select(SelectRequest(workspace=workspace, device="cpu", **options))
    assert not (workspace / "features").exists()


def test_endless_scores_are_none() -> None:
    table = scores([5]).set_column(2, "score", pa.array([0.1, np.inf, 0.2, 0.3, 0.4]))
    with pytest.raises(UsageError, match="1 images have no score"):
        select(table, config(per_class=2), 1)
