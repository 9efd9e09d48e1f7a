"""How facts and progress look: 80 columns, units, hostile names, and lines where there is no terminal."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest

from d2c_cli.progress import Terminal
from d2c_cli.render import cells_of, duration, render, shown, size, table

ROWS = [
    {"name": f"random real {i}", "n": 1_797 * i, "distance": 68.99123, "class_distance": 0.4, "precision": 1.0}
    | {"recall": 0.9, "copy_rate": None, "class_covariance": "diagonal", "rank_deficient": True, "used": 12}
    for i in range(1, 4)
]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_tables_fit_and_lose_nothing(width: int) -> None:
    lines = list(table(ROWS, width))
    assert max(map(cells_of, lines)) <= width
    text = "\n".join(lines)
    for word in ("distance", "precision", "recall", "covariance", "deficient", "1,797", "5,391", "68.99", "diagonal"):
        assert word in text
    # Every folded part repeats the first column.
    assert text.count("random real 2") == text.count("name") >= (2 if width <= 60 else 1)


def test_long_text_is_cut_in_the_middle_only_where_it_must() -> None:
    rows = [{"path": "/data/" + "x" * 90 + "/end.tar", "found": "y" * 60}]
    assert max(map(cells_of, table(rows, 80))) <= 80
    assert any("…" in line for line in table(rows, 80))
    (_, whole) = table(rows, None)
    assert rows[0]["path"] in whole


def test_wide_characters_stay_aligned() -> None:
    rows = [{"name": "東京", "n": 1}, {"name": "cafe\u0301", "n": 2}, {"name": "plain", "n": 3}]
    _, *lines = table(rows, 80)
    assert len({cells_of(line) for line in lines}) == 1


def test_names_cannot_drive_the_terminal() -> None:
    text = "\n".join(render({"file": "a\x1b[2Jb\udcff", "rows": [{"name": "\x07bell"}]}, 80))
    assert "\x1b" not in text
    assert "\x07" not in text
    text.encode()


def test_facts_wrap_but_paths_stay_whole() -> None:
    path = "/data/" + "very-long-folder/" * 8 + "shards"
    lines = list(render({"notes": ["a sentence of some words"] * 6, "path": path}, 80))
    assert path in "\n".join(lines)
    assert max(len(line) for line in lines if path not in line) <= 80


def test_steps_say_what_ran_and_why() -> None:
    done = {"stage": "score", "ran": True, "reasons": ["evals: 8 -> 16"], "seconds": 75.0, "facts": {"images": 1_797}}
    fresh = {"stage": "train", "ran": False, "reasons": [], "seconds": 0.0, "facts": {}}
    planned = {"stage": "pack", "would_run": True, "reasons": ["not packed yet"], "facts": {}}
    lines = list(render({"steps": [done, fresh]}, 80))
    assert lines == [
        "steps",
        "  score  ran, 1 min 15 s: evals: 8 -> 16",
        "         images 1,797",
        "  train  up to date",
    ]
    assert list(render({"steps": [planned]}, 80))[1] == "  pack  would run: not packed yet"


def test_units() -> None:
    assert [duration(s) for s in (0.44, 41, 59.7, 161, 11_520)] == [
        "0.4 s",
        "41 s",
        "1 min 0 s",
        "2 min 41 s",
        "3 h 12 min",
    ]
    assert size(812) == "812 bytes"
    assert size(1_512_448) == "1.51 MB (1,512,448 bytes)"
    assert shown("payload_bytes", 812) == "812 bytes"
    assert shown("seed", 1234567) == "1234567"
    assert [shown("x", v) for v in (None, True, 50_000, 0.123456, [])] == ["none", "yes", "50,000", "0.1235", "none"]


def test_without_a_terminal_progress_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress: Any = pickle.loads(pickle.dumps(Terminal(tty=False, every=0.0)))
    with progress.bar("score", 100, "image", done=40) as bar:
        bar.advance(20, "loss 0.5")
        # The first of several workers may count past the end.
        bar.advance(80)
    progress.warn("look\x1b[2J")
    captured = capsys.readouterr()
    first, last, warning = captured.err.splitlines()
    assert captured.out == ""
    assert first.startswith("score: 60 of 100 images, 60 %")
    assert first.endswith("left, loss 0.5")
    assert last.startswith("score: 100 of 100 images, in 0.0 s")
    assert warning == "warning: look\\x1b[2J"


def test_on_a_terminal_progress_is_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    progress = Terminal(tty=True)
    with progress.bar("train", 10, "step") as bar:
        bar.advance(4, "loss 0.5")
        progress.say("a note")
        bar.advance(99)
    text = screen.getvalue()
    assert "a note\n" in text
    assert "10/10" in text
    assert "\r" in text
    assert "loss 0.5" in text
