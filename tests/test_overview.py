"""The page about a selection: what it measures is what it says, and anybody can read it, anywhere."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import CLASSES
from PIL import Image
from typer.testing import CliRunner

from d2c import contact_sheets, metrics, overview, overview_page, pipeline, report, scoring
from d2c.contact_sheets import Chosen, draw
from d2c.errors import D2CError
from d2c.overview_page import Overview, Sheets, Space
from d2c.pipeline import SelectRequest
from d2c.report import Thumbnail
from d2c.scoring import ScoringConfig
from d2c.subsets import beside, random_like
from d2c.workspace import Workspace
from d2c_cli.app import app
from formats.files import read_json, read_table, write_json

VOID = {"meta", "img", "br", "path", "rect", "polygon", "polyline"}


class Page(HTMLParser):
    """Counts what a page holds, and fails where tags do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, scored: Path) -> Path:
    """A scored workspace with features and a trained judge, and a report of a selection by `match`."""
    workspace = tmp_path_factory.mktemp("judged") / "workspace"
    shutil.copytree(scored, workspace)
    request = SelectRequest(workspace=workspace, method="match", per_class=(5,), device="cpu")
    made, _ = pipeline.select(request)
    pipeline.report(request, [made[-1][1].name], workspace / "match.html")
    return workspace


def reported(workspace: Path, **options: Any) -> tuple[overview.Result, str]:
    request = SelectRequest(workspace=workspace, device="cpu", **options)
    made, _ = pipeline.select(request)
    result, _ = pipeline.report(request, [one.name for _, one in made], workspace / "report.html")
    return result, result.path.read_text(encoding="utf-8")


# Pictures


def chosen(count: int = 60, features: np.ndarray | None = None, rows: Any = (3, 30, 45)) -> Chosen:
    """Two classes, of which the first two thirds and the last third; scores grow with the row."""
    labels = np.repeat([0, 1], [40, 20])[:count]
    return Chosen(
        keys=pa.chunked_array([[f"{row:03d}" for row in range(count)]]),
        labels=labels,
        scores=np.arange(count, dtype=np.float64),
        features=features,
        names=["a", "b"],
        rows=np.array(rows),
    )


def test_borderline_images_are_those_next_to_a_pick_in_rank() -> None:
    sheet = draw(chosen(), 10, 4, by_features=False, seed=0, label=0)
    assert {rejected for rejected, _ in sheet.borderline} == {2, 4, 29, 31}
    assert all(abs(rejected - pick) == 1 for rejected, pick in sheet.borderline)
    assert sheet.picked == [3, 30]
    assert not set(sheet.rejected) & {3, 30}
    assert sheet.rejected == sorted(set(sheet.rejected))
    assert len(sheet.rejected) == 10


def test_borderline_images_are_those_next_to_a_pick_in_features_where_these_chose() -> None:
    features = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float16)
    features[17], features[50] = features[30], features[45]
    sheet = draw(chosen(features=features), 5, 2, by_features=True, seed=0)
    assert set(sheet.borderline) == {(17, 30), (50, 45)}


def test_a_class_that_gives_all_or_nothing_has_no_borderline() -> None:
    assert draw(chosen(rows=range(40, 60)), 5, 4, by_features=False, seed=0).borderline == []


# The page


@pytest.mark.parametrize(
    ("measure", "z", "verdict"),
    [
        ("distance", 4.0, "worse"),
        ("distance", -4.0, "better"),
        ("worst", 4.0, "worse"),
        ("coverage", 4.0, "better"),
        ("clusters", -4.0, "worse"),
        ("recall", 2.9, "within chance"),
        ("recall", None, "-"),
    ],
)
def test_what_five_draws_cannot_tell_from_chance_is_called_so(measure: str, z: float | None, verdict: str) -> None:
    assert overview_page._verdict(measure, {"z": z}) == verdict


