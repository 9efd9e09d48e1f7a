"""Sample from weights that others trained: files in the layouts that SiT, DiT and REPA publish, and diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_generation import arrays, asked, draw
from test_scorers import save_diffusers
from test_scorers_official import S, flat, official
from test_scorers_official import training as as_trained
from typer.testing import CliRunner

from d2c import generation, runtime
from d2c.errors import D2CError, UsageError
from d2c.sampling import Method, SamplerConfig, sample
from d2c.scorers import load_denoiser
from d2c_cli.app import app
from formats.files import read_json


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder with the SD VAE's four levels: 8 pixels per latent value."""
    from diffusers import AutoencoderKL

    untyped: Any = AutoencoderKL
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = untyped(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[8] * 4,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
        )
    folder = tmp_path_factory.mktemp("vae") / "sd-vae-tiny"
    model.save_pretrained(folder)
    return folder


OFFICIAL = [
    ("SiT-XL-2-256.pt", 32, False, "euler", "euler"),
    ("DiT-XL-2-256x256.pt", 32, False, "euler", "ddim"),
    ("DiT-XL-2-256x256.pt", 32, False, "ddpm", "ddpm"),
    ("0400000.pt", 16, True, "sde", "sde"),  # REPA's trainer names its checkpoints so
]


@pytest.mark.parametrize(("name", "rows", "projector", "method", "recorded"), OFFICIAL)
def test_an_official_file_is_sampled_by_the_same_command(
    name: str, rows: int, projector: bool, method: Method, recorded: str, tmp_path: Path, vae: Path
) -> None:
    state = official(rows, S, 1, projector)
    torch.save(as_trained(state) if projector else flat(state), tmp_path / name)
    sampler = SamplerConfig(method=method, steps=2, guidance=4.0, guidance_channels=3)
    config = asked(tmp_path / name, tmp_path / "out", sampler=sampler, codec=str(vae), count=3, batch_size=2)
    result = draw(config)
    pixels = arrays(result.path)
    assert pixels.shape == (3, 256, 256, 3)
    assert arrays(result.path, "labels").tolist() == [0, 1, 2]
    denoiser, plan = load_denoiser(tmp_path / name), generation.plan(config)
    latents = sample(
        denoiser,
        denoiser.objective,
        (4, 32, 32),
        torch.tensor([0, 1, 2]),
        [runtime.seed_of("sample", 0, index) for index in range(3)],
        sampler,
    )
    assert np.abs(plan.generator.codec.decode(latents).astype(int) - pixels).max() <= 1
    told = read_json(result.path / generation.RECORD)["asked"]
    assert (told["sampler"]["method"], told["reverse_time"]) == (recorded, name.startswith("SiT"))
    with pytest.raises(D2CError, match="how these weights were trained"):
        _ = plan.generator.identity


def test_a_diffusers_folder_is_sampled_like_the_file_it_was_made_from(tmp_path: Path, vae: Path) -> None:
    torch.save(flat(official(32, S, 1)), tmp_path / "DiT-XL-2-256x256.pt")
    save_diffusers(load_denoiser(tmp_path / "DiT-XL-2-256x256.pt").model, tmp_path / "DiT-XL-2-256" / "transformer")
    options = {"sampler": SamplerConfig(steps=2), "codec": str(vae), "count": 2}
    for name in ("DiT-XL-2-256x256.pt", "DiT-XL-2-256"):
        draw(asked(tmp_path / name, tmp_path / f"{name}-out", **options))
    one, other = (arrays(tmp_path / f"{name}-out") for name in ("DiT-XL-2-256x256.pt", "DiT-XL-2-256"))
    assert np.abs(one.astype(int) - other).max() <= 1


def test_what_cannot_be_sampled_says_what_to_do(tmp_path: Path, vae: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(D2CError, match=r"not a finished training run(.|\n)*or a weight file"):
        generation.plan(asked(tmp_path / "empty", tmp_path / "a"))
    torch.save(flat(official(32, S, 1)), tmp_path / "SiT-XL-2-256.pt")
    with pytest.raises(D2CError, match=r"codec does not fit the model(.|\n)*3 channels, 32(.|\n)*4 channels, 32"):
        generation.plan(asked(tmp_path / "SiT-XL-2-256.pt", tmp_path / "a", codec="rgb"))
    (tmp_path / "SiT-XL-2-256.pt").rename(tmp_path / "weights.pt")
    with pytest.raises(D2CError, match="--objective"):
        generation.plan(asked(tmp_path / "weights.pt", tmp_path / "a", codec=str(vae)))
    options = {"codec": str(vae), "objective": "velocity"}
    with pytest.raises(UsageError, match=r"ddpm needs an eps model(.|\n)*euler or heun or sde or dopri5"):
        generation.plan(asked(tmp_path / "weights.pt", tmp_path / "a", sampler=SamplerConfig(method="ddpm"), **options))
    assert (
        generation.plan(asked(tmp_path / "weights.pt", tmp_path / "a", **options)).asked["sampler"]["method"] == "sde"
    )
    assert not (tmp_path / "a").exists()


def test_samples_of_a_weight_file_go_where_one_may_write(
    tmp_path: Path, vae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").mkdir()
    torch.save(flat(official(32, S, 1)), tmp_path / "weights" / "SiT-XL-2-256.pt")
    monkeypatch.chdir(tmp_path)
    options = ["--codec", vae, "--count", "1", "--sampling-steps", "1", "--device", "cpu"]
    command = ["sample", "weights/SiT-XL-2-256.pt", *options]
    done = CliRunner().invoke(app, [str(part) for part in command], prog_name="d2c", catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "samples" / "SiT-XL-2-256" / generation.GRID).exists()
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["SiT-XL-2-256.pt"]
