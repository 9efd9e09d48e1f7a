"""A user's map of classes: two notations, the source's order, and every mistake named."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2c.classmap import mapped_classes, read_class_map
from d2c.errors import D2CError
from formats.errors import FormatError

NAMES = ["cat", "dog", "sea lion"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.json", '{"sea lion": 150, "cat": 281, "dog": 207, "wolf": 269}'),
        ("map.csv", "source_id,index\nsea lion,150\ncat, 281\r\ndog,207\n\nwolf,269\n"),
        ("map.csv", '\ufeffsea lion,150\ncat,281\n"dog",207\n'),
        ("map.txt", "sea lion,150\ncat,281\ndog,207"),
    ],
)
def test_classes_get_the_indices_of_the_map_in_the_sources_order(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    indices = mapped_classes(tmp_path / name, NAMES, 1000)
    assert (str(indices.dtype), indices.tolist()) == ("int64", [281, 207, 150])


def test_two_classes_may_share_one_of_the_scorers(tmp_path: Path) -> None:
    (tmp_path / "map.csv").write_text("cat,0\ndog,0\n")
    assert mapped_classes(tmp_path / "map.csv", ["dog", "cat"], 1).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("cat,0\ndog,1\n", "no entry for 1 of 3 classes: sea lion"),
        ("cat,0\ndog,1\nsea lion,7\n", r"sea lion: 7(.|\n)*0 \.\. 2"),
    ],
)
def test_a_map_that_does_not_fit_the_source_or_the_scorer_names_the_classes(
    text: str, match: str, tmp_path: Path
) -> None:
    (tmp_path / "map.csv").write_text(text)
    with pytest.raises(D2CError, match=match):
        mapped_classes(tmp_path / "map.csv", NAMES, 3)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("map.json", b'["cat", "dog"]'),
        ("map.json", b'{"cat": "0"}'),
        ("map.json", b'{"cat": true}'),
        ("map.json", b'{"cat": 1.0}'),
        ("map.json", b'{"cat": -1}'),
        ("map.json", b'{"cat": 0, "cat": 1}'),
        ("map.json", b'{"cat": 0'),
        ("map.csv", b"cat,0\ncat,1\n"),
        ("map.csv", b"cat;0\n"),
        ("map.csv", b"cat,zero\n"),
        ("map.csv", b"cat,0,1\n"),
        ("map.csv", b"cat,-1\n"),
        ("map.csv", b"c\xe4t,0\n"),
        ("map.csv", b'"cat,0\n'),
    ],
)
def test_what_is_no_map_is_refused_with_its_place(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=name):
        read_class_map(tmp_path / name)


def test_a_missing_map_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(D2CError, match=r"no such class map(.|\n)*n01440764"):
        read_class_map(tmp_path / "map.json")
