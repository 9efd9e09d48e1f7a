"""What an artifact says about itself: the dataset card, and Croissant metadata as `mlcroissant` reads them."""

from __future__ import annotations

import json
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from coded_fixture import TOKENS, write_coded
from formats_fixture import make_samples, write_artifact

from formats import open_artifact, verify
from formats.card import card
from formats.croissant import croissant
from formats.files import write_json
from formats.schema import INT4, INT8, Manifest, parse_manifest

HOSTILE = (
    'cats"\n---\n# <script>alert(1)</script> `x` | [a](javascript:b) ![i](http://e/x.png) {{}} \\` 🐱'
    "\u202e\x07\x85\u2028\ud800"
)


def manifest_of(path: Path) -> Manifest:
    return parse_manifest(json.loads((path / "manifest.json").read_bytes()), path)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return manifest_of(write_artifact(tmp_path_factory.mktemp("card") / "a"))


def changed(manifest: Manifest, **fields: Any) -> Manifest:
    raw = {**manifest.raw, **fields}
    return replace(manifest, raw=raw, latent=raw["latent"], samples=raw["counts"]["samples"])


def head(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("---\n")[1]))


def run_example(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the card's only Python example leaves behind, run in the artifact's folder."""
    (example,) = re.findall(r"```python\n(.*?)```", (path / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(path)
    scope: dict[str, Any] = {}
    exec(example, scope)
    return scope


@pytest.mark.parametrize(("kind", "files"), [("tar", "shards/*.tar"), ("parquet", "parquet/*.parquet")])
def test_head_tells_hubs_what_to_read(tmp_path: Path, kind: str, files: str) -> None:
    fields = head((write_artifact(tmp_path / "a", kind) / "README.md").read_text())
    assert fields["license"] == "cc0-1.0"
    assert fields["pretty_name"] == "tiny"
    assert fields["size_categories"] == ["n<1K"]
    assert fields["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": files}]}]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_example_reads_every_sample(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_artifact(tmp_path / "a", kind)
    scope = run_example(path, monkeypatch)
    paths = sorted((path / {"tar": "shards"}.get(kind, kind)).iterdir())
    read = [sample for shard in paths for sample in scope["samples"](shard)]
    assert [sample["key"] for sample in read] == [sample.key for sample in make_samples()]
    for found, sample in zip(read, make_samples(), strict=True):
        assert found["label"] == sample.label
        assert found["json"]["source_key"] == sample.info["source_key"]
        for name, array in sample.arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    mean = make_samples()[-1].arrays["latent"][0].astype("f4")
    np.testing.assert_allclose(scope["model_input"], mean * np.float32(0.18215), rtol=1e-6)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize(("codec", "least"), [(INT8, 0.9999), (INT4, 0.98)])
def test_example_decodes_codes(
    tmp_path: Path, kind: str, codec: str, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_coded(tmp_path / "a", codec, kind)
    decoded, tokens = run_example(path, monkeypatch)["sample"]["tokens"], TOKENS[-1].astype("f4")
    assert (decoded.dtype, decoded.shape) == (np.float32, tokens.shape)
    np.testing.assert_array_equal(decoded, open_artifact(path).values("tokens", [-1])[0], strict=True)
    norms = np.linalg.norm(decoded, axis=-1) * np.linalg.norm(tokens, axis=-1)
    assert ((decoded * tokens).sum(-1) / norms).min() > least
    (row,) = (line for line in (path / "README.md").read_text().splitlines() if line.startswith("| `tokens` "))
    measured = open_artifact(path).manifest["columns"][1]["fidelity"]
    assert f"`{codec}`" in row
    assert "`f4 [6, 4]`" in row
    assert f"mean {measured['mean']}, 1st percentile {measured['p01']}" in row


def test_recipe_tells_how_to_rebuild(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_artifact(tmp_path / "a", "recipe")
    text = (path / "README.md").read_text()
    assert "d2c rebuild . --source DIR" in text
    assert "holds no pixels and no latents" in text
    assert head(text)["configs"][0]["data_files"][0]["path"] == "meta/samples.parquet"
    scope = run_example(path, monkeypatch)
    assert (scope["key"], scope["facts"]["selection_rank"]) == ("00000019", 19)


def test_provenance_is_on_the_card(manifest: Manifest) -> None:
    text = card(
        changed(
            manifest,
            selection={"method": "interval", "per_class": 4, "interval": None, "scorer": {"model": "sit-tiny/2"}},
            encoders={"text": {"name": "t5", "prompt_template": "a photo of a {class}"}, "vision": None},
            parents=[{"content_id": "d2c1-xxh3-128:00", "operation": "repack"}],
        )
    )
    for line in (
        "- `source.name`: `made up`",
        "- `selection.method`: `interval`",
        "- `selection.per_class`: `4`",
        "- `selection.scorer.model`: `sit-tiny/2`",
        "- `encoders.text.prompt_template`: `a photo of a {class}`",
        "- `latent.scale`: `0.18215`",
        "- `parents[0].operation`: `repack`",
        "- `seeds.pack`: `0`",
        "- `tool.d2c`: `0`",
    ):
        assert f"{line}\n" in text
    assert "selection.interval" not in text
    assert f"`{manifest.content_id}`" in text
    assert "eprint        = {2507.05914}" in text


def test_card_says_when_latents_are_the_images(manifest: Manifest) -> None:
    assert "back into close approximations of the source images" in card(manifest)
    pixels = changed(manifest, latent={"codec": "rgb", "moments": ["mean"], "scale": 2 / 255, "shift": 127.5})
    assert "this artifact contains the images" in card(pixels)
    assert "close approximations" not in card(pixels)


@pytest.mark.parametrize(
    ("spdx", "terms", "expected"),
    [
        ("CC-BY-4.0", "", {"license": "cc-by-4.0"}),
        ("ODbL-1.0", "", {"license": "odbl"}),
        ("", "", {"license": "unknown"}),
        ("LicenseRef-ImageNet", "research only", {"license": "other", "license_name": "licenseref-imagenet"}),
        (
            "MIT AND X",
            "https://image-net.org/download",
            {"license": "other", "license_name": "mit-and-x", "license_link": "https://image-net.org/download"},
        ),
    ],
)
def test_licence_is_one_that_the_hub_takes(manifest: Manifest, spdx: str, terms: str, expected: dict[str, str]) -> None:
    text = card(changed(manifest, licence={"spdx": spdx, "source_terms": terms, "images_included": False}))
    assert {name: value for name, value in head(text).items() if name.startswith("license")} == expected
    assert f"- Terms of the source: {f'`{terms}`' if terms else 'not recorded'}\n" in text


@pytest.mark.parametrize(
    ("samples", "category"), [(999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (1_281_167, "1M<n<10M")]
)
def test_size_category(manifest: Manifest, samples: int, category: str) -> None:
    text = card(changed(manifest, counts={"samples": samples}))
    assert head(text)["size_categories"] == [category]
    assert f"{samples:,} samples" in text


def test_hostile_names_stay_text(manifest: Manifest) -> None:
    markdown = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed")
    text = card(
        changed(
            manifest,
            name=HOSTILE,
            source={"name": HOSTILE, HOSTILE: 1},
            selection={"method": HOSTILE},
            licence={"spdx": HOSTILE, "source_terms": HOSTILE},
        )
    )
    fields = head(text)
    assert fields["pretty_name"].startswith('cats" --- # <script>')
    assert fields["pretty_name"].endswith("🐱")
    assert set(fields) == {*head(card(manifest)), "license_name"}
    html = markdown.MarkdownIt("gfm-like", {"linkify": False}).render(text.split("---\n", 2)[2])
    outside = re.sub(r"<code>.*?</code>", "", html)
    assert "cats" in html
    assert not re.search("cats|script|alert|javascript|<a|<img", outside)
    assert not re.search("[\u202e\x07\x85\u2028\ud800]", text)
    assert html.count("<h1>") == 1


@pytest.mark.parametrize("value", [None, "text", 3, [], [{"a": None}], {}, {"name": {"deep": [1]}}])
def test_card_needs_no_provenance(manifest: Manifest, value: Any) -> None:
    names = ("name", "encoders", "preprocess", "source", "selection", "licence", "seeds", "tool", "parents", "order")
    without = changed(manifest, latent={}, **dict.fromkeys(names, value))
    assert head(card(without))["license"] == "unknown"
    bare = {name: without.raw[name] for name in ("format", "content_id", "counts", "container", "latent")}
    text = card(replace(manifest, raw=bare, latent={}))
    assert head(text)["pretty_name"] == "A condensed dataset"
    assert "Not recorded." in text
    assert json.dumps(croissant(without))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("something asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated:DeprecationWarning")  # rdflib warns of itself
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.reset_index")  # mlcroissant, of pandas 3
@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("kind", ["tar", "parquet", "recipe"])
def test_mlcroissant_validates_and_loads(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    mlcroissant = pytest.importorskip("mlcroissant", reason="mlcroissant is not installed")
    path = write_artifact(tmp_path / "a", kind)
    manifest = manifest_of(path)
    write_json(path / "croissant.json", croissant(manifest))
    assert verify(path).ok

    dataset = mlcroissant.Dataset(jsonld=path / "croissant.json")
    metadata = dataset.metadata
    assert not metadata.ctx.issues.errors
    assert "not standard" not in caplog.text
    assert (metadata.name, metadata.license) == ("tiny", ["https://spdx.org/licenses/CC0-1.0.html"])
    listed = {(file.content_url, file.sha256, file.content_size) for file in metadata.file_objects}
    assert listed == {(record.path, record.sha256, f"{record.bytes} B") for record in manifest.files}

    classes = list(dataset.records("classes"))
    assert [row["classes/id"] for row in classes] == [0, 1, 2, 3]
    assert [row["classes/prompt"].decode() for row in classes] == [f"a photo of {i}" for i in range(4)]
    rows = list(dataset.records("samples"))
    for row, sample in zip(rows, make_samples(), strict=True):
        assert (row["samples/key"].decode(), row["samples/label"]) == (sample.key, sample.label)
        assert json.loads(row["samples/info"])["source_key"] == sample.info["source_key"]
        assert row["samples/latent.nbytes"] == sample.arrays["latent"].nbytes
    if kind != "recipe":
        stream = (path / rows[7]["samples/shard"].decode()).read_bytes()[rows[7]["samples/latent.offset"] :]
        np.testing.assert_array_equal(np.frombuffer(stream[:256], "<f2"), make_samples()[7].arrays["latent"].ravel())
    if kind == "parquet":
        for row, sample in zip(dataset.records("arrays"), make_samples(), strict=True):
            assert row["arrays/key"].decode() == sample.key
            assert row["arrays/latent"] == sample.arrays["latent"].tobytes()


@pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated:DeprecationWarning")  # rdflib warns of itself
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.reset_index")  # mlcroissant, of pandas 3
def test_mlcroissant_refuses_a_file_that_changed(tmp_path: Path) -> None:
    mlcroissant = pytest.importorskip("mlcroissant", reason="mlcroissant is not installed")
    path = write_artifact(tmp_path / "a")
    write_json(path / "croissant.json", croissant(manifest_of(path)))
    index = (path / "classes/classes.json").read_bytes()
    (path / "classes/classes.json").write_bytes(index.replace(b"class 0", b"class 9"))
    dataset = mlcroissant.Dataset(jsonld=path / "croissant.json")
    with pytest.raises(Exception, match=r"Download\(classes/classes.json\)"):
        list(dataset.records("classes"))
