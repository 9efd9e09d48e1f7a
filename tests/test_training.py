"""Train: the loss falls, kills change nothing, ranks see the same draws, and misfits are refused before step 0."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pack_request
from killing import run_and_kill

from d2c import checkpoint, pipeline, train_plan, training
from d2c.errors import D2CError, UsageError
from d2c.generator import Generator
from d2c.progress import Bar, Progress, Silent
from d2c.recipe import RECIPES, recipe
from d2c.runs import CHECKPOINTS, STATS, WEIGHTS, Run
from d2c.runtime import Ranks
from d2c.training import TrainingConfig
from formats import IntegrityError, open_artifact


def config(packed: Path, out: Path, **options: Any) -> TrainingConfig:
    numbers = replace(recipe("small", steps=options.pop("steps", 12), batch_size=6), **options.pop("numbers", {}))
    defaults: dict[str, Any] = {"model": "sit-tiny/2", "log_every": 2, "checkpoint_every": 4, "device": "cpu"}
    return TrainingConfig(artifact=packed, out=out, recipe=numbers, **{**defaults, **options})


def train(asked: TrainingConfig, progress: Progress | None = None) -> training.Result:
    return training.run(training.plan(asked), progress)


def run(asked: TrainingConfig, progress: Progress) -> None:
    train(asked, progress)


def kept(run: Path) -> list[int]:
    """Steps of the states in a run's folder."""
    return sorted(int(path.stem) for path in (run / CHECKPOINTS).iterdir())


