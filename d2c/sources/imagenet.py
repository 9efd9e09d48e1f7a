"""The 1,000 classes of ImageNet-1k, from the lists that timm ships, and its layout on disk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_SYNSET = re.compile(r"n\d{8}")
# "n01440764 tench, Tinca tinca", and in the devkit "n02119789 1 kit_fox".
_NAMED = re.compile(r"(n\d{8})\s+(?:\d+\s+)?(\S.*)")
_NAME_FILES = ("LOC_synset_mapping.txt", "synset_words.txt", "devkit/data/map_clsloc.txt")
# Where the archives put the pictures, seen from the folders that a person may name.
_TAILS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")


@dataclass(frozen=True)
class ImageNetClass:
    """``id`` is the official index 0..999, ``source_id`` the WordNet synset, ``name`` its first lemma."""

    id: int
    source_id: str
    name: str


@cache
def imagenet_classes() -> tuple[ImageNetClass, ...]:
    """All 1,000 classes in official order, which is that of their synsets; a few share a name (crane, twice)."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    synsets = [info.index_to_label_name(index) for index in range(1000)]
    return tuple(
        ImageNetClass(index, synset, _first_lemma(info.label_name_to_description(synset)))
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


def imagenet_note(source_ids: Sequence[str]) -> str | None:
    """What a person must hear of classes that are nearly ImageNet's: some are missing, or some are not its own."""
    synsets = [source_id for source_id in source_ids if _SYNSET.fullmatch(source_id)]
    if not synsets:
        return None
    known = [entry.source_id for entry in imagenet_classes()]
    ours = set(synsets) & set(known)
    strange = [source_id for source_id in source_ids if source_id not in ours]
    if ours and strange:
        return f"not taken as ImageNet: {len(ours)} classes are of its 1,000, {len(strange)} are not: {_few(strange)}"
    missing = [synset for synset in known if synset not in ours]
    if ours and missing:
        return f"{len(ours)} of ImageNet's 1,000 classes; missing: {_few(missing)}"
    return None


def synsets_by_name(names: Sequence[str]) -> list[str] | None:
    """The 1,000 synsets, where ``names`` are ImageNet-1k's class names in official order as hubs spell them."""
    if len(names) != 1000:
        return None
    official = imagenet_classes()
    pairs = zip(names, official, strict=True)
    same = sum(_first_lemma(name).lower() == entry.name.lower() for name, entry in pairs)
    # Spellings of a few names differ between published lists.
    return [entry.source_id for entry in official] if same >= 950 else None


def imagenet_pictures(path: Path) -> Path | None:
    """The folder with ``train/`` inside an unpacked ImageNet, of which ``path`` is an upper folder."""
    return next((path / tail for tail in _TAILS if (path / tail / "train").is_dir()), None)


def names_beside(base: Path, source_ids: Iterable[str]) -> dict[str, str]:
    """Synset -> name from the list that comes with ImageNet, in ``base`` or up to four folders above it; {} if none."""
    if not any(_SYNSET.fullmatch(source_id) for source_id in source_ids):
        return {}
    base = base.resolve()
    for folder in [base, *base.parents[:4]]:
        for name in _NAME_FILES:
            if (folder / name).is_file():
                lines = (folder / name).read_text("utf-8", "replace").splitlines()
                found = [match.groups() for match in map(_NAMED.fullmatch, lines) if match]
                return {synset: _first_lemma(text.replace("_", " ")) for synset, text in found}
    return {}


def _first_lemma(text: str) -> str:
    return text.split(",", maxsplit=1)[0].strip()


def _few(synsets: Sequence[str]) -> str:
    return ", ".join(synsets[:5]) + (f" and {len(synsets) - 5} more" if len(synsets) > 5 else "")
