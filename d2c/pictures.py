"""Images in whatever form they are given to be measured: drawn by a run, in a source, an artifact or an .npz.

All have one side and classes by the numbers of one list; they are gone through in chunks and never all in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch

from d2c import batches
from d2c.errors import D2CError
from d2c.generator import Generator, sample_seeds
from d2c.latents import LatentCodec, LatentSpec, open_codec, to_model
from d2c.npz import Npz, open_npz
from d2c.progress import Progress, Silent
from d2c.sampling import SamplerConfig
from d2c.sources import Source, SourceClass, open_source
from formats import Artifact, open_artifact
from formats.hashing import xxh3_file
from formats.schema import LATENT, ClassRow

Array: TypeAlias = np.ndarray[Any, Any]
MANIFEST = "manifest.json"
_CHUNK = 256


@dataclass(frozen=True)
class Chunk:
    """n images. ``labels`` int64, -1 for none that is known; ``digests`` of the original files, "" without one;
    ``rows``: their numbers in the set, for `Pictures.pick`.
    """

    labels: Array
    pixels: Array
    digests: Array
    rows: Array


class Pictures(Protocol):
    """A set of images of ``side`` pixels; ``facts`` name it in a report, ``digest`` says whether it changed."""

    @property
    def side(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def __len__(self) -> int: ...

    def facts(self) -> dict[str, Any]: ...

    def chunks(self) -> Iterator[Chunk]: ...

    def pick(self, rows: Sequence[int]) -> Array: ...


def class_numbers(found: Sequence[SourceClass | ClassRow], classes: Sequence[ClassRow]) -> Array:
    """The number in ``classes`` of each class that was found, by what the data calls it: int64 [C], -1 without one."""
    known = {row.source_id: row.id for row in classes}
    return np.array([known.get(one.source_id, -1) for one in found], dtype=np.int64)


def classes_of(source: Source) -> list[ClassRow]:
    """The classes of a source in its own order, where nothing else numbers them."""
    counts = np.bincount(source.labels, minlength=len(source.classes))
    return [
        ClassRow(id=number, name=one.name, source_id=one.source_id, prompt="", count=int(counts[number]))
        for number, one in enumerate(source.classes)
    ]


@dataclass(frozen=True, eq=False)
class Drawn:
    """Images of a run; any can be drawn again from its seed."""

    generator: Generator
    count: int
    sampler: SamplerConfig
    seed: int
    batch: int
    labels: Literal["balanced", "random"] = "balanced"
    progress: Progress = field(default_factory=Silent, repr=False)

    @property
    def side(self) -> int:
        return self.generator.codec.spec.pixels

    @property
    def digest(self) -> str:
        return ""  # the request and the generator's own digests say it all

    def __len__(self) -> int:
        return self.count

    def facts(self) -> dict[str, Any]:
        return {"kind": "run", "name": self.generator.path.name, "images": self.count}

    def chunks(self) -> Iterator[Chunk]:
        labels, start = self._labels(), 0
        seeds = sample_seeds(self.seed, self.count)
        stream = self.generator.stream(labels, seeds, self.sampler, batch=self.batch, progress=self.progress)
        for pixels in stream:
            rows = np.arange(start, start + len(pixels))
            yield Chunk(labels[rows], pixels, np.full(len(rows), "", "U32"), rows)
            start += len(pixels)

    def pick(self, rows: Sequence[int]) -> Array:
        labels, seeds = self._labels(), sample_seeds(self.seed, self.count)
        return self.generator.pixels(labels[rows], [seeds[row] for row in rows], self.sampler, batch=self.batch)

    def _labels(self) -> Array:
        return self.generator.labels(self.labels, self.seed, self.count)


@dataclass(frozen=True, eq=False)
class FromSource:
    """The readable images at ``rows`` of a source, cropped to ``side``; ``without``: contents to leave out."""

    source: Source
    rows: Sequence[int]
    side: int
    numbers: Array
    without: frozenset[str] = frozenset()

    @property
    def digest(self) -> str:
        return self.source.digest

    def __len__(self) -> int:
        return len(self.rows)

    def facts(self) -> dict[str, Any]:
        return {"kind": self.source.kind, "name": self.source.name, "digest": self.digest, "images": len(self)}

    def chunks(self) -> Iterator[Chunk]:
        for batch in batches.load(self.source, self.rows, self.side, batch=_CHUNK):
            new = np.array([digest not in self.without for digest in batch.digests], dtype=bool)
            labels = self.numbers[self.source.labels[batch.indices[new]]]
            yield Chunk(labels, batch.pixels[new], np.array(batch.digests, "U32")[new], batch.indices[new])

    def pick(self, rows: Sequence[int]) -> Array:
        return np.concatenate([batch.pixels for batch in batches.load(self.source, rows, self.side, batch=_CHUNK)])


@dataclass(frozen=True, eq=False)
class FromArtifact:
    """Training images as a model knows them: stored latents at ``rows``, decoded."""

    artifact: Artifact
    rows: Sequence[int]
    codec: LatentCodec
    device: torch.device
    numbers: Array

    @property
    def side(self) -> int:
        return self._spec().pixels

    @property
    def digest(self) -> str:
        return self.artifact.content_id

    def __len__(self) -> int:
        return len(self.rows)

    def facts(self) -> dict[str, Any]:
        name, spec = str(self.artifact.manifest["name"]), self._spec()
        return {"kind": "artifact", "name": name, "digest": self.digest, "images": len(self), "latents": spec.codec}

    def chunks(self) -> Iterator[Chunk]:
        labels = self.numbers[np.asarray(self.artifact.labels, dtype=np.int64)]
        for start in range(0, len(self), _CHUNK):
            rows = list(self.rows[start : start + _CHUNK])
            digests = np.array([self.artifact.info(row)["source_xxh3"] for row in rows], "U32")
            yield Chunk(labels[rows], self.pick(rows), digests, np.array(rows))

    def pick(self, rows: Sequence[int]) -> Array:
        latents = torch.from_numpy(self.artifact.stack(LATENT, np.asarray(rows))).to(self.device)
        return self.codec.decode(to_model(latents, self._spec()))

    def _spec(self) -> LatentSpec:
        return LatentSpec.from_dict(self.artifact.manifest["latent"])


@dataclass(frozen=True, eq=False)
class FromNpz:
    """Samples that somebody drew elsewhere."""

    npz: Npz
    digest: str
    classes: int

    @property
    def side(self) -> int:
        assert self.npz.shape is not None
        return self.npz.shape[1]

    def __len__(self) -> int:
        assert self.npz.shape is not None
        return self.npz.shape[0]

    def facts(self) -> dict[str, Any]:
        return {"kind": "npz", "name": self.npz.path.name, "digest": self.digest, "images": len(self)}

    def chunks(self) -> Iterator[Chunk]:
        labels = np.full(len(self), -1) if self.npz.labels is None else self.npz.labels
        labels = np.where((labels >= 0) & (labels < self.classes), labels, -1)
        start = 0
        for pixels in self.npz.chunks(_CHUNK):
            rows = np.arange(start, start + len(pixels))
            yield Chunk(labels[rows], pixels, np.full(len(rows), "", "U32"), rows)
            start += len(pixels)

    def pick(self, rows: Sequence[int]) -> Array:
        return self.npz.pick(rows)


@dataclass(frozen=True, eq=False)
class FromRun(FromNpz):
    """Samples that were drawn from a run for this."""

    run: str

    def facts(self) -> dict[str, Any]:
        return {"kind": "run", "name": self.run, "images": len(self)}


def is_npz(location: str) -> bool:
    """Whether a path is that of an .npz, by its name."""
    return location.lower().endswith(".npz")


def is_artifact(location: str) -> bool:
    """Whether a path is that of an artifact."""
    return (Path(location) / MANIFEST).is_file()


def samples_of(path: Path, classes: int) -> FromNpz:
    """The images of an .npz.

    Raises:
        D2CError: it holds none.
    """
    npz = open_npz(path)
    if npz.shape is None:
        raise D2CError("this .npz holds statistics and no images", where=path, expected="arr_0: uint8 [N, S, S, 3]")
    return FromNpz(npz, xxh3_file(path), classes)


def opened(location: str, side: int, classes: Sequence[ClassRow], codec: str | None, device: torch.device) -> Pictures:
    """All images of an artifact, an .npz or a source, of ``side`` pixels.

    Raises:
        D2CError: there are none, or they are of another size.
    """
    found: Pictures
    if is_npz(location):
        found = samples_of(Path(location), len(classes))
    elif is_artifact(location):
        found = decoded(open_artifact(location), classes, codec, device)
    else:
        source = open_images(location)
        require_side(source, side)
        found = FromSource(source, range(len(source)), side, class_numbers(source.classes, classes))
    if found.side != side:
        raise other_size(location, found.side, side)
    return found


def decoded(artifact: Artifact, classes: Sequence[ClassRow], codec: str | None, device: torch.device) -> FromArtifact:
    """The images of an artifact, by ``codec`` or by that which its manifest names.

    Raises:
        D2CError: the decoder cannot be had.
    """
    spec = LatentSpec.from_dict(artifact.manifest["latent"])
    name = codec or ("rgb" if spec.codec == "rgb" else spec.encoder)
    numbers = class_numbers(artifact.classes, classes)
    return FromArtifact(artifact, range(len(artifact)), open_codec(name, spec.pixels, device), device, numbers)


def is_part(pictures: Pictures) -> bool:
    """Whether images were left out of what they were taken from."""
    if isinstance(pictures, FromSource):
        return len(pictures) < len(pictures.source)
    return isinstance(pictures, FromArtifact) and len(pictures) < len(pictures.artifact)


def open_images(location: str) -> Source:
    """A source, its classes taken where it has any.

    Raises:
        D2CError: there are no images.
    """
    try:
        return open_source(location)
    except D2CError as error:
        try:
            return open_source(location, labels="none")
        except D2CError:
            raise error from None


def require_side(source: Source, side: int) -> None:
    """Raises: D2CError: the source's images are smaller than ``side``: enlarged, they would be compared blurred."""
    smaller = batches.probe(source).median_side
    if smaller < side:
        raise other_size(source.location, smaller, side)


def other_size(where: object, found: int, expected: int) -> D2CError:
    """What to say of images of ``found`` px beside judged ones of ``expected`` px."""
    return D2CError(
        "images of different sizes cannot be compared",
        where=str(where),
        found=f"{found} px",
        expected=f"{expected} px, as the judged images have",
        hint="name images of that size, or larger ones in a folder: those are cropped and scaled down",
    )
