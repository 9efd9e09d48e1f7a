"""Twenty steps of training, loss by loss: a change of the code that is meant to change nothing changes none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats_fixture import CLASSES, FIELDS, writer
from safetensors.torch import load_file

from d2c import training
from d2c.latents import LatentSpec
from d2c.recipe import Recipe
from d2c.runs import WEIGHTS, Run
from d2c.training import TrainingConfig
from formats.schema import ClassRow, Column
from formats.shards import Sample

LATENT = LatentSpec(
    codec="vae",
    dtype="f2",
    moments=("mean", "std"),
    channels=4,
    size=8,
    downsample=8,
    scale=0.18215,
    shift=0.0,
    encoder="made up",
)
COLUMNS = (Column("latent", "f2", (2, 4, 8, 8)), Column("tokens", "f2", (16, 24)))
NUMBERS: dict[str, Any] = {
    "steps": 20,
    "batch_size": 8,
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "ema_decay": 0.99,
    "class_dropout": 0.2,
    "align_weight": 0.5,
    "flip": "none",
}
# fmt: off
GOLDEN = {
    "sit-tiny/2": [
        (1.951432, -0.0068), (1.794948, -0.005317), (1.857798, -0.000591), (1.868376, -0.057036),
        (1.867478, -0.033188), (1.835629, 0.003909), (1.748665, -0.017587), (1.834427, 0.000483),
        (1.803595, -0.098433), (1.774057, -0.078837), (1.782766, -0.007118), (1.745418, -0.044446),
        (1.801579, -0.011412), (1.836189, -0.043207), (1.896891, -0.083932), (1.815164, -0.086642),
        (1.862955, -0.060144), (1.891104, -0.025567), (1.815419, -0.026429), (1.854256, -0.081594),
    ],
    "dit-tiny/2": [
        (1.001918, -0.007213), (0.955213, -0.004422), (0.937441, 0.000675), (0.932555, -0.052409),
        (0.952127, -0.031223), (0.881545, 0.005719), (0.878921, -0.016847), (0.849629, 0.002127),
        (0.726127, -0.092522), (0.807328, -0.06838), (0.715507, -0.007155), (0.636385, -0.035858),
        (0.616809, -0.007272), (0.500479, -0.040563), (0.5282, -0.06628), (0.431293, -0.069699),
        (0.525886, -0.045445), (0.655712, -0.015839), (0.621516, -0.01094), (0.501789, -0.064515),
    ],
}
# fmt: on
"""Denoising and alignment loss of each step."""
AVERAGED = {"sit-tiny/2": 4.46953e-07, "dit-tiny/2": 2.24824e-06}
"""Mean square of the averaged last layer, which starts at zero."""
TOLERANCE = 1e-4
"""Of each number: 60 times what other threads, instruction sets and no oneDNN at all have changed."""


def waves(seed: float, *shape: int) -> np.ndarray[Any, Any]:
    """Values about as large as 1 that depend on no generator of numbers."""
    return np.sin(np.arange(np.prod(shape)) * (0.7 + seed) + seed).reshape(shape) * 1.4


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 samples of 4 classes with text and vision tokens."""
    samples = [
        Sample(
            f"{i:08d}",
            i % CLASSES,
            {
                "latent": np.stack([5 * waves(i / 7, 4, 8, 8), abs(waves(i / 3, 4, 8, 8))]).astype("f2"),
                "tokens": waves(i % CLASSES + i / 50, 16, 24).astype("f2"),
            },
            {"n": i},
        )
        for i in range(24)
    ]
    with writer(tmp_path_factory.mktemp("golden") / "shards", shards=2, columns=COLUMNS) as made:
        made.write(0, samples[:12])
        made.write(1, samples[12:])
        classes = [ClassRow(i, f"class {i}", f"n{i}", f"a photo of {i}", 6) for i in range(CLASSES)]
        tables = {"text_embeds": waves(2.5, CLASSES, 16, 12).astype("f2"), "text_mask": np.ones((CLASSES, 16), "u1")}
        encoders = {"text": {"dim": 12}, "vision": {"column": "tokens", "dim": 24, "grid": 4}}
        return made.finish({**FIELDS, "latent": LATENT.to_dict(), "encoders": encoders}, classes, tables, [])


@pytest.mark.parametrize("model", ["sit-tiny/2", "dit-tiny/2"])
def test_twenty_steps_lose_what_they_always_lost(model: str, artifact: Path, tmp_path: Path) -> None:
    objective: Any = "eps" if model.startswith("dit") else "velocity"
    recipe = Recipe(name="golden", objective=objective, **NUMBERS)
    config = TrainingConfig(
        artifact=artifact,
        out=tmp_path / "run",
        model=model,
        recipe=recipe,
        precision="fp32",
        seed=0,
        log_every=1,
        threads=1,
        device="cpu",
    )
    training.run(training.plan(config))
    stats = Run(config.out).stats()
    found = [(line["denoising"], line["alignment"]) for line in stats]
    last = load_file(config.out / WEIGHTS)["final_layer.linear.weight"].double().square().mean().item()
    # Shown whole, so that a change that is meant can be copied from here.
    shown = "\n".join(map(str, [*found, last]))
    assert len(found) == NUMBERS["steps"]
    assert np.allclose(found, GOLDEN[model], rtol=TOLERANCE, atol=1e-6), shown
    assert last == pytest.approx(AVERAGED[model], rel=TOLERANCE), shown
