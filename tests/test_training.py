"""Train: the loss falls, kills change nothing, ranks see the same draws, and misfits are refused before step 0."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pack_request
from hypothesis import given
from hypothesis import strategies as st
from killing import run_and_kill

from d2c import checkpoint, pipeline, training
from d2c.errors import D2CError, UsageError
from d2c.loading import Loader, global_batch
from d2c.progress import Progress
from d2c.recipe import RECIPES, recipe
from d2c.runs import CHECKPOINTS, STATS, WEIGHTS, Run
from d2c.training import TrainingConfig
from formats import open_artifact


@given(samples=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 3))
def test_every_sample_comes_once_an_epoch_whatever_the_batch(samples: int, batch: int, seed: int) -> None:
    steps = -(-3 * samples // batch)
    run = np.concatenate([global_batch(step * batch, batch, samples, seed) for step in range(steps)])
    for epoch in range(3):
        assert sorted(run[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


def test_epochs_are_shuffled_differently_and_by_seed() -> None:
    first, second = global_batch(0, 50, 50, 0), global_batch(50, 50, 50, 0)
    assert first.tolist() != second.tolist() != list(range(50))
    assert first.tolist() != global_batch(0, 50, 50, 1).tolist()


def test_ranks_share_one_global_batch_between_them(packed: Path) -> None:
    artifact = open_artifact(packed)
    options: dict[str, Any] = {"batch_size": 6, "seed": 0, "device": torch.device("cpu"), "token_column": "scorer"}
    whole = Loader(artifact, **options).batch(5)
    halves = [Loader(artifact, **options, rank=rank, world=2).batch(5) for rank in range(2)]
    for name in ("raw", "labels", "tokens"):
        joined = torch.stack([getattr(half, name) for half in halves], dim=1).flatten(0, 1)
        assert torch.equal(joined, getattr(whole, name))


def test_memory_mapped_and_resident_batches_are_equal(packed: Path) -> None:
    artifact = open_artifact(packed)
    options: dict[str, Any] = {"batch_size": 5, "seed": 0, "device": torch.device("cpu"), "token_column": "scorer"}
    resident, mapped = Loader(artifact, **options), Loader(artifact, **options, budget=0.0)
    assert resident.resident
    assert not mapped.resident
    for step in range(4):
        one, two = resident.batch(step), mapped.batch(step)
        assert one.tokens is not None
        assert two.tokens is not None
        assert torch.equal(one.raw, two.raw)
        assert torch.equal(one.labels, two.labels)
        assert torch.equal(one.tokens, two.tokens)


def test_a_batch_that_ranks_cannot_share_names_those_that_can(packed: Path) -> None:
    with pytest.raises(D2CError, match=r"\[1, 2, 4\]"):
        Loader(open_artifact(packed), batch_size=4, seed=0, device=torch.device("cpu"), world=3)


def config(packed: Path, out: Path, **options: Any) -> TrainingConfig:
    numbers = replace(recipe("small", steps=options.pop("steps", 12), batch_size=6), **options.pop("numbers", {}))
    defaults: dict[str, Any] = {"model": "sit-tiny/2", "log_every": 2, "checkpoint_every": 4, "device": "cpu"}
    return TrainingConfig(artifact=packed, out=out, recipe=numbers, **{**defaults, **options})


def train(asked: TrainingConfig, progress: Progress | None = None) -> training.Result:
    return training.run(training.plan(asked), progress)


def run(asked: TrainingConfig, progress: Progress) -> None:
    train(asked, progress)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    return train(config(packed, tmp_path_factory.mktemp("runs") / "run")).path


def test_training_learns(packed: Path, tmp_path: Path) -> None:
    train(config(packed, tmp_path / "run", steps=60, log_every=10))
    stats = Run(tmp_path / "run").stats()
    assert stats[-1]["denoising"] < 0.8 * stats[0]["denoising"]
    assert stats[-1]["alignment"] < stats[0]["alignment"] - 0.05


def test_killed_and_run_again_it_ends_with_the_same_bytes(packed: Path, tmp_path: Path, undisturbed: Path) -> None:
    asked = config(packed, tmp_path / "run")
    run_and_kill(run, asked, "train", after=8)
    newest = checkpoint.latest(tmp_path / "run" / CHECKPOINTS)
    assert newest is not None
    assert newest.step == 4
    assert len(Run(tmp_path / "run").stats()) == 4  # logged to step 8, saved at step 4
    result = train(asked)
    assert result.steps == 12
    for name in (WEIGHTS, STATS, f"{CHECKPOINTS}/00000012.safetensors"):
        assert (result.path / name).read_bytes() == (undisturbed / name).read_bytes(), name


def test_more_steps_continue_a_finished_run_as_if_it_had_never_stopped(
    packed: Path, tmp_path: Path, undisturbed: Path
) -> None:
    train(config(packed, tmp_path / "run", steps=8))
    result = train(config(packed, tmp_path / "run", steps=12))
    assert (result.path / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()


def test_a_finished_run_is_left_alone(packed: Path, undisturbed: Path) -> None:
    before = (undisturbed / WEIGHTS).stat().st_mtime_ns
    assert training.plan(config(packed, undisturbed)).done
    train(config(packed, undisturbed))
    assert (undisturbed / WEIGHTS).stat().st_mtime_ns == before


def test_two_ranks_train_the_model_of_one(packed: Path, tmp_path: Path, undisturbed: Path) -> None:
    two = train(config(packed, tmp_path / "run", gpus=2)).path
    one_weights, _ = checkpoint.load_tensors(undisturbed / WEIGHTS)
    two_weights, _ = checkpoint.load_tensors(two / WEIGHTS)
    for name, tensor in one_weights.items():
        torch.testing.assert_close(two_weights[name], tensor, atol=2e-4, rtol=0)
    for one, other in zip(Run(undisturbed).stats(), Run(two).stats(), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)


def test_another_recipe_in_the_same_folder_is_refused_field_by_field(packed: Path, undisturbed: Path) -> None:
    with pytest.raises(D2CError, match=r"recipe.lr: 0.002 -> 0.1; seed: 0 -> 3"):
        training.plan(config(packed, undisturbed, numbers={"lr": 0.1}, seed=3))


def test_overwrite_replaces_a_run_and_nothing_else(packed: Path, tmp_path: Path) -> None:
    train(config(packed, tmp_path / "run", steps=2))
    assert not training.plan(config(packed, tmp_path / "run", steps=2, seed=1, overwrite=True)).done
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(D2CError, match="something else"):
        training.plan(config(packed, tmp_path / "home", overwrite=True))


def test_a_model_on_another_grid_than_the_tokens_names_the_one_that_fits(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(D2CError, match=r"sit-tiny/4: 2 x 2, stored: 4 x 4(.|\n)*use a /2 model"):
        training.plan(config(packed, tmp_path, model="sit-tiny/4"))


def test_a_dit_wants_a_dit_recipe(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="objective"):
        training.plan(config(packed, tmp_path, model="dit-tiny/2"))
    train(config(packed, tmp_path / "dit", model="dit-tiny/2", steps=2, numbers={"objective": "eps"}))


def test_an_artifact_without_attachments_trains_and_says_what_it_lacks(workspace: Path, tmp_path: Path) -> None:
    pipeline.pack(pack_request(workspace, tmp_path / "plain", per_class=3, text="none", vision="none"))
    plan = training.plan(config(tmp_path / "plain", tmp_path / "run", steps=2))
    assert plan.spec.text_dim is None
    assert plan.spec.align_dim is None
    assert len(plan.notes) == 2
    training.run(plan)


def test_a_corrupt_shard_stops_training_before_it_learns_from_it(packed: Path, tmp_path: Path) -> None:
    import shutil

    from formats import IntegrityError

    damaged = Path(shutil.copytree(packed, tmp_path / "shards"))
    shard = sorted((damaged / "shards").glob("*.tar"))[1]
    data = bytearray(shard.read_bytes())
    index = open_artifact(packed).index.to_pylist()
    data[next(row["latent.offset"] for row in index if row["shard"].startswith("shards/train-00001")) + 5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError):
        train(config(damaged, tmp_path / "run", steps=2))


def test_divergence_is_an_error_with_the_step(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(D2CError, match="diverged"):
        train(config(packed, tmp_path / "run", numbers={"lr": 1e30, "clip_norm": 1e30}, steps=30))


def test_the_papers_numbers_stand_in_its_recipe() -> None:
    paper = RECIPES["d2c"]
    assert (paper.lr, paper.betas, paper.weight_decay) == (1e-4, (0.9, 0.999), 0.0)
    assert (paper.batch_size, paper.steps, paper.align_weight, paper.class_dropout) == (256, 40_000, 0.5, 0.1)
    with pytest.raises(UsageError, match="d2c, repa, sit, dit, small"):
        recipe("rapa")
