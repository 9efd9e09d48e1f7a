"""The memorisation clock: how much better a model denoises what it was trained on than what it never saw.

Both losses are of the averaged weights, on the same noise and times, by quarter of the noise: copying shows first
where little noise is left, or where much is, long before samples show it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2c import batches, runtime
from d2c.errors import D2CError
from d2c.latents import LatentSpec, open_codec, to_model
from d2c.pictures import class_numbers
from d2c.sampling import Predictor
from d2c.sources import open_source
from d2c.transport import Objective
from formats import Artifact
from formats.schema import LATENT

IMAGES = 256
"""Of either kind, at most."""
FEWEST = 16
BINS, _TIMES = 4, 8
_BATCH = 64
RISING = 3
"""Readings without a new lowest held-out loss after which a person is told."""


@dataclass(frozen=True)
class Set:
    """Images that a model is judged on: latents f4 [n, C, H, W] as it reads them, and labels i8 [n]."""

    latents: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Clock:
    """Reads the losses of a model on ``train`` and ``held_out``; ``text`` are tables by class, where it reads any.

    ``blind``: the model is told no class of either, since the artifact's are clusters: an unseen image has none.
    """

    train: Set
    held_out: Set
    text: tuple[Tensor, Tensor] | None
    objective: Objective
    seed: int
    blind: bool = False

    @staticmethod
    def open(
        artifact: Artifact, held_out: str, objective: Objective, *, text: bool, seed: int, device: torch.device
    ) -> Clock:
        """Encode images of the source ``held_out`` as the artifact's were; those that are in the artifact are left out.

        Raises:
            D2CError: there are too few others, or the artifact's codec cannot be had.
        """
        latent = LatentSpec.from_dict(artifact.manifest["latent"])
        rows = np.sort(runtime.rng("clock", seed).permutation(len(artifact))[:IMAGES])
        raw = torch.from_numpy(artifact.stack(LATENT, rows)).to(device)
        known = Set(to_model(raw, latent), torch.from_numpy(artifact.labels[rows].astype(np.int64)).to(device))
        tables = [torch.from_numpy(artifact.table(name)).to(device) for name in ("text_embeds", "text_mask") if text]
        return Clock(
            train=known,
            held_out=_unseen(artifact, held_out, latent, seed, device),
            text=(tables[0].float(), tables[1]) if text else None,
            objective=objective,
            seed=seed,
            blind=has_clusters(artifact),
        )

    def read(self, model: Predictor) -> dict[str, list[float] | float]:
        """Mean losses by quarter of the noise, the least first, and overall, with standard errors over images."""
        found: dict[str, list[float] | float] = {}
        for name, images in (("train", self.train), ("held_out", self.held_out)):
            losses = self._losses(model, images)
            quarters = losses.reshape(len(losses), BINS, -1).mean(axis=(0, 2))
            own = losses.mean(axis=1)
            found |= {
                f"{name}_bins": [round(float(value), 6) for value in quarters],
                name: round(float(own.mean()), 6),
                f"{name}_stderr": round(float(own.std(ddof=1) / len(own) ** 0.5), 6),
            }
        return found

    @torch.no_grad()
    def _losses(self, model: Predictor, images: Set) -> np.ndarray[Any, np.dtype[np.float64]]:
        """[n, times]; every image meets the same noise."""
        device, columns = images.latents.device, []
        for j in range(_TIMES):
            generator = runtime.generator("clock", self.seed, j)
            noise = torch.randn(images.latents.shape[1:], generator=generator).to(device)
            t = torch.full((_BATCH,), (j + 0.5) / _TIMES, device=device)
            found = []
            for start in range(0, len(images), _BATCH):
                latents, labels = (values[start : start + _BATCH] for values in (images.latents, images.labels))
                times, same = t[: len(labels)], noise.expand_as(latents)
                text, mask = (table[labels] for table in self.text) if self.text else (None, None)
                z_t = self.objective.corrupt(latents, same, times)
                null = torch.ones_like(labels, dtype=torch.bool) if self.blind else None
                output = model(z_t, self.objective.model_time(times), labels, text, mask, null=null)
                found.append(self.objective.loss(output, latents, same, times))
            columns.append(torch.cat(found).double().cpu().numpy())
        return np.stack(columns, axis=1)


def has_clusters(artifact: Artifact) -> bool:
    """Whether the classes were found in the images (``d2c score --labels clusters:K``)."""
    return _labels(artifact).startswith("clusters")


def _labels(artifact: Artifact) -> str:
    return str(artifact.manifest["source"].get("labels", "source"))


def _unseen(artifact: Artifact, location: str, latent: LatentSpec, seed: int, device: torch.device) -> Set:
    # Without classes of their own all images are of one: that of `--labels none`, or none that counts.
    source = open_source(location, labels="source" if _labels(artifact) == "source" else "none")
    if has_clusters(artifact):
        numbers = np.zeros(len(source), dtype=np.int64)
    else:
        numbers = class_numbers(source.classes, artifact.classes)[source.labels]
    trained = {artifact.info(row).get("source_xxh3") for row in range(len(artifact))}
    order = [int(row) for row in runtime.rng("held out", seed).permutation(len(source)) if numbers[row] >= 0]
    codec = open_codec("rgb" if latent.codec == "rgb" else latent.encoder, latent.pixels, device)
    raw: list[np.ndarray[Any, Any]] = []
    labels: list[int] = []
    for batch in batches.load(source, order, latent.pixels, batch=_BATCH):
        new = [row for row, digest in enumerate(batch.digests) if digest not in trained][: IMAGES - len(labels)]
        if new:
            raw.append(codec.encode(batch.pixels[new]))
            labels += numbers[batch.indices[new]].tolist()
        if len(labels) == IMAGES:
            break
    if len(labels) < FEWEST:
        raise D2CError(
            "there are too few held-out images to tell whether the model memorises",
            where=location,
            found=f"{len(labels)} readable images of the artifact's classes that it does not hold",
            expected=f"at least {FEWEST}",
            hint="name a source with the same classes and other images, such as the one that was scored",
        )
    latents = to_model(torch.from_numpy(np.concatenate(raw)).to(device), latent)
    return Set(latents, torch.tensor(labels, device=device))


def since_lowest(readings: list[dict[str, Any]]) -> int:
    """How many readings have come since the held-out loss was lowest."""
    values = [float(reading["held_out"]) for reading in readings]
    return len(values) - 1 - int(np.argmin(values)) if values else 0