def test_the_page_is_whole_static_and_accessible(judged: Path) -> None:
    html = (judged / "match.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.all("html") == [{"lang": "en"}]
    assert not page.all("script")
    assert not page.all("link")
    # Nothing is fetched: pictures are inside.
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert "http" not in html
    pictures = page.all("img")
    assert len(pictures) > 40
    assert all(picture["alt"] and picture["src"].startswith("data:image/webp;base64,") for picture in pictures)
    assert all(picture["role"] == "img" and picture["aria-label"] for picture in page.all("svg"))
    assert html.count("<table") == html.count("<caption>")
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    assert all(row.startswith(('<th scope="row">', '<th scope="col">')) for row in rows)
    assert [attrs for attrs in page.all("details") if "open" in attrs] == []
    assert len(page.all("details")) == 3
    assert len(html) < 1e6


def test_the_selectors_own_space_carries_a_warning(judged: Path) -> None:
    own = (judged / "match.html").read_text(encoding="utf-8")
    assert own.count("the same feature space as the selector") == 1
    result, html = reported(judged, per_class=(5,))
    assert "same feature space" not in html
    assert {row["space"] for row in result.measured} == {"Features of scorer", "A classifier of this data"}
    measures = {"distance", "class_distance", "worst", "recall", "coverage", "clusters"}
    assert {row["measure"] for row in result.measured} == measures


def test_the_page_says_whether_the_confidence_that_was_weighed_means_anything(judged: Path) -> None:
    _, html = reported(judged, method="ot", per_class=(5,))
    assert re.search(r"weight 10; the classifier, linear in the features, is right for \d+\.\d% of images", html)
    assert "The classifier whose confidence it weighed is linear in this space, too." in html
    assert "it learnt the labels that the selector&#x27;s classifier learnt" in html
    # The scorer's features hold the class that it was told.
    assert "the scorer is told each image&#x27;s class" in html
    _, html = reported(judged, method="ot", per_class=(5,), confidence=0.0)
    assert "classifier whose" not in html
    assert "linear in the features" not in html


def test_the_numbers_are_those_of_the_selection(judged: Path) -> None:
    result, html = reported(judged, method="min", per_class=(10,))
    measured = {row["measure"]: row for row in result.measured if row["space"] == "Features of scorer"}
    features = np.load(next((judged / "features").glob("*/features.npy"))).astype(np.float64)
    workspace = Workspace(judged)
    keys = read_table(workspace.scores.path / "scores.parquet")["key"].to_pylist()
    name = workspace.current("selection")["name"]
    picks = read_table(workspace.selection(name).path / "selection.parquet")["key"].to_pylist()
    rows = [keys.index(key) for key in picks]
    expected = metrics.frechet_distance(metrics.statistics(features[rows]), metrics.statistics(features))
    assert measured["distance"]["value"] == pytest.approx(expected.value, rel=1e-6)
    labels = np.repeat([0, 1, 2], list(CLASSES.values()))
    random = [features[random_like(labels, np.full(3, 10), seed)] for seed in range(5)]
    distances = [
        metrics.frechet_distance(metrics.statistics(one), metrics.statistics(features)).value for one in random
    ]
    assert measured["distance"]["random_mean"] == pytest.approx(np.mean(distances), rel=1e-6)
    assert measured["distance"]["random_sd"] == pytest.approx(np.std(distances, ddof=1), rel=1e-6)
    assert "standard deviations easier than all images" in html
    assert "30 of 95 (31.58%)" in html


def test_of_several_budgets_the_page_is_of_the_largest_and_lists_the_others(judged: Path) -> None:
    _, html = reported(judged, method="random", per_class=(2, 4, 6))
    assert "<title>Selection random-6-per-class" in html
    assert re.search(r"random-2-per-class-\w+</th><td>6</td>", html)
    assert re.search(r"random-4-per-class-\w+</th><td>12</td>", html)


def test_the_same_selection_gives_the_same_page(judged: Path) -> None:
    _, first = reported(judged, per_class=(4,))
    _, second = reported(judged, per_class=(4,))
    assert first == second


def test_classes_short_of_their_share_are_named(judged: Path) -> None:
    _, html = reported(judged, per_class=(28,))
    assert "1 classes are smaller than their share, by 3 images together: sea lion (3)." in html
    assert "Picks of each class" in html


def test_images_without_classes_are_measured_in_features_only(tmp_path: Path, image_folder: Path, scorer: Path) -> None:
    config = ScoringConfig(
        source=image_folder / "cat", workspace=tmp_path / "ws", scorer=str(scorer), codec="rgb", size=8, evals=4
    )
    config = replace(config, labels="none", device="cpu", class_map=_one_class(tmp_path))
    scoring.run(scoring.plan(config))
    result, html = reported(tmp_path / "ws", total=(8,))
    assert {row["space"] for row in result.measured} == {"Features of scorer"}
    assert "A classifier to judge by needs two classes" in html
    assert not (tmp_path / "ws" / "judge").exists()


def _one_class(tmp_path: Path) -> Path:
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"image": 0}))
    return path


def test_a_selection_of_older_scores_is_refused(workspace: Path) -> None:
    request = SelectRequest(workspace=workspace, per_class=(3,), device="cpu")
    made, _ = pipeline.select(request)
    path = workspace / "selection" / made[0][1].name / "stage.json"
    write_json(path, {**read_json(path), "inputs": {"scores": "0" * 32}})
    with pytest.raises(D2CError, match="scored again"):
        overview.plan(overview.OverviewConfig(workspace=workspace, selection=made[0][1].name, out=workspace / "x.html"))


