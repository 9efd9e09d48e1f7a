"""Clusters in place of labels: repeatable, separating what differs, and honest about what cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from images_fixture import encoded, png, real_data, write_tree
from PIL import Image

from d2c import clusters
from d2c.clusters import FeatureSpace, cluster, cluster_names, edges_and_colours
from d2c.errors import UsageError
from d2c.sources import Source, open_source, relabel


def striped(kind: str, seed: int) -> bytes:
    """20 px, one of three designs with noise: vertical stripes, horizontal stripes, or red."""
    pixels = np.random.default_rng(seed).integers(0, 40, (20, 20, 3))
    if kind == "vertical":
        pixels[:, (np.arange(20) // 4) % 2 == 0] += 200
    elif kind == "horizontal":
        pixels[(np.arange(20) // 4) % 2 == 0] += 200
    else:
        pixels[..., 0] += 200
    return encoded(Image.fromarray(pixels.astype(np.uint8)))


@pytest.fixture
def designs(tmp_path: Path) -> Source:
    kinds = ("horizontal", "red", "vertical")
    return open_source(
        write_tree(
            tmp_path,
            {f"{kind}/{i:02d}.png": striped(kind, i + 100 * n) for n, kind in enumerate(kinds) for i in range(20)},
        )
    )


def same_partition(a: npt.NDArray[np.int32], b: npt.NDArray[np.int32]) -> bool:
    return len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(set(a.tolist())) == len(set(b.tolist()))


def test_clusters_find_what_differs(designs: Source) -> None:
    labels = cluster(designs, 3)
    assert labels.dtype == np.int32
    assert same_partition(labels, designs.labels)
    source = relabel(designs, labels, cluster_names(labels))
    assert [entry.name for entry in source.classes] == ["cluster 000", "cluster 001", "cluster 002"]


def test_clusters_are_repeatable_with_any_number_of_threads(designs: Source) -> None:
    first = cluster(designs, 7, threads=1)
    np.testing.assert_array_equal(first, cluster(designs, 7, threads=3))
    assert (first != cluster(designs, 7, seed=1)).any()


def test_unreadable_pictures_move_no_other(designs: Source, tmp_path: Path) -> None:
    before = cluster(designs, 3)
    broken = {"horizontal/!.png": b"broken", "red/!.png": b"broken"}
    source = open_source(write_tree(tmp_path, broken))
    readable = np.array([key not in broken for key in source.keys])
    after = cluster(source, 3)
    assert after[~readable].tolist() == [0, 0]
    np.testing.assert_array_equal(after[readable], before)


def test_features_may_be_given(designs: Source) -> None:
    seen: list[tuple[int, ...]] = []

    def redness(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        seen.append(pixels.shape)
        mean = pixels.mean(axis=(1, 2), dtype=np.float32)
        return mean[:, :1] - mean[:, 1:2]

    labels = cluster(designs, 2, features=FeatureSpace("redness", 8, redness))
    assert seen == [(60, 8, 8, 3)]
    assert same_partition(labels, (designs.labels == 1).astype(np.int32))


def test_equal_pictures_give_fewer_clusters_without_gaps(tmp_path: Path) -> None:
    source = open_source(write_tree(tmp_path, {f"a/{i}.png": png(16, 16, i % 2) for i in range(12)}))
    labels = cluster(source, 5)
    assert sorted(set(labels.tolist())) == list(range(int(labels.max()) + 1))
    assert len(set(labels.tolist())) <= 5


def test_more_clusters_than_pictures_are_refused(designs: Source) -> None:
    with pytest.raises(UsageError, match="fewer pictures than clusters"):
        cluster(designs, 61)


@pytest.mark.parametrize(("labels", "k"), [("clusters:100", 100), ("source", None), ("none", None)])
def test_the_option(labels: str, k: int | None) -> None:
    assert clusters.wanted(labels) == k


@pytest.mark.parametrize("labels", ["clusters", "clusters:", "clusters:1", "clusters:x", "clusters:-3", "clusters:2.5"])
def test_the_option_without_a_number(labels: str) -> None:
    with pytest.raises(UsageError, match="clusters need a number"):
        clusters.wanted(labels)


def test_description_of_a_picture_without_edges() -> None:
    flat = edges_and_colours(np.full((2, 16, 16, 3), 90, np.uint8))
    assert flat.shape == (2, 176)
    assert flat.dtype == np.float32
    assert not flat[:, :128].any()
    assert np.isfinite(flat).all()


def test_description_keeps_edges_under_a_change_of_contrast() -> None:
    low = np.random.default_rng(0).integers(0, 100, (4, 16, 16, 3))
    a, b = edges_and_colours(low.astype(np.uint8)), edges_and_colours((2 * low).astype(np.uint8))
    np.testing.assert_allclose(a[:, :128], b[:, :128], atol=1e-3)
    np.testing.assert_allclose(2 * a[:, 128:], b[:, 128:], atol=1e-5)


@pytest.mark.slow
def test_clusters_of_cifar10_tell_of_its_classes() -> None:
    from sklearn.metrics import normalized_mutual_info_score

    source = open_source(real_data("cifar10-train.parquet"))
    rows = np.arange(0, len(source), 10)
    described = [
        edges_and_colours(batch.pixels) for batch in clusters.batches.load(source, rows.tolist(), 16, batch=500)
    ]
    labels = clusters._k_means(np.concatenate(described), 10, 0)
    # Chance is 0.004 with 5,000 pictures.
    assert normalized_mutual_info_score(source.labels[rows], labels) > 0.09
