"""Duplicates and leaks: what is planted is found, what differs is not, and what stays follows the rule."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images_fixture import encoded
from PIL import Image, ImageEnhance, ImageOps

from d2c import phash
from d2c.duplicates import KEEP, Found, find, fingerprints, leaks, resolve
from d2c.errors import D2CError, UsageError
from d2c.images import center_crop

SIDE = 64
HASH = "a4333aa94100a1bd49c09646a6fb57a43d360904a4d98258b29c77f594d275c5"


def scene(seed: int) -> Image.Image:
    """A picture of coloured blobs with fine detail, like no other seed's."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize((88, 80), Image.Resampling.BICUBIC)
    return Image.fromarray(np.clip(np.asarray(coarse) + rng.normal(0, 8, (80, 88, 3)), 0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, "JPEG", quality=75)))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "saved again": jpeg,
    "half the size": lambda image: image.resize((44, 40), Image.Resampling.BICUBIC),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "mirrored": ImageOps.mirror,
    "mirrored and saved again": lambda image: jpeg(ImageOps.mirror(image)),
}


def stack(images: list[Image.Image]) -> npt.NDArray[np.uint8]:
    return np.stack([center_crop(image, SIDE) for image in images])


def listed(pixels: npt.NDArray[np.uint8], **columns: Any) -> pa.Table:
    digests, hashes = fingerprints(pixels)
    known: dict[str, Any] = {
        "key": [f"{i:05d}.png" for i in range(len(pixels))],
        "label": pa.array([0] * len(pixels), pa.int32()),
        "pixels_xxh3": digests,
        "phash": pa.array(hashes, pa.binary()),
    }
    return pa.table({**known, **columns})


def reader(pixels: npt.NDArray[np.uint8]) -> Callable[[npt.NDArray[np.int64]], Iterator[npt.NDArray[np.uint8]]]:
    return lambda rows: (pixels[rows[start : start + 3]] for start in range(0, len(rows), 3))


def found(pixels: npt.NDArray[np.uint8], **columns: Any) -> tuple[pa.Table, Found]:
    table = listed(pixels, **columns)
    return table, find(table, reader(pixels))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(2, 400), st.booleans())