def test_images_that_went_are_left_out(judged: Path, image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(judged, tmp_path / "ws")
    source = Path(shutil.copytree(image_folder, tmp_path / "pets"))
    gone = sorted(source.rglob("*.png"))[::2]
    for path in gone[::2]:
        path.write_bytes(b"no image")
    for path in gone[1::2]:
        path.unlink()
    record = read_json(tmp_path / "ws" / "scores" / "stage.json")
    record["summary"]["source"]["path"] = str(source)
    write_json(tmp_path / "ws" / "scores" / "stage.json", record)
    _, html = reported(tmp_path / "ws", per_class=(5,))
    pictures = [str(picture["alt"]).split(":")[0] for picture in Page(html).all("img")]
    assert pictures
    assert not {str(path.relative_to(source)) for path in gone} & set(pictures)


def thumbnails(count: int, pixels: bytes) -> list[Thumbnail]:
    return [Thumbnail(pixels, contact_sheets.SIDE, f"n01440764/{row}.JPEG: a <b>, score 1") for row in range(count)]


def test_ten_thousand_picks_of_a_thousand_classes_fit_ten_megabytes() -> None:
    # Noise compresses worst of all pictures.
    noise = np.random.default_rng(0).integers(0, 256, (contact_sheets.SIDE, contact_sheets.SIDE, 3)).astype(np.uint8)
    some = thumbnails(overview.SHOWN, contact_sheets._webp(noise))
    pairs = list(zip(some, some, strict=True))
    sheets = Sheets(some, some, pairs[: overview.PAIRS])
    few = Sheets(some[: overview.OF_CLASS], some[: overview.OF_CLASS], pairs[: overview.PAIRS_OF_CLASS])
    rng = np.random.default_rng(1)
    row = beside(1.0, [2.0, 3.0])
    html = overview_page.page(
        Overview(
            name="x",
            asked=[],
            costs=[],
            inside=[],
            shortfalls=[{"class": f"class {c}", "missing": 3} for c in range(900)],
            score="score",
            scores=rng.gamma(2, 1, 1_280_000),
            picked=rng.gamma(2, 1, 10_000),
            tenths=np.full(10, 1000),
            per_class=rng.integers(5, 15, 1000),
            sizes=rng.integers(700, 1300, 1000),
            spaces=[Space("Features", 1_280_000, 5, True, dict.fromkeys(overview_page.MEASURES, row))],
            subsets=5,
            clusters=(1000, row),
            near="in features",
            sheets=sheets,
            classes=[overview_page.ClassSheets("a <b>", 1300, 10, 1.0, few)] * overview.CLASSES,
        )
    )
    assert len(html.encode()) < 10e6
    Page(html)
    assert "<b>" not in html
    assert "60 of 10,000 images, drawn at random" in html


def test_colours_can_be_told_from_their_ground_in_light_and_in_dark() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    # WCAG 2.2: 4.5 for text, 3 for graphics; chromium's grounds.
    for ground, theme in zip(("#ffffff", "#121212"), re.findall(r":root\{(.*?)\}", report._STYLE), strict=True):
        colours = dict(re.findall(r"--(quiet|all|some):(#\w{6})", theme))
        assert contrast(colours["quiet"], ground) >= 4.5
        assert min(contrast(colours["all"], ground), contrast(colours["some"], ground)) >= 3


# The command


def d2c(*args: str | Path) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="d2c", catch_exceptions=False)


def test_select_writes_the_page_of_a_selection_that_is_done_already(judged: Path, tmp_path: Path) -> None:
    asked = ["select", "--method", "match", "--per-class", "5", "--workspace", judged, "--device", "cpu"]
    page = tmp_path / "pages" / "report.html"
    planned = d2c(*asked, "--report", page, "--dry-run", "--json")
    assert [step["stage"] for step in json.loads(planned.stdout)["steps"]] == ["embed", "select", "report"]
    assert not page.exists()
    done = json.loads(d2c(*asked, "--report", page, "--json").stdout)
    assert [step["ran"] for step in done["steps"]] == [False, False, True]
    assert (done["report"], len(done["beside_random"])) == (str(page), 11)
    assert page.read_bytes() == (judged / "match.html").read_bytes()
    folder = d2c(*asked, "--report", tmp_path)
    assert (folder.exit_code, "report.html" in folder.stderr) == (2, True)


def test_thumbnails_of_tiny_images_are_not_blown_up_in_the_file(judged: Path) -> None:
    html = (judged / "match.html").read_text(encoding="utf-8")
    picture = Page(html).all("img")[0]
    assert (picture["width"], picture["height"]) == ("72", "72")
    data = base64.b64decode(str(picture["src"]).partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (8, 8)


def test_select_says_what_it_makes_nothing_of(judged: Path) -> None:
    asked = ["select", "--per-class", "5", "--workspace", judged, "--device", "cpu", "--dry-run"]
    done = d2c(*asked, "--method", "min", "--interval", "3", "--confidence", "2")
    assert done.exit_code == 0
    assert "--interval is for --method interval" in done.stderr
    assert "--confidence is for --method ot" in done.stderr
    assert "changes nothing" not in d2c(*asked, "--interval", "3").stderr
    mistyped = d2c(*asked, "--method", "herdin")
    assert mistyped.exit_code == 2
    assert "did you mean herding?" in mistyped.stderr
