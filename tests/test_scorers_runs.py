"""Any run of `d2c train` as a scorer: its averaged weights, its classes' text, both objectives, and unfinished runs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2c import checkpoint, training
from d2c.errors import D2CError
from d2c.picks import class_indices
from d2c.recipe import recipe
from d2c.runs import CHECKPOINTS, DONE, TEXT, WEIGHTS
from d2c.scorers import load_denoiser
from d2c.sit import SiT
from d2c.sources import open_source
from d2c.training import TrainingConfig
from d2c.transport import Objective, objective_for

torch.set_num_threads(1)


def train(packed: Path, out: Path, model: str = "sit-tiny/2", steps: int = 4, **numbers: Any) -> Path:
    # Fast enough that a few steps leave zero, where every model starts.
    used = replace(recipe("small", steps=steps, batch_size=6), **{"lr": 0.02, "ema_decay": 0.5, **numbers})
    config = TrainingConfig(
        artifact=packed, out=out, model=model, recipe=used, log_every=2, checkpoint_every=2, device="cpu"
    )
    training.run(training.plan(config))
    return out


@pytest.fixture(scope="module")
def with_text(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(packed, tmp_path_factory.mktemp("runs") / "text")


def averaged(run: Path) -> SiT:
    spec = load_denoiser(run).spec
    model = SiT(spec).eval()
    model.load_state_dict(checkpoint.load_tensors(run / WEIGHTS)[0])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    latents, noise = torch.randn(2, 3, 3, 8, 8, generator=generator)
    return latents, noise, torch.tensor([0.1, 0.5, 0.9]), torch.tensor([2, 0, 1])


def error_of(model: SiT, objective: Objective, *text: Tensor) -> Tensor:
    latents, noise, t, labels = batch()
    prediction = model(objective.corrupt(latents, noise, t), objective.model_time(t), labels, *text)
    return (prediction - objective.target(latents, noise, t)).square().mean((1, 2, 3))


@pytest.mark.parametrize(("model", "objective"), [("sit-tiny/2", "velocity"), ("dit-tiny/2", "eps")])
def test_a_run_without_text_scores_with_its_averaged_weights(
    model: str, objective: str, packed: Path, tmp_path: Path
) -> None:
    run = train(packed, tmp_path / "run", model, objective=objective, text=False)
    denoiser = load_denoiser(run, objective=objective)
    want = error_of(averaged(run), objective_for(denoiser.spec.objective))
    assert torch.allclose(denoiser.loss(*batch()), want, rtol=1e-5)


def test_a_run_with_text_scores_each_image_with_its_own_classs_text(with_text: Path, image_folder: Path) -> None:
    denoiser = load_denoiser(with_text)
    tables, _ = checkpoint.load_tensors(with_text / TEXT)
    latents, noise, t, labels = batch()
    text = tables["text_embeds"][labels].float(), tables["text_mask"][labels]
    model = averaged(with_text)
    want = error_of(model, denoiser.objective, *text)
    assert torch.allclose(denoiser.loss(latents, noise, t, labels), want, rtol=1e-5)
    noisy = denoiser.objective.corrupt(latents, noise, t)
    hidden = denoiser.hidden(latents, t, labels, 2, noise)
    assert torch.allclose(hidden, model.hidden(noisy, t, labels, 2, *text), atol=1e-5)
    assert not torch.allclose(hidden, model.hidden(noisy, t, labels, 2), atol=1e-5)
    assert class_indices(open_source(image_folder), denoiser).tolist() == [0, 1, 2]


def test_the_text_is_part_of_what_the_scores_depend_on(with_text: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(with_text, tmp_path / "run"))
    before = load_denoiser(run).origin
    tables, _ = checkpoint.load_tensors(run / TEXT)
    checkpoint.save_tensors(run / TEXT, {**tables, "text_embeds": tables["text_embeds"] + 1})
    after = load_denoiser(run).origin
    assert before["sha256"] == after["sha256"]
    assert before["weights_xxh3"] != after["weights_xxh3"]


def test_a_run_without_its_text_or_with_that_of_other_classes_says_so(with_text: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(with_text, tmp_path / "run"))
    tables, _ = checkpoint.load_tensors(run / TEXT)
    checkpoint.save_tensors(run / TEXT, {name: table[:2] for name, table in tables.items()})
    with pytest.raises(D2CError, match=r"not that of the model's classes(.|\n)*\(2, 16"):
        load_denoiser(run)
    (run / TEXT).unlink()
    with pytest.raises(D2CError, match=r"without its classes' text(.|\n)*whole folder"):
        load_denoiser(run).loss(*batch())


def test_an_unfinished_run_is_no_scorer_and_a_continued_one_only_once_it_has_ended(
    with_text: Path, packed: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(with_text, tmp_path / "run"))
    shutil.rmtree(run / CHECKPOINTS)
    first = load_denoiser(run).origin["weights_xxh3"]  # a finished run needs no training state
    shutil.copytree(with_text / CHECKPOINTS, run / CHECKPOINTS)
    (run / DONE).unlink()  # what `d2c train --steps 8` does first
    for source in (run, run / WEIGHTS):
        with pytest.raises(D2CError, match=r"has not finished(.|\n)*4 steps saved(.|\n)*d2c train again"):
            load_denoiser(source)
    (run / WEIGHTS).unlink()
    with pytest.raises(D2CError, match=r"has not finished(.|\n)*of no steps"):
        load_denoiser(run)
    assert load_denoiser(train(packed, run, steps=8)).origin["weights_xxh3"] != first
