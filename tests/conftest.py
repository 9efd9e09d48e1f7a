"""Small real things that several tests need: a labelled image folder and a scorer of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2c import checkpoint, pipeline, scoring
from d2c.pipeline import PackRequest
from d2c.scoring import ScoringConfig
from d2c.sit import SiT, model_spec
from formats.files import write_json

# Tests must not depend on what a developer's shell exports.
for name in [name for name in os.environ if name.startswith("D2C_") and name != "D2C_TEST_DATA"]:
    del os.environ[name]
# Nor on what weights torch hub has downloaded there.
os.environ["TORCH_HOME"] = os.devnull

pytest_plugins = ["s3_server"]
CLASSES = {"cat": 40, "dog": 30, "sea lion": 25}
SIDE = 8


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """95 images of 8 x 8 px in three classes that differ in brightness and pattern."""
    root = tmp_path_factory.mktemp("data") / "pets"
    rng = np.random.default_rng(0)
    for number, (name, count) in enumerate(CLASSES.items()):
        (root / name).mkdir(parents=True)
        base = rng.integers(0, 256, (SIDE, SIDE, 3))
        for index in range(count):
            noise = rng.normal(0, 10 + index, (SIDE, SIDE, 3))
            pixels = np.clip(base * 0.5 + number * 40 + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:03d}.png")
    return root


@pytest.fixture(scope="session")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a tiny model with random weights, for the classes of `image_folder`."""
    folder = tmp_path_factory.mktemp("scorer")
    spec = model_spec("sit-tiny/2", SIDE, 3, len(CLASSES))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiT(spec)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05)
    write_json(folder / "model.json", spec.to_dict())
    checkpoint.save_tensors(folder / "ema.safetensors", model.state_dict())
    return folder


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, scorer: Path) -> Path:
    """A workspace in which `image_folder` is scored. Copy it before adding to it."""
    workspace = tmp_path_factory.mktemp("scored") / "workspace"
    config = ScoringConfig(
        source=image_folder, workspace=workspace, scorer=str(scorer), codec="rgb", size=SIDE, evals=4, device="cpu"
    )
    scoring.run(scoring.plan(config))
    return workspace


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the layout of the published file."""
    from torch_fidelity import feature_extractor_inceptionv3 as peer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(peer.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = peer.FeatureExtractorInceptionV3("random", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for tensor in network.state_dict().values():
        if tensor.dim() == 4:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def workspace(tmp_path: Path, scored: Path) -> Path:
    """The test's own copy of `scored`."""
    return Path(shutil.copytree(scored, tmp_path / "workspace"))


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, scored: Path) -> Path:
    """An artifact of four picks a class with text and vision, in tars, beside the workspace it came from."""
    folder = tmp_path_factory.mktemp("packed")
    shutil.copytree(scored, folder / "workspace")
    pipeline.pack(pack_request(folder / "workspace", folder / "shards", per_class=4))
    return folder / "shards"


def pack_request(workspace: Path, out: Path, **options: Any) -> PackRequest:
    """A request for the CPU with few shards."""
    return PackRequest(workspace=workspace, out=out, **{"device": "cpu", "shards": 3, **options})
