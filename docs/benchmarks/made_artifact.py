"""An artifact with ImageNet's shapes and made-up values, and d2c's own trainer on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from d2c import training
from d2c.latents import LatentSpec
from d2c.recipe import Recipe
from d2c.runtime import Ranks, resolve_device
from d2c.trainer import Trainer
from formats import codecs, open_artifact
from formats.schema import INT8, LATENT, RMS, ClassRow, Column
from formats.shards import Sample
from formats.writer import ArtifactWriter

TOKENS, DIM = 256, 768
CLASSES = 1000
VAE = LatentSpec(
    codec="vae",
    dtype="f2",
    moments=("mean", "std"),
    channels=4,
    size=32,
    downsample=8,
    scale=0.18215,
    shift=0.0,
    encoder="made up",
)


def write(out: Path, samples: int) -> Path:
    """Latents 2 x 4 x 32 x 32 in fp16 and 256 x 768 tokens in 8 bits, of 1,000 classes: what `d2c pack` stores."""
    rng = np.random.default_rng(0)
    # Outliers in few channels, as DINOv2's tokens have them.
    spread = np.exp(rng.standard_normal(DIM)).astype(np.float32)
    latents = rng.standard_normal((samples, 2, 4, 32, 32)).astype(np.float16)
    latents[:, 1] = abs(latents[:, 1]) / 10
    tokens = rng.standard_normal((samples, TOKENS, DIM), np.float32) * spread
    columns = [Column(LATENT, "f2", latents.shape[1:]), *codecs.columns("dinov2", INT8, (TOKENS, DIM))]
    labels = np.arange(samples) * CLASSES // samples
    counts = np.bincount(labels, minlength=CLASSES).tolist()
    fields: dict[str, Any] = {name: {} for name in "preprocess source selection licence seeds tool".split()}
    fields |= {"name": "benchmark", "latent": VAE.to_dict()}
    fields["encoders"] = {"text": None, "vision": {"column": "dinov2", "dim": DIM, "grid": 16}}
    with ArtifactWriter(out, "tar", columns, 1, "benchmark") as writer:
        rms = writer.codec_array("dinov2", RMS, lambda: codecs.channel_rms(tokens))
        writer.write(
            0,
            [
                Sample(
                    f"{i:08d}",
                    int(labels[i]),
                    {LATENT: latents[i], **codecs.stored("dinov2", INT8, tokens[i], rms)},
                    {"n": i},
                )
                for i in range(samples)
            ],
        )
        return writer.finish(
            fields, [ClassRow(i, f"c{i}", f"c{i}", f"c{i}", counts[i]) for i in range(CLASSES)], {}, []
        )


def trainer(artifact: Path, out: Path, model: str, recipe: Recipe, precision: str, device: str) -> Trainer:
    """What `d2c train` builds on every rank before its first step."""
    plan = training.plan(
        training.TrainingConfig(
            artifact=artifact, out=out, model=model, recipe=recipe, precision=precision, device=device
        )
    )
    built = Trainer.build(training.step_settings(plan), open_artifact(artifact), resolve_device(device), Ranks())
    built.wrapped.train()
    return built