def test_close_hashes_are_those_that_comparing_all_pairs_finds(seed: int, count: int, mirrored: bool) -> None:
    rng = np.random.default_rng(seed)
    seeds = rng.integers(0, 2**64, (max(1, count // 8), 4), dtype=np.uint64)
    bits = np.unpackbits(seeds[rng.integers(0, len(seeds), count)].view(np.uint8), axis=1)
    turned = np.packbits(bits ^ (rng.random(bits.shape) < rng.uniform(0, 0.2, (count, 1))), axis=1).view(np.uint64)
    turned[rng.random(count) < 0.5] ^= phash.MIRROR
    ours, theirs = np.triu_indices(count, 1)
    change = np.unpackbits(
        (turned[ours] ^ turned[theirs] ^ (phash.MIRROR * np.uint64(mirrored))).view(np.uint8), axis=1
    )
    near = (change[:, :64].sum(axis=1) <= phash.NEAR_LOW) & (change.sum(axis=1) <= phash.NEAR_ALL)
    close = phash.close(turned, mirrored=mirrored)
    assert close.pairs.tolist() == np.stack([ours[near], theirs[near]], axis=1).tolist()
    assert close.skipped == 0


@pytest.mark.parametrize("side", [32, 50, 256])
def test_the_hash_of_a_mirror_image_needs_no_second_look(side: int) -> None:
    pixels = np.random.default_rng(side).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    assert (phash.hashes(pixels[:, :, ::-1]) == phash.hashes(pixels) ^ phash.MIRROR).all()


def test_the_hash_is_the_same_on_every_machine() -> None:
    ramp = np.add.outer(np.arange(40) ** 2 % 97, np.arange(40) * 5 % 61).astype(np.uint8)
    assert fingerprints(np.repeat(ramp[None, ..., None], 3, axis=3))[1][0].hex() == HASH


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found_and_nothing_else(change: str) -> None:
    images = [scene(seed) for seed in range(40)]
    table, result = found(stack([*images, *map(CHANGES[change], images)]))
    assert result.pairs.shape == (40, 2)
    rows, summary = resolve(table, result, "first")
    assert summary == {"groups": 40, "images": 80, "removable": 40, "conflicts": 0, "examples": [], "skipped": 0}
    assert set(rows["kind"].to_pylist()) == {"mirrored" if "mirrored" in change else "near"}
    pairs = zip(rows["key"].to_pylist(), rows["twin"].to_pylist(), rows["kept"].to_pylist(), strict=True)
    assert sorted(pairs) == [(f"{i:05d}.png", f"{(i + 40) % 80:05d}.png", i < 40) for i in range(80)]


def test_flat_pictures_are_duplicates_only_where_they_are_equal() -> None:
    rng = np.random.default_rng(0)
    colours = np.unique(rng.integers(0, 256, (300, 3), dtype=np.uint8), axis=0)
    flat = np.broadcast_to(colours[:, None, None], (len(colours), SIDE, SIDE, 3))
    black = np.zeros((50, SIDE, SIDE, 3), dtype=np.uint8)
    noisy = 128 + rng.integers(-1, 2, (300, SIDE, SIDE, 3)).astype(np.uint8)
    table, result = found(np.concatenate([flat, noisy, black]))
    rows, summary = resolve(table, result, "first")
    assert result.candidates == 0
    assert (summary["groups"], summary["images"], summary["removable"]) == (1, 50, 49)
    assert set(rows["kind"].to_pylist()) == {"exact"}


def test_a_crowd_of_alike_hashes_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    crowd = np.tile(rng.integers(0, 2**64, (1, 4), dtype=np.uint64), (200, 1))
    crowd[:, 1] = rng.integers(0, 2**64, 200, dtype=np.uint64)
    apart = np.tile(rng.integers(0, 2**64, (1, 4), dtype=np.uint64), (2, 1))
    monkeypatch.setattr(phash, "_CROWD", 10_000)
    close = phash.close(np.concatenate([crowd, apart]))
    assert close.skipped >= 200 * 200
    assert close.pairs.tolist() == [[200, 201]]


def test_pairs_beyond_what_memory_holds_are_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = np.tile(np.random.default_rng(0).integers(0, 2**64, (1, 4), dtype=np.uint64), (50, 1))
    monkeypatch.setattr(phash, "_FOUND", 100)
    close = phash.close(alike)
    assert len(close.pairs) == 50 * 49 / 2
    assert close.skipped == 2 * 50 * 50


@pytest.mark.parametrize(("keep", "kept"), [("first", 0), ("largest", 1), ("easiest", 2), ("hardest", 3)])
def test_the_rule_says_which_one_stays(keep: Any, kept: int) -> None:
    pixels = stack([scene(0)] * 2 + [jpeg(scene(0))] * 2)
    facts = {"width": [8, 9, 9, 8], "height": [8] * 4, "bytes": [1, 3, 2, 9], "score": [0.5, 0.5, 0.1, 0.9]}
    table, result = found(pixels, **facts)
    rows, _ = resolve(table, result, keep)
    assert rows["kept"].to_pylist() == [row == kept for row in range(4)]
    alike = rows.filter(pc.invert(rows["kept"]))
    assert set(alike["twin"].to_pylist()) == {f"{kept:05d}.png"}
    assert alike["kind"].to_pylist().count("exact") == 1


@pytest.mark.parametrize("keep", KEEP)
def test_ties_go_to_the_smaller_key(keep: Any) -> None:
    same = {name: [1, 1, 1] for name in ("width", "height", "bytes", "score")}
    table, result = found(stack([scene(0), jpeg(scene(0)), scene(0)]), **same)
    assert resolve(table, result, keep)[0]["kept"].to_pylist() == [True, False, False]


def test_an_unknown_rule_is_refused() -> None:
    table, result = found(stack([scene(0)]))
    with pytest.raises(UsageError, match="rule"):
        resolve(table, result, "best")  # type: ignore[arg-type]


def test_duplicates_with_different_labels_are_conflicts_and_all_stay() -> None:
    pixels = stack([scene(0), scene(0), jpeg(scene(0)), jpeg(scene(0)), scene(1), scene(1)])
    table, result = found(pixels, label=pa.array([0, 1, 1, 1, 2, 2], pa.int32()))
    rows, summary = resolve(table, result, "first")
    assert rows["kept"].to_pylist() == [True, True, False, False, True, False]
    assert rows["conflict"].to_pylist() == [True] * 4 + [False] * 2
    assert (summary["conflicts"], summary["removable"]) == (1, 3)
    keys = [f"{i:05d}.png" for i in range(4)]
    assert summary["examples"] == [{"key_list": keys, "label_list": [0, 1, 1, 1]}]


def test_an_image_goes_only_where_its_own_duplicate_stays() -> None:
    table = listed(stack([scene(seed) for seed in range(3)]))
    # 0 is like 1 and 1 is like 2, but 0 is not like 2.
    pairs = np.array([[0, 1], [1, 2]])
    chain = Found(np.arange(3), pairs, np.array([False, True]), np.array([0.4, 0.1], dtype=np.float32), 2, 0)
    rows, _ = resolve(table, chain, "first")
    assert rows["group"].to_pylist() == [0, 0, 0]
    assert rows["kept"].to_pylist() == [True, False, True]
    assert rows["twin"].to_pylist() == ["00001.png", "00000.png", "00001.png"]
    assert rows["kind"].to_pylist() == ["near", "near", "mirrored"]


def test_the_order_of_the_rows_does_not_matter() -> None:
    images = [scene(seed % 9) for seed in range(30)]
    pixels = stack([change(image) for change in (jpeg, ImageOps.mirror) for image in images])
    table = listed(pixels, label=pa.array(np.arange(60) % 2, pa.int32()))
    expected, summary = resolve(table, find(table, reader(pixels)), "first")
    order = np.random.default_rng(0).permutation(60)
    shuffled = table.take(pa.array(order))
    rows, again = resolve(shuffled, find(shuffled, reader(pixels[order])), "first")
    assert rows.equals(expected)
    assert again == summary


def test_a_source_without_duplicates_gives_an_empty_table() -> None:
    table, result = found(stack([scene(seed) for seed in range(5)]))
    rows, summary = resolve(table, result, "first")
    assert rows.num_rows == 0
    assert summary["groups"] == summary["removable"] == 0


def test_leaks_name_the_nearest_held_out_image_and_leave_the_source_alone() -> None:
    source = stack([scene(0), scene(1), scene(2), scene(3), jpeg(scene(0))])
    held_out = stack([scene(9), jpeg(scene(1)), scene(0), ImageOps.mirror(scene(2)), scene(0), scene(1)])
    ours, theirs = listed(source), listed(held_out)
    result = find(pa.concat_tables([ours, theirs]), reader(np.concatenate([source, held_out])))
    rows = leaks(ours["key"].combine_chunks(), theirs["key"].combine_chunks(), result)
    found_pairs = list(zip(*(rows[name].to_pylist() for name in ("key", "held_out_key", "kind")), strict=True))
    assert found_pairs == [
        ("00000.png", "00002.png", "exact"),
        ("00001.png", "00005.png", "exact"),
        ("00002.png", "00003.png", "mirrored"),
        ("00004.png", "00002.png", "near"),
    ]
    # The held-out images tie no images of the source together: only 0 and 4 are duplicates there.
    assert resolve(ours, result, "first")[0]["key"].to_pylist() == ["00000.png", "00004.png"]


def test_an_image_that_cannot_be_read_again_is_an_error() -> None:
    pixels = stack([scene(0), jpeg(scene(0))])
    with pytest.raises(D2CError, match="1 of 2"):
        find(listed(pixels), lambda rows: [pixels[rows[:1]]])
