"""A finished run, or a published weight file, as a source of images: weights, text and codec, ready to sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2c import checkpoint, runtime
from d2c.entangled import draw
from d2c.errors import D2CError
from d2c.latents import LatentCodec, LatentSpec, open_codec
from d2c.progress import Progress, Silent
from d2c.runs import DONE, RUN, TEXT, WEIGHTS, Run
from d2c.sampling import SamplerConfig
from d2c.scorers import Denoiser, load_denoiser
from formats.files import atomic, read_json
from formats.schema import ClassRow

Labels: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
VAE_DOWNSAMPLE = 8
"""Pixels per latent value along a side of the SD VAE, which all published SiT and DiT were trained with."""
_RGB = 3


@dataclass(frozen=True)
class Generator:
    """Draws images of a model. Image i is a function of the model, its label and its seed alone, up to rounding."""

    path: Path
    denoiser: Denoiser
    codec: LatentCodec
    classes: list[ClassRow]
    text: dict[str, Tensor]
    device: torch.device
    run: dict[str, Any] | None
    """What the run was asked for; None for weights of others."""

    @staticmethod
    def open(
        source: Path, device: torch.device, codec: str | None = None, *, objective: str | None = None
    ) -> Generator:
        """Open a run, or weights that `load_denoiser` reads; ``codec`` says where the decoder is (rgb, vae, a folder).

        Weights of others need no ``codec`` where the SD VAE or plain pixels fit their channels; ``objective`` is for
        files that do not tell theirs.

        Raises:
            D2CError: this is no finished run and no weight file, or its decoder cannot be had.
        """
        if source.name == WEIGHTS and (source.parent / RUN).exists():
            source = source.parent
        is_run = source.is_dir() and not _is_weights(source)
        return _open_run(source, device, codec) if is_run else _open_weights(source, device, codec, objective)

    @property
    def identity(self) -> dict[str, Any]:
        """What the run was asked for.

        Raises:
            D2CError: these are weights of others.
        """
        return dict(self._of_run()["identity"])

    def guided(self, sampler: SamplerConfig) -> SamplerConfig:
        """The sampler with the guidance that this model can have; raises as `SamplerConfig.guided` does."""
        return sampler.guided(self.run["identity"]["recipe"]["class_dropout"] if self.run else None)

    @property
    def artifact(self) -> Path:
        """Where the artifact lies that the run was trained on; raises as `identity` does."""
        self._of_run()
        return Run(self.path).artifact()

    def _of_run(self) -> dict[str, Any]:
        if self.run is None:
            raise D2CError(
                "nothing is known of how these weights were trained",
                where=self.path,
                expected="the folder of a run that d2c train finished",
            )
        return self.run

    def digests(self) -> dict[str, str]:
        """What the images depend on besides the request: the weights of the model and of the decoder, and of which
        classes labels are drawn, where the run has images of some only.
        """
        known, all_of_them = len(with_images(self.classes)), len(self.classes)
        return {
            "weights_xxh3": str(self.denoiser.origin["weights_xxh3"]),
            "decoder_xxh3": self.codec.spec.weights_xxh3,
            **({"classes": f"{known} of {all_of_them}"} if known < all_of_them else {}),
        }

    def labels(self, kind: Literal["balanced", "random"], seed: int, count: int) -> Labels:
        """Classes [count] that the run has images of, equally often or at random."""
        return drawn_labels(kind, seed, count, self.classes)

    def pixels(
        self,
        labels: Labels,
        seeds: Sequence[int],
        sampler: SamplerConfig,
        *,
        batch: int = 64,
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Images u1 [N, S, S, 3] for ``labels`` [N] and ``seeds`` [N]."""
        return np.concatenate(list(self.stream(labels, seeds, sampler, batch=batch)))

    def stream(
        self,
        labels: Labels,
        seeds: Sequence[int],
        sampler: SamplerConfig,
        *,
        batch: int = 64,
        progress: Progress | None = None,
    ) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
        """The images of `pixels`, at most ``batch`` at a time: as many as 50,000 of 256 px fill 10 GB."""
        progress, sampler = progress or Silent(), self.guided(sampler)
        spec = self.denoiser.spec
        with progress.bar("sample", len(seeds), "image") as bar:
            for start in range(0, len(seeds), batch):
                part = torch.from_numpy(labels[start : start + batch])
                latents = draw(
                    self.denoiser,
                    spec,
                    self.denoiser.objective,
                    part,
                    seeds[start : start + batch],
                    sampler,
                    text=self.text["text_embeds"][part].float() if self.text else None,
                    text_mask=self.text["text_mask"][part] if self.text else None,
                    device=self.device,
                    batch=batch,
                )
                yield self.codec.decode(latents)
                bar.advance(len(part))


