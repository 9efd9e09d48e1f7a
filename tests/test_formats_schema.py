"""manifest.schema.json: a valid JSON Schema that takes what we write; what it refuses, the reader refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from coded_fixture import write_coded
from formats_fixture import write_artifact
from hypothesis import given, settings
from hypothesis import strategies as st

import formats
from formats.errors import FormatError
from formats.licence import check_licence
from formats.schema import INT4, INT8, parse_manifest

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")

SCHEMA = json.loads(Path(formats.__file__).with_name("manifest.schema.json").read_bytes())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
Steps = tuple[str | int, ...]

LOOSER = {
    # Required of who writes an artifact. The reader passes them on as it finds them.
    *"order encoders source selection licence created latent.codec columns.fidelity".split(),
}
"""Fields of which the reader's code relies on less than the schema asks for."""

VALUES: list[Any] = [None, True, -1, 0, 1.5, "", "../x", "x", [], ["x"], [0], {}, {"x": None}]


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One manifest of each container and codec."""
    root = tmp_path_factory.mktemp("manifests")
    paths = [write_artifact(root / kind, kind) for kind in ("tar", "parquet", "recipe")]
    paths += [write_coded(root / "int8", INT8), write_coded(root / "int4", INT4, "parquet")]
    return [json.loads((path / "manifest.json").read_bytes()) for path in paths]


def places(value: Any, steps: Steps = ()) -> Iterator[Steps]:
    """Every place in a JSON value but its root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in items:
        yield (*steps, step)
        yield from places(inner, (*steps, step))


def changed(manifest: dict[str, Any], steps: Steps, *value: Any) -> dict[str, Any]:
    """The manifest with ``value`` at a place, or without the place."""
    result = copy.deepcopy(manifest)
    inner: Any = result
    for step in steps[:-1]:
        inner = inner[step]
    if value:
        inner[steps[-1]] = value[0]
    else:
        del inner[steps[-1]]
    return result


def name(steps: Steps) -> str:
    """`columns.shape` for a place in any of the columns."""
    return ".".join(step for step in steps if isinstance(step, str))


def parses(manifest: Any) -> bool:
    try:
        parse_manifest(manifest, "a test")
    except FormatError:
        return False
    return True


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_manifests_that_we_write_fit(manifests: list[dict[str, Any]]) -> None:
    for manifest in manifests:
        VALIDATOR.validate(manifest)


def test_unknown_fields_fit_everywhere(manifests: list[dict[str, Any]]) -> None:
    for manifest in manifests:
        more = copy.deepcopy(manifest)
        for steps in [(), *places(manifest)]:
            inner: Any = more
            for step in steps:
                inner = inner[step]
            if isinstance(inner, dict) and name(steps) not in ("columns.codec_arrays", "encoders"):
                inner["later"] = {"any": ["thing"]}
        VALIDATOR.validate(more)
        parse_manifest(more, "a test")


def test_the_reader_refuses_what_the_schema_refuses(manifests: list[dict[str, Any]]) -> None:
    accepted, refused = set(), 0
    for manifest in manifests:
        short = {**manifest, "files": manifest["files"][:2]}
        for steps in places(short):
            field = name(steps)
            if any(field == loose or field.startswith(f"{loose}.") for loose in LOOSER):
                continue
            for other in (changed(short, steps), *(changed(short, steps, value) for value in VALUES)):
                if not VALIDATOR.is_valid(other):
                    refused += 1
                    accepted |= {field} if parses(other) else set()
    assert refused > 1000
    assert accepted == set()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_reader_fails_in_one_way_only(manifests: list[dict[str, Any]], data: st.DataObject) -> None:
    manifest = data.draw(st.sampled_from(manifests))
    steps = data.draw(st.sampled_from(list(places(manifest))))
    parses(changed(manifest, steps, data.draw(JSON)))


@pytest.mark.parametrize(
    "spdx", ["MIT", "CC-BY-4.0", "LicenseRef-ImageNet", "MIT OR (Apache-2.0 AND BSD-3-Clause)", ""]
)
def test_licence_expressions(spdx: str) -> None:
    check_licence(spdx, "https://example.org/terms")


@pytest.mark.parametrize(
    ("spdx", "terms"), [("Foo Bar!!", ""), ("MIT or Apache", ""), ("(MIT", ""), ("", "not a url"), ("", "ftp://x")]
)
def test_what_is_no_licence_and_no_address_is_refused(spdx: str, terms: str) -> None:
    with pytest.raises(FormatError, match=r"SPDX|web address"):
        check_licence(spdx, terms)


@pytest.mark.parametrize("path", ["meta/evil.py", "shards/x.pkl", "README.md", "croissant.json"])
def test_files_that_an_artifact_never_holds_are_refused(manifests: list[dict[str, Any]], path: str) -> None:
    extra = {"path": path, "bytes": 1, "xxh3_128": "0" * 32, "sha256": "0" * 64}
    with pytest.raises(FormatError, match=path):
        parse_manifest({**manifests[0], "files": [*manifests[0]["files"], extra]}, "manifest.json")
