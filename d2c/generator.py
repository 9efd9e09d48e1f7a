"""A finished run as a source of images: its averaged weights, text and codec, ready to sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2c import checkpoint, runtime
from d2c.errors import D2CError
from d2c.latents import LatentCodec, LatentSpec, open_codec
from d2c.progress import Progress, Silent
from d2c.runs import DONE, RUN, TEXT, Run
from d2c.sampling import SamplerConfig, sample
from d2c.scorers import Denoiser, load_denoiser
from formats.files import atomic, read_json
from formats.schema import ClassRow


@dataclass(frozen=True)
class Generator:
    """Draws images of a run. Image i is a function of the run, its label and its seed alone, up to rounding."""

    path: Path
    denoiser: Denoiser
    codec: LatentCodec
    classes: list[ClassRow]
    text: dict[str, Tensor]
    identity: dict[str, Any]
    artifact: Path
    device: torch.device

    @staticmethod
    def open(run: Path, device: torch.device, codec: str | None = None) -> Generator:
        """Open a run; ``codec`` overrides where the decoder is found (a folder, or a hub id).

        Raises:
            D2CError: this is no finished run, or its decoder cannot be had.
        """
        if not (run / DONE).exists():
            raise D2CError(
                "this is not a finished training run",
                where=run,
                found="a run that stopped before its last step" if (run / RUN).exists() else None,
                hint="run d2c train again to finish it"
                if (run / RUN).exists()
                else "give the folder that d2c train wrote",
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
            identity=facts["identity"],
            artifact=Run(run).artifact(),
            device=device,
        )

    def digests(self) -> dict[str, str]:
        """What the images depend on besides the request: the weights of the model and of the decoder."""
        return {
            "weights_xxh3": str(self.denoiser.origin["weights_xxh3"]),
            "decoder_xxh3": self.codec.spec.weights_xxh3,
        }

    def pixels(
        self,
        labels: np.ndarray[Any, np.dtype[np.int64]],
        seeds: Sequence[int],
        sampler: SamplerConfig,
        *,
        batch: int = 64,
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Images u1 [N, S, S, 3] for ``labels`` [N] and ``seeds`` [N]."""
        return np.concatenate(list(self.stream(labels, seeds, sampler, batch=batch)))

    def stream(
        self,
        labels: np.ndarray[Any, np.dtype[np.int64]],
        seeds: Sequence[int],
        sampler: SamplerConfig,
        *,
        batch: int = 64,
        progress: Progress | None = None,
    ) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
        """The images of `pixels`, at most ``batch`` at a time: as many as 50,000 of 256 px fill 10 GB."""
        progress = progress or Silent()
        spec = self.denoiser.spec
        with progress.bar("sample", len(seeds), "image") as bar:
            for start in range(0, len(seeds), batch):
                part = torch.from_numpy(labels[start : start + batch])
                latents = sample(
                    self.denoiser,
                    self.denoiser.objective,
                    (spec.channels, spec.input_size, spec.input_size),
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


def balanced_labels(count: int, classes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
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
