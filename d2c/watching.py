"""What a person looks at while a run goes on: samples, curves, and whether the model memorises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2c import memorisation
from d2c.curves import Curve, sheet
from d2c.entangled import draw
from d2c.errors import D2CError
from d2c.generator import drawn_labels, grid, sample_seeds, save_png
from d2c.latents import LatentCodec, LatentSpec, open_codec
from d2c.log_writers import Writer
from d2c.memorisation import Clock
from d2c.progress import Progress
from d2c.runs import CURVES, SAMPLES, Run
from d2c.sampling import SamplerConfig
from d2c.sit import ModelSpec, SiT
from d2c.transport import Objective
from formats import Artifact

SHOWN = 16
_STEPS = 25
"""Of the sampler: enough to see what comes."""


@dataclass
class Watch:
    """Looks at a model's averaged weights; draws nothing that training depends on."""

    run: Run
    spec: ModelSpec
    objective: Objective
    codec: LatentCodec | None
    sampler: SamplerConfig
    labels: Tensor
    """Of the samples, int64 [SHOWN]: classes that the artifact has images of."""
    text: tuple[Tensor, Tensor] | None
    clock: Clock | None
    writers: Sequence[Writer]
    progress: Progress
    seed: int
    device: torch.device

    @staticmethod
    def open(
        run: Run,
        artifact: Artifact,
        spec: ModelSpec,
        objective: Objective,
        *,
        clock: Clock | None,
        writers: Sequence[Writer],
        seed: int,
        device: torch.device,
        progress: Progress,
        class_dropout: float,
    ) -> Watch:
        """Without the codec's weights there are no samples to look at, and a warning says so."""
        latent = LatentSpec.from_dict(artifact.manifest["latent"])
        codec = None
        try:
            codec = open_codec("rgb" if latent.codec == "rgb" else latent.encoder, latent.pixels, device)
        except D2CError as error:
            progress.warn(f"no samples are drawn on the way: {error.what}")
        text = None
        if spec.text_dim is not None:
            embeds, mask = (torch.from_numpy(artifact.table(name)) for name in ("text_embeds", "text_mask"))
            text = embeds.float(), mask
        labels = torch.from_numpy(drawn_labels("balanced", seed, SHOWN, artifact.classes))
        sampler = SamplerConfig(steps=_STEPS).guided(class_dropout)
        return Watch(run, spec, objective, codec, sampler, labels, text, clock, writers, progress, seed, device)

    def line(self, line: dict[str, Any]) -> None:
        """Pass a line of the log on."""
        values = {name: value for name, value in line.items() if name != "step" and value is not None}
        for writer in self.writers:
            writer.scalars(line["step"], values)

    def look(self, step: int, averaged: SiT) -> None:
        """Draw samples and curves, and read the clock."""
        self._sample(step, averaged)
        reading = self.clock.read(averaged) if self.clock else None
        if reading is not None:
            self.run.note_reading({"step": step, **reading})
            self._warn()
        png = self.run.path / CURVES
        save_png(sheet(self._charts()), png)
        for writer in self.writers:
            writer.picture(step, "curves", png)

    def close(self) -> None:
        """Finish the logs."""
        for writer in self.writers:
            writer.close()

    def _sample(self, step: int, averaged: SiT) -> None:
        if self.codec is None:
            return
        latents = draw(
            averaged,
            self.spec,
            self.objective,
            self.labels,
            sample_seeds(self.seed, SHOWN),
            self.sampler,
            text=self.text[0][self.labels] if self.text else None,
            text_mask=self.text[1][self.labels] if self.text else None,
            device=self.device,
            batch=SHOWN,
        )
        if not torch.isfinite(latents).all():
            return
        png = self.run.path / SAMPLES / f"{step:08d}.png"
        save_png(grid(self.codec.decode(latents), 8, side=64), png)
        for writer in self.writers:
            writer.picture(step, "samples", png)

    def _warn(self) -> None:
        readings = self.run.readings()
        if memorisation.since_lowest(readings) == memorisation.RISING:
            best = readings[-1 - memorisation.RISING]
            self.progress.warn(
                f"the model has begun to memorise: the loss of held-out images was lowest at step {best['step']:,} "
                f"({best['held_out']:.4f}, now {readings[-1]['held_out']:.4f}; training images "
                f"{readings[-1]['train']:.4f})"
            )

    def _charts(self) -> list[tuple[str, list[Curve]]]:
        stats, readings = self.run.stats(), self.run.readings()
        titles = {"denoising": "denoising loss of each batch", "alignment": "alignment loss of each batch, weighted"}
        shown = [name for name in titles if any(line[name] for line in stats)]
        charts = [(titles[name], [_curve("", name, stats)]) for name in shown]
        if readings:
            charts.append(("denoising loss of the averaged weights", [_curve(name, name, readings) for name in _READ]))
            bins = [
                Curve(
                    f"{place + 1}",
                    [reading["step"] for reading in readings],
                    [reading["held_out_bins"][place] / reading["train_bins"][place] - 1 for reading in readings],
                )
                for place in range(memorisation.BINS)
            ]
            charts.append(("held-out over training loss, less 1, by quarter of the noise (1: least)", bins))
        return charts


_READ = ("train", "held_out")


def _curve(title: str, name: str, lines: Sequence[dict[str, Any]]) -> Curve:
    values = [float("nan") if line[name] is None else line[name] for line in lines]
    return Curve(title, [line["step"] for line in lines], values)