def _is_weights(folder: Path) -> bool:
    """Whether a folder holds a model that d2c did not train."""
    return not (folder / RUN).exists() and any((folder / name).exists() for name in ("config.json", "transformer"))


def _open_run(run: Path, device: torch.device, codec: str | None) -> Generator:
    if not (run / DONE).exists():
        raise D2CError(
            "this is not a finished training run",
            where=run,
            found="a run that stopped before its last step" if (run / RUN).exists() else None,
            hint="run d2c train again to finish it"
            if (run / RUN).exists()
            else "give the folder that d2c train wrote, or a weight file",
        )
    facts = read_json(run / RUN)
    spec = LatentSpec.from_dict(facts["latent"])
    name = codec or ("rgb" if spec.codec == "rgb" else spec.encoder)
    text, _ = checkpoint.load_tensors(run / TEXT)
    return Generator(
        path=run,
        denoiser=load_denoiser(str(run), device=device),
        codec=open_codec(name, spec.pixels, device),
        classes=[ClassRow(**row) for row in facts["classes"]],
        text=text,
        device=device,
        run=facts,
    )


def _open_weights(source: Path, device: torch.device, codec: str | None, objective: str | None) -> Generator:
    denoiser = load_denoiser(str(source), device=device, objective=objective)
    spec = denoiser.spec
    name = codec or ("rgb" if spec.channels == _RGB else "vae")
    opened = open_codec(name, spec.input_size * (1 if name == "rgb" else VAE_DOWNSAMPLE), device)
    found, expected = (opened.spec.channels, opened.spec.size), (spec.channels, spec.input_size)
    if found != expected:
        raise D2CError(
            "this codec does not fit the model",
            where=source,
            found=f"latents of {found[0]} channels, {found[1]} x {found[1]}",
            expected=f"{expected[0]} channels, {expected[1]} x {expected[1]}",
            hint="give the right one with --codec",
        )
    return Generator(
        path=source,
        denoiser=denoiser,
        codec=opened,
        classes=[ClassRow(number, str(number), str(number), "", 0) for number in range(spec.num_classes)],
        text={},
        device=device,
        run=None,
    )


def with_images(classes: Sequence[ClassRow]) -> Labels:
    """Numbers of the classes that a model was shown; of all, where nobody counted."""
    counted = [row.id for row in classes if row.count]
    return np.array(counted or [row.id for row in classes], dtype=np.int64)


def drawn_labels(kind: Literal["balanced", "random"], seed: int, count: int, classes: Sequence[ClassRow]) -> Labels:
    """`balanced_labels` or `random_labels` [count] of the classes that have images."""
    known = with_images(classes)
    places = balanced_labels(count, len(known)) if kind == "balanced" else random_labels(seed, count, len(known))
    return known[places]


def random_labels(seed: int, count: int, classes: int) -> Labels:
    """Labels drawn uniformly, each from its own seed: those of a longer run begin with those of a shorter one."""
    return np.array([runtime.seed_of("label", seed, index) % classes for index in range(count)], dtype=np.int64)


def balanced_labels(count: int, classes: int) -> Labels:
    """Labels 0, 1, ..., C-1, 0, 1, ...: every class equally often, to within one."""
    return np.arange(count, dtype=np.int64) % classes


def sample_seeds(seed: int, count: int) -> list[int]:
    """One seed per image; the first images of a longer run are those of a shorter one."""
    return [runtime.seed_of("sample", seed, index) for index in range(count)]


def grid(pixels: np.ndarray[Any, np.dtype[np.uint8]], columns: int, side: int | None = None) -> Image.Image:
    """Images u1 [N, S, S, 3] in rows of ``columns``; small ones are enlarged without smoothing to ``side`` pixels."""
    size = pixels.shape[1]
    scale = max(1, (side or size) // size)
    rows = -(-len(pixels) // columns)
    gap = 2
    cell = size * scale + gap
    sheet = np.full((rows * cell + gap, columns * cell + gap, 3), 255, dtype=np.uint8)
    for index, image in enumerate(pixels):
        top, left = gap + index // columns * cell, gap + index % columns * cell
        enlarged = image.repeat(scale, axis=0).repeat(scale, axis=1)
        sheet[top : top + size * scale, left : left + size * scale] = enlarged
    return Image.fromarray(sheet)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")