class Between(Silent):
    """Progress that does something whenever the loop reports."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def bar(self, label: str, total: int, unit: str, done: int = 0) -> Bar:
        bar, action = super().bar(label, total, unit, done), self.action

        class Acting:
            def __enter__(self) -> Bar:
                return self

            def __exit__(self, *_: object) -> None:
                return None

            def advance(self, count: int = 1, note: str = "") -> None:
                bar.advance(count, note)
                action()

        return Acting()


def stop() -> None:
    raise ProcessLookupError


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


@pytest.mark.parametrize("compiled", [False, True])
def test_more_steps_continue_a_run_whether_or_not_compiling_would_now_pay(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    monkeypatch.setattr(train_plan, "pays", lambda _, images: (images > 2 * 6) != compiled)  # of a GPU
    train(config(packed, tmp_path / "run", steps=2))
    plan = training.plan(config(packed, tmp_path / "run", steps=4))
    assert plan.compile == compiled
    assert training.run(plan).steps == 4
    assert training.plan(config(packed, tmp_path / "run", steps=4, overwrite=True)).compile != compiled
    plain = config(packed, tmp_path / "run", steps=6, compile=False)
    if compiled:
        with pytest.raises(D2CError, match="compile: True -> none"):
            training.plan(plain)
    else:
        assert not training.plan(plain).compile


def test_a_finished_run_is_left_alone(packed: Path, undisturbed: Path) -> None:
    before = (undisturbed / WEIGHTS).stat().st_mtime_ns
    assert training.plan(config(packed, undisturbed)).done
    train(config(packed, undisturbed))
    assert (undisturbed / WEIGHTS).stat().st_mtime_ns == before


def test_a_finished_run_that_was_asked_for_more_and_killed_is_unfinished(packed: Path, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    short = config(packed, tmp_path / "run", steps=4)
    first = train(short)
    weights = (first.path / WEIGHTS).read_bytes()
    assert Generator.open(first.path, cpu).identity["recipe"]["steps"] == first.steps == 4
    with pytest.raises(ProcessLookupError):
        train(config(packed, tmp_path / "run", steps=3000), Between(stop))
    with pytest.raises(D2CError, match="stopped before its last step"):
        Generator.open(first.path, cpu)
    again = train(short)
    assert (again.steps, again.passes_per_image) == (4, 2.0)
    assert Generator.open(first.path, cpu).identity["recipe"]["steps"] == 4
    assert (first.path / WEIGHTS).read_bytes() == weights
    assert [line["step"] for line in Run(first.path).stats()] == [2, 4]


def test_fewer_steps_than_a_run_has_taken_are_refused(packed: Path, undisturbed: Path) -> None:
    with pytest.raises(D2CError, match="12 steps taken, 4 asked for"):
        training.plan(config(packed, undisturbed, steps=4))


def test_a_plan_that_another_process_has_overtaken_is_refused(packed: Path, tmp_path: Path) -> None:
    late = training.plan(config(packed, tmp_path / "run", steps=2))
    train(config(packed, tmp_path / "run", steps=4))
    with pytest.raises(D2CError, match="4 steps taken, 2 asked for"):
        training.run(late)
    assert Run(tmp_path / "run").finished_steps() == 4


def test_one_run_is_trained_by_one_process_at_a_time(packed: Path, tmp_path: Path) -> None:
    asked = config(packed, tmp_path / "run", steps=2)
    refused: list[D2CError] = []

    def second() -> None:
        with pytest.raises(D2CError, match=r"another process is training this run(.|\n)*--out") as caught:
            train(replace(asked, overwrite=True))
        refused.append(caught.value)

    train(asked, Between(second))
    assert len(refused) == 1
    assert [line["step"] for line in Run(tmp_path / "run").stats()] == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_bytes_follow_the_threads_asked_for_and_not_the_machine(packed: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    numbers = {"batch_size": 64}
    for name, cores, threads in (("all", 2, None), ("one", 2, 1), ("alone", 1, 1)):
        torch.set_num_threads(cores)
        asked = config(packed, tmp_path / name, steps=2, numbers=numbers, threads=threads)
        train(asked, Between(lambda: seen.append(torch.get_num_threads())))
        assert torch.get_num_threads() == cores
    assert seen == [2, 1, 1]
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()
    with pytest.raises(D2CError, match="threads: 1 -> none"):
        training.plan(config(packed, tmp_path / "one", steps=2, numbers=numbers))


def test_small_steps_and_processes_that_share_the_cores_take_one_thread(packed: Path, tmp_path: Path) -> None:
    def threads(world: int, **options: Any) -> int | None:
        plan = training.plan(config(packed, tmp_path, **options))
        return training._threads(plan, Ranks(world=world))

    large = {"numbers": {"batch_size": 64}}
    assert [threads(1), threads(1, **large), threads(2, **large), threads(2, threads=3)] == [1, None, 1, 3]


def test_fp16_follows_fp32_and_resumes_to_the_same_bytes(packed: Path, tmp_path: Path, undisturbed: Path) -> None:
    whole = train(config(packed, tmp_path / "whole", precision="fp16"))
    for one, other in zip(Run(whole.path).stats(), Run(undisturbed).stats(), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.1)  # 65,536 times as much while scaled
    train(config(packed, tmp_path / "run", precision="fp16", steps=8))
    train(config(packed, tmp_path / "run", precision="fp16"))
    for name in (WEIGHTS, STATS, f"{CHECKPOINTS}/00000012.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole.path / name).read_bytes(), name
    newest = checkpoint.latest(whole.path / CHECKPOINTS)
    assert newest is not None
    assert newest.facts["scaler"]["_growth_tracker"] == 12


def test_fp16_steps_that_overflow_are_skipped_until_the_scale_fits(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**24))
    path = train(config(packed, tmp_path / "run", precision="fp16", steps=24)).path
    stats = Run(path).stats()
    assert (stats[0]["grad_norm"], stats[0]["skipped"]) == (None, 2)
    assert stats[-1]["grad_norm"] > 0
    assert stats[-1]["loss"] < stats[0]["loss"]


def test_fp16_steps_that_all_overflow_are_divergence(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**-15))
    with pytest.raises(D2CError, match=r"diverged(.|\n)*--precision fp32"):
        train(config(packed, tmp_path / "run", precision="fp16", steps=2))


def test_a_slow_run_saves_its_state_by_the_clock(packed: Path, tmp_path: Path) -> None:
    often = {"checkpoint_every": 1000, "checkpoint_minutes": 1e-9, "keep_checkpoints": 9}
    train(config(packed, tmp_path / "run", steps=6, **often))
    assert kept(tmp_path / "run") == [2, 4, 6]


def test_states_of_chosen_steps_stay_beside_the_newest(packed: Path, tmp_path: Path) -> None:
    train(config(packed, tmp_path / "run", steps=14, checkpoint_every=2, keep_checkpoints=1, keep_every=4))
    assert kept(tmp_path / "run") == [4, 8, 12, 14]


def test_a_resumed_run_does_not_keep_the_loaded_state(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(packed, tmp_path / "run", steps=2))
    read, loaded = checkpoint.latest, []
    alive: list[bool] = []

    def latest(folder: Path) -> checkpoint.State | None:
        state = read(folder)
        assert state is not None
        loaded.append(weakref.ref(state))
        return state

    monkeypatch.setattr(checkpoint, "latest", latest)
    train(config(packed, tmp_path / "run", steps=4), Between(lambda: alive.append(loaded[0]() is not None)))
    assert (len(loaded), alive) == (1, [False])


def test_a_run_whose_artifact_moved_knows_where_it_is_once_asked_again(packed: Path, tmp_path: Path) -> None:
    shards, folder = tmp_path / "project" / "shards", tmp_path / "project" / "runs" / "a"
    shutil.copytree(packed, shards)
    train(config(shards, folder, steps=2))
    (tmp_path / "project").rename(tmp_path / "moved")
    folder, shards = tmp_path / "moved" / "runs" / "a", tmp_path / "moved" / "shards"
    assert Run(folder).artifact() == shards
    shards.rename(tmp_path / "elsewhere")
    train(config(tmp_path / "elsewhere", folder, steps=2))
    assert Run(folder).artifact() == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpus", 0),
        ("log_every", 0),
        ("checkpoint_every", -1),
        ("checkpoint_minutes", 0.0),
        ("threads", 0),
        ("steps", 0),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused_by_name(tmp_path: Path, name: str, value: Any) -> None:
    options = {"numbers": {name: value}} if name == "steps" else {name: value}
    with pytest.raises(UsageError, match=f"{name} must be positive"):
        config(tmp_path, tmp_path, **options)


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="auto, fp32, bf16, fp16"):
        config(tmp_path, tmp_path, precision="fp8")


def test_two_ranks_train_the_model_of_one(packed: Path, tmp_path: Path, undisturbed: Path) -> None:
    two = train(config(packed, tmp_path / "run", gpus=2)).path
    one_weights, _ = checkpoint.load_tensors(undisturbed / WEIGHTS)
    two_weights, _ = checkpoint.load_tensors(two / WEIGHTS)
    for name, tensor in one_weights.items():
        torch.testing.assert_close(two_weights[name], tensor, atol=2e-4, rtol=0)
    for one, other in zip(Run(undisturbed).stats(), Run(two).stats(), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)


def test_two_ranks_take_the_step_of_one_to_a_millionth(packed: Path, tmp_path: Path) -> None:
    first, second = (
        train(config(packed, tmp_path / str(gpus), steps=1, log_every=1, gpus=gpus)).path for gpus in (1, 2)
    )
    for name, value in Run(first).stats()[0].items():
        assert Run(second).stats()[0][name] == pytest.approx(value, abs=1e-6), name
    one, other = (checkpoint.latest(path / CHECKPOINTS) for path in (first, second))
    assert one is not None
    assert other is not None
    # What the gradients left; AdamW's own first step blows up what rounds differently in a gradient of nearly nothing.
    for name in [name for name in one.tensors if name.startswith(("opt.", "ema."))]:
        torch.testing.assert_close(other.tensors[name], one.tensors[name], atol=1e-6, rtol=0)


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
    assert [note.partition(":")[0] for note in plan.notes[:2]] == [
        "the artifact holds no text",
        "the artifact holds no vision tokens",
    ]
    training.run(plan)


def test_classes_without_an_image_are_told_before_training(workspace: Path, tmp_path: Path) -> None:
    made, _ = pipeline.select(pipeline.SelectRequest(workspace=workspace, total=(2,), device="cpu"))
    pipeline.pack(pack_request(workspace, tmp_path / "two", selected=made[0][1].name))
    notes = training.plan(config(tmp_path / "two", tmp_path / "run", steps=2)).notes
    assert "1 of 3 classes have no image to learn from" in notes


def test_a_corrupt_shard_stops_training_before_it_learns_from_it(packed: Path, tmp_path: Path) -> None:
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
