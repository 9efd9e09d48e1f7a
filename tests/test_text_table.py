"""A table of the user's own embeddings instead of a text encoder: joined by class, checked, and attached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import pack_request

from d2c import attachment, pipeline, text_table
from d2c.errors import D2CError
from d2c.workspace import Workspace
from formats import open_artifact

CLASSES = [{"id": n, "name": f"the {name}", "source_id": name} for n, name in enumerate(("cat", "dog", "sea lion"))]
ORDER = ["sea lion", "ghost", "cat", "dog"]
"""As the table lists them: in another order, with a class that nobody asked for."""
VALUES = np.random.default_rng(0).normal(size=(4, 16, 6)).astype(np.float32)
EXPECTED = VALUES[[2, 3, 0]].astype(np.float16)


def write(path: Path, **columns: Any) -> Path:
    """``columns`` as Parquet or npz, by the suffix of ``path``."""
    if path.suffix == ".npz":
        np.savez(path, **columns)
    else:
        pq.write_table(pa.table({name: np.asarray(value).tolist() for name, value in columns.items()}), path)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_rows_are_found_by_the_class_and_stored_in_the_order_of_the_classes(tmp_path: Path, suffix: str) -> None:
    mask = np.ones((4, 16), np.uint8)
    mask[2, 3:] = 0
    path = write(tmp_path / f"mine{suffix}", source_id=ORDER, text_embeds=VALUES, text_mask=mask)
    found = text_table.load(path, CLASSES)
    assert (found.embeds.dtype.str, found.mask.dtype.str) == ("<f2", "|u1")
    np.testing.assert_array_equal(found.mask, mask[[2, 3, 0]])
    np.testing.assert_array_equal(found.embeds[1:], EXPECTED[1:])
    np.testing.assert_array_equal(found.embeds[0, :3], EXPECTED[0, :3])
    assert not found.embeds[0, 3:].any()
    info = found.info.to_dict()
    assert (info["name"], info["source"], info["dim"], info["tokens"]) == ("table", f"file:mine{suffix}", 6, 16)


def test_the_digest_is_of_what_is_attached_and_not_of_the_file(tmp_path: Path) -> None:
    digests = [
        text_table.load(path, CLASSES).info.weights_xxh3
        for path in (
            write(tmp_path / "a.npz", source_id=ORDER, text_embeds=VALUES),
            write(tmp_path / "b.parquet", source_id=ORDER[::-1], text_embeds=VALUES[::-1]),
            write(tmp_path / "c.npz", source_id=ORDER, text_embeds=VALUES * 2),
        )
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_one_vector_a_class_is_one_token_and_names_do_where_there_are_no_ids(tmp_path: Path, suffix: str) -> None:
    names = [f"the {name}" for name in ORDER]
    found = text_table.load(write(tmp_path / f"t{suffix}", name=names, text_embeds=VALUES[:, 5]), CLASSES)
    assert found.embeds.shape == (3, 16, 6)
    np.testing.assert_array_equal(found.embeds[:, 0], EXPECTED[:, 5])
    np.testing.assert_array_equal(found.mask, [[1] + [0] * 15] * 3)
    assert not found.embeds[:, 1:].any()


def ragged() -> pa.Table:
    return pa.table({"source_id": ORDER, "text_embeds": [[1.0], [1.0, 2.0], [1.0], [1.0]]})


def changed(row: int, value: float) -> np.ndarray[Any, Any]:
    values = VALUES.copy()
    values[row, 3, 2] = value
    return values


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"source_id": ORDER[1:], "text_embeds": VALUES[1:]}, r"lacks classes[\s\S]*1 of 3 missing: sea lion"),
        ({"source_id": ["cat", *ORDER[1:]], "text_embeds": VALUES}, r"twice[\s\S]*cat"),
        ({"source_id": ORDER, "text_embeds": changed(3, np.nan)}, r"NaN[\s\S]*source_id dog"),
        ({"source_id": ORDER, "text_embeds": changed(2, 1e6)}, r"too large for float16[\s\S]*source_id cat"),
        ({"source_id": ORDER, "text_embeds": VALUES, "text_mask": np.zeros((4, 16), int)}, "no token that counts"),
        ({"source_id": ORDER, "text_embeds": VALUES, "text_mask": np.full((4, 16), 2)}, "no table of text"),
        ({"source_id": ORDER, "text_embeds": VALUES, "text_mask": np.ones((4, 8), int)}, "no table of text"),
        ({"source_id": ORDER, "text_embeds": VALUES[:, :8]}, r"no table of text[\s\S]*\[3, 8, 6\]"),
        ({"source_id": ORDER, "text_embeds": ORDER}, "no table of text"),
        ({"source_id": ORDER, "vectors": VALUES}, r"no table of text[\s\S]*columns source_id"),
        ({"class": ORDER, "text_embeds": VALUES}, r"no table of text[\s\S]*source_id or name"),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_a_table_that_does_not_fit_says_why(tmp_path: Path, suffix: str, columns: Any, message: str) -> None:
    with pytest.raises(D2CError, match=message):
        text_table.load(write(tmp_path / f"bad{suffix}", **columns), CLASSES)


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    pq.write_table(ragged(), tmp_path / "ragged.parquet")
    np.savez(tmp_path / "objects.npz", source_id=np.array(ORDER, dtype=object), text_embeds=VALUES)
    (tmp_path / "broken.npz").write_bytes(b"PK")
    for name, message in {
        "ragged.parquet": "rows of",
        "objects.npz": "no table of text",
        "broken.npz": "no table of text",
        "absent.npz": "no such table",
    }.items():
        with pytest.raises(D2CError, match=message):
            text_table.load(tmp_path / name, CLASSES)


def test_what_the_mask_hides_may_be_anything(tmp_path: Path) -> None:
    mask = np.ones((4, 16), np.uint8)
    mask[:, 3] = 0
    path = write(tmp_path / "t.npz", source_id=ORDER, text_embeds=changed(2, np.nan), text_mask=mask)
    assert np.isfinite(text_table.load(path, CLASSES).embeds).all()


def test_a_table_is_attached_and_packed_and_attached_again_when_its_bytes_change(
    workspace: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "mine.npz", source_id=ORDER, text_embeds=VALUES)
    request = pack_request(workspace, tmp_path / "shards", per_class=4, text=str(path), vision="none")
    pipeline.pack(request)
    artifact = open_artifact(tmp_path / "shards")
    np.testing.assert_array_equal(artifact.table("text_embeds"), EXPECTED)
    assert [row.prompt for row in artifact.classes] == ["", "", ""]
    said = artifact.manifest["encoders"]["text"]
    assert (said["name"], said["source"]) == ("table", "file:mine.npz")
    assert "prompt_template" not in said
    assert str(tmp_path) not in (tmp_path / "shards" / "manifest.json").read_text()

    config = pipeline.attachment_config(request, pipeline.current_selection(workspace))
    assert not attachment.plan(config).text_reasons
    write(path, source_id=ORDER, text_embeds=VALUES + 1)
    assert attachment.plan(config).text_reasons


def test_which_synonyms_were_asked_for_is_recorded(workspace: Path) -> None:
    pipeline.select(pack_request(workspace, workspace, per_class=4).wanted)
    for synonyms in ("first", "all"):
        config = attachment.AttachmentConfig(
            workspace=workspace,
            selection=pipeline.current_selection(workspace),
            vision=None,
            grid=4,
            synonyms=synonyms,
            device="cpu",
        )
        name = attachment.run(attachment.plan(config)).text
        summary = Workspace(workspace).text(str(name)).require("").summary
        assert (summary["prompt_template"], summary["synonyms"]) == ("a photo of a {class}", synonyms)
