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
        (1.951432, -0.006588), (1.795361, -0.003739), (1.860376, -0.002878), (1.868712, -0.047034),
        (1.867574, -0.037555), (1.836349, 0.001132), (1.750749, -0.016191), (1.836355, 0.00184),
        (1.801725, -0.11121), (1.771895, -0.088952), (1.779473, -0.005708), (1.746151, -0.042797),
        (1.807634, -0.007843), (1.831115, -0.04799), (1.898512, -0.096403), (1.810663, -0.092832),
        (1.856249, -0.061341), (1.888468, -0.017527), (1.807606, -0.036341), (1.84645, -0.082628),
    ],
    "dit-tiny/2": [
        (1.001918, -0.006131), (0.954839, -0.003416), (0.936718, -0.004908), (0.929854, -0.040626),
        (0.944819, -0.034638), (0.880464, 0.000847), (0.874972, -0.013022), (0.843636, 0.003762),
        (0.711294, -0.099351), (0.805192, -0.076097), (0.712763, -0.004794), (0.632397, -0.033773),
        (0.632137, -0.005441), (0.507494, -0.047497), (0.543799, -0.070741), (0.462572, -0.076668),
        (0.545342, -0.047658), (0.642111, -0.011147), (0.636548, -0.019999), (0.509309, -0.073029),
    ],
}
# fmt: on
"""Denoising and alignment loss of each step."""
AVERAGED = {"sit-tiny/2": 4.35717e-07, "dit-tiny/2": 2.31447e-06}
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
