"""Batches in a fixed order, whatever the threads do and whatever is wrong with single pictures."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from images_fixture import encoded, jpeg, picture, png, two_classes, write_tree

from d2c.batches import Batch, load, probe
from d2c.errors import D2CError
from d2c.images import center_crop, decode
from d2c.sources import Source, open_source
from formats.hashing import xxh3


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_source(two_classes(tmp_path, each=10))


@dataclasses.dataclass
class SlowReader:
    """Pictures that take longer the earlier they stand in a batch, and a count of those asked for."""

    data: bytes
    delay: float = 0.0
    asked: int = 0

    def read(self, index: int) -> bytes:
        self.asked += 1
        time.sleep(self.delay * (3 - index % 3))
        return self.data

    def positions(self) -> npt.NDArray[np.int64]:
        return np.arange(1000)


def decoding_threads() -> int:
    return sum(thread.name.startswith("d2c-decode") for thread in threading.enumerate())


def whole(batches: Iterator[Batch]) -> list[Batch]:
    got = list(batches)
    for batch in got:
        assert batch.pixels.dtype == np.uint8
        assert batch.indices.dtype == np.int64
        assert len(batch) == len(batch.pixels) == len(batch.digests) == len(batch.sizes) == len(batch.crops)
    return got


@pytest.mark.parametrize("threads", [1, 5])
def test_order_is_the_one_given(source: Source, threads: int) -> None:
    order = np.random.default_rng(0).permutation(20).tolist()
    batches = whole(load(source, order, size=4, batch=6, threads=threads))
    assert [batch.indices.tolist() for batch in batches] == [order[0:6], order[6:12], order[12:18], order[18:]]
    for batch in batches:
        for row, index in enumerate(batch.indices):
            data = source.read(int(index))
            np.testing.assert_array_equal(batch.pixels[row], center_crop(decode(data), 4))
            assert batch.digests[row] == xxh3(data)
            assert batch.sizes[row] == len(data)
            assert batch.crops[row] == (8, 8, 8)


def test_order_holds_when_late_pictures_finish_first(source: Source) -> None:
    slow = dataclasses.replace(source, reader=SlowReader(png(), delay=0.004))
    assert [b.indices.tolist() for b in load(slow, list(range(9)), 4, 3, 3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_bad_pictures_leave_their_batch_smaller_and_move_no_other(tmp_path: Path) -> None:
    root = two_classes(tmp_path, each=4)
    (root / "cat/1.png").write_bytes(b"not a picture")
    whole_file = encoded(picture(64, 64), "JPEG")
    (root / "dog/0.png").write_bytes(whole_file[: len(whole_file) // 2])
    source = open_source(root)
    (root / "dog/1.png").unlink()
    batches = whole(load(source, range(8), size=8, batch=2))
    assert [batch.indices.tolist() for batch in batches] == [[0], [2, 3], [], [6, 7]]
    assert batches[2].pixels.shape == (0, 8, 8, 3)
    found = [(bad.key, bad.stage) for batch in batches for bad in batch.bad]
    assert found == [("cat/1.png", "decode"), ("dog/0.png", "decode"), ("dog/1.png", "read")]
    assert all(bad.reason for batch in batches for bad in batch.bad)


def test_crops_record_the_upright_size(tmp_path: Path) -> None:
    exif = picture(1, 1).getexif()
    exif[0x0112] = 6
    data = encoded(picture(30, 20), "JPEG", exif=exif)
    source = open_source(write_tree(tmp_path, {"a/1.jpg": data, "a/2.jpg": jpeg(30, 20)}))
    assert next(load(source, [0, 1], 8, 2)).crops == [(20, 30, 20), (30, 20, 20)]


def test_prefetch_is_bounded(source: Source) -> None:
    reader = SlowReader(png())
    batches = load(dataclasses.replace(source, reader=reader), [0] * 1000, 4, 10, 2)
    next(batches)
    time.sleep(0.2)
    assert reader.asked <= 30, "at most the batch in hand and two more"
    batches.close()  # type: ignore[attr-defined]  # the iterator is a generator


def test_stopping_early_ends_the_threads_and_drops_what_is_queued(source: Source) -> None:
    reader = SlowReader(png(), delay=0.005)
    batches = load(dataclasses.replace(source, reader=reader), [0] * 1000, 4, 50, 2)
    next(batches)
    assert decoding_threads() == 2
    before = reader.asked
    batches.close()  # type: ignore[attr-defined]  # the iterator is a generator
    assert decoding_threads() == 0
    assert reader.asked <= before + 4


def test_a_bug_in_a_reader_is_no_bad_picture(source: Source) -> None:
    class Broken(SlowReader):
        def read(self, index: int) -> bytes:
            raise ZeroDivisionError("bug")

    with pytest.raises(ZeroDivisionError):
        next(load(dataclasses.replace(source, reader=Broken(b"")), [0, 1], 4, 2))
    assert decoding_threads() == 0


def test_no_indices_give_no_batches(source: Source) -> None:
    assert list(load(source, [], 4, 2)) == []


@pytest.mark.parametrize(("size", "batch", "threads"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_impossible_sizes_fail_at_the_call(source: Source, size: int, batch: int, threads: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        load(source, [0], size, batch, threads)


def test_probe_of_equal_squares(source: Source) -> None:
    got = probe(source)
    assert (got.checked, got.bad, got.median_side, got.max_side, got.same_square) == (20, 0, 8, 8, True)


def test_probe_of_mixed_sizes(tmp_path: Path) -> None:
    files = {"a/1.png": png(40, 30), "a/2.jpg": jpeg(20, 60), "a/3.png": png(50, 50), "a/4.png": b"bad"}
    got = probe(open_source(write_tree(tmp_path, files)))
    assert (got.checked, got.bad, got.median_side, got.max_side, got.same_square) == (4, 1, 30, 60, False)


def test_probe_looks_at_an_even_sample(source: Source) -> None:
    reader = SlowReader(png())
    assert probe(dataclasses.replace(source, reader=reader), limit=5).checked == 5
    assert reader.asked == 5


def test_probe_of_nothing_readable(tmp_path: Path) -> None:
    with pytest.raises(D2CError, match="none of 1 images"):
        probe(open_source(write_tree(tmp_path, {"a/1.png": b"bad"})))
