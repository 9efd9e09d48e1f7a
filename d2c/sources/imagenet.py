"""The 1,000 classes of ImageNet-1k, from the lists that timm ships."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

_SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ImageNetClass:
    """``id`` is the official index 0..999, ``source_id`` the WordNet synset, ``name`` its first lemma."""

    id: int
    source_id: str
    name: str


@cache
def imagenet_classes() -> tuple[ImageNetClass, ...]:
    """All 1,000 classes in official order; a few share a name (crane the bird, crane the machine)."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    synsets = [info.index_to_label_name(index) for index in range(1000)]
    return tuple(
        ImageNetClass(index, synset, info.label_name_to_description(synset).split(",")[0].strip())
        for index, synset in enumerate(synsets)
    )


def imagenet_order(source_ids: Sequence[str]) -> list[ImageNetClass] | None:
    """The ImageNet class of each id, or None where one of them is not an ImageNet-1k synset."""
    # Most data has no synsets: decide that without importing timm, which takes seconds.
    if not source_ids or not all(_SYNSET.fullmatch(source_id) for source_id in source_ids):
        return None
    known = {entry.source_id: entry for entry in imagenet_classes()}
    if not all(source_id in known for source_id in source_ids):
        return None
    return [known[source_id] for source_id in source_ids]


def synsets_by_name(names: Sequence[str]) -> list[str] | None:
    """The 1,000 synsets, where ``names`` are ImageNet-1k's class names in official order as hubs spell them."""
    if len(names) != 1000:
        return None
    official = imagenet_classes()
    pairs = zip(names, official, strict=True)
    same = sum(name.split(",")[0].strip().lower() == entry.name.lower() for name, entry in pairs)
    # Spellings of a few names differ between published lists.
    return [entry.source_id for entry in official] if same >= 950 else None
