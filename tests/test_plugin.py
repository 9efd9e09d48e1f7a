"""A user's own selection method: it gets the table, and what it returns is checked."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from d2c import pipeline, selection
from d2c.errors import D2CError, UsageError
from d2c.pipeline import SelectRequest
from d2c.selection import SelectionConfig

MODULE = """
def brightest(table, quotas, features):
    rows = sorted(table.to_pylist(), key=lambda row: (row["label"], -row["bytes"], row["key"]))
    left = dict(quotas)
    for row in rows:
        if left[row["label"]]:
            left[row["label"]] -= 1
            yield row["key"]

def unknown(table, quotas, features):
    return ["no such.png"]

def twice(table, quotas, features):
    return [table["key"][0].as_py()] * 2

def greedy(table, quotas, features):
    return table["key"].to_pylist()

def few(table, quotas, features):
    return table["key"].to_pylist()[:2]

def seeing(table, quotas, features):
    assert features.shape[0] == table.num_rows
    return few(table, quotas, features)

def forgetful(table, quotas, features):
    few(table, quotas, features)

def picky(table, quotas, features):
    return []

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A module in the working directory, with a name of its own."""
    name = "mine_" + "".join(c if c.isalnum() else "_" for c in request.node.name)
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)
    return name


def choose(workspace: Path, method: str) -> selection.Selection:
    return selection.run(selection.plan(SelectionConfig(workspace=workspace, method=method, per_class=4)))


def test_its_picks_become_the_selection_in_its_order(workspace: Path, module: str) -> None:
    result = choose(workspace, f"{module}:brightest")
    assert result.table.num_rows == 12
    assert result.table["label"].to_pylist() == [0] * 4 + [1] * 4 + [2] * 4
    assert result.table["rank"].to_pylist() == [0, 1, 2, 3] * 3
    assert not selection.plan(SelectionConfig(workspace=workspace, method=f"{module}:brightest", per_class=4)).reasons


def test_a_changed_function_selects_again(workspace: Path, module: str, tmp_path: Path) -> None:
    choose(workspace, f"{module}:brightest")
    file = tmp_path / f"{module}.py"
    file.write_text(file.read_text() + "# changed\n")
    asked = SelectionConfig(workspace=workspace, method=f"{module}:brightest", per_class=4)
    assert selection.plan(asked).reasons == ["method changed"]


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("unknown", "not in the scores"),
        ("twice", "a key twice"),
        ("greedy", "more images than its budget"),
        ("forgetful", "returned no keys"),
        ("picky", "chose no image"),
    ],
)
def test_what_is_no_selection_is_refused(workspace: Path, module: str, function: str, what: str) -> None:
    with pytest.raises(D2CError, match=what):
        choose(workspace, f"{module}:{function}")


def test_fewer_picks_than_the_budget_are_its_right(workspace: Path, module: str) -> None:
    assert choose(workspace, f"{module}:few").table.num_rows == 2


def test_it_is_given_features_where_asked(workspace: Path, module: str) -> None:
    request = SelectRequest(
        workspace=workspace, method=f"{module}:seeing", features="scorer", per_class=(4,), device="cpu"
    )
    assert pipeline.select(request)[0][0][1].table.num_rows == 2


@pytest.mark.parametrize("name", ["no_module_of_this_name:fn", "json:nothing", ":x"])
def test_what_cannot_be_loaded_is_a_usage_error(workspace: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be loaded"):
        choose(workspace, name)


def test_what_is_no_function_is_a_usage_error(workspace: Path, module: str) -> None:
    with pytest.raises(UsageError, match="no function"):
        choose(workspace, f"{module}:number")
