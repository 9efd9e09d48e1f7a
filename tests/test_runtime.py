"""Where a job runs: devices, seeds, and what a parent learns of a worker that failed."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from d2c import runtime
from d2c.errors import D2CError, UsageError
from d2c.runtime import Ranks
from formats import IntegrityError

CPU = torch.device("cpu")


def touch(ranks: Ranks, folder: Path) -> None:
    (folder / f"{ranks.rank}-of-{ranks.world}").write_text(str(torch.get_num_threads()))


def integrity(ranks: Ranks, folder: Path) -> None:
    if ranks.rank == 1:
        raise IntegrityError("a shard is corrupt", where=folder / "x.tar", found="aa", expected="bb", hint="fetch it")


def full(ranks: Ranks, folder: Path) -> None:
    raise OSError(28, "No space left on device", str(folder))


def bug(ranks: Ranks, folder: Path) -> None:
    assert ranks.rank == 0, "an assumption that does not hold"


def killed(ranks: Ranks, folder: Path) -> None:
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()  # the other rank only learns that its peer has gone


def leaving(ranks: Ranks, job: tuple[Path, bool]) -> None:
    folder, fails = job
    torch.distributed.destroy_process_group = (folder / f"{ranks.rank} left").touch
    if fails and ranks.rank == 1:
        raise ValueError


def waiting(ranks: Ranks, folder: Path) -> None:
    everybody = torch.distributed.group.WORLD
    half_hour = everybody._get_backend(CPU).options._timeout
    (folder / f"{ranks.rank}").write_text(f"{half_hour.total_seconds():.0f}")
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1), everybody)
    runtime.once(lambda: time.sleep(2))
    assert runtime.told(torch.tensor([ranks.rank, 7.0])).tolist() == [[0, 7], [1, 7]]
    assert runtime.any_of(ranks.rank == 1)
    assert not runtime.any_of(False)


def launch(worker: object, folder: Path, workers: int = 2) -> None:
    runtime.launch(worker, folder, workers=workers, device=CPU)  # type: ignore[arg-type]  # one name for all of the above


def test_one_worker_runs_here_and_several_in_processes_of_their_own(tmp_path: Path) -> None:
    launch(touch, tmp_path, workers=1)
    launch(touch, tmp_path, workers=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-of-1", "0-of-2", "1-of-2"]


def test_a_workers_known_failure_arrives_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError) as caught:
        launch(integrity, tmp_path)
    error = caught.value
    assert (error.what, error.where, error.hint) == ("a shard is corrupt", str(tmp_path / "x.tar"), "fetch it")
    assert (error.found, error.expected) == ("aa", "bb")


def test_a_full_disk_in_a_worker_is_a_full_disk_here(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        launch(full, tmp_path)
    assert caught.value.errno == 28


def test_a_bug_in_a_worker_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"in bug(.|\n)*an assumption that does not hold"):
        launch(bug, tmp_path)


def test_a_killed_worker_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(D2CError, match=r"died(.|\n)*same command again"):
        launch(killed, tmp_path)


def test_a_rank_that_failed_does_not_wait_for_the_others_to_leave_the_group(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ValueError"):
        runtime.launch(leaving, (tmp_path, True), workers=2, device=CPU)
    assert not (tmp_path / "1 left").exists()
    runtime.launch(leaving, (tmp_path, False), workers=2, device=CPU)
    assert (tmp_path / "1 left").exists()


def test_ranks_wait_long_for_one_that_works_alone_and_not_for_one_that_is_lost_in_a_step(tmp_path: Path) -> None:
    launch(waiting, tmp_path)
    assert [(tmp_path / name).read_text() for name in "01"] == ["1800", "1800"]


def test_workers_have_time_to_save_their_state_when_the_job_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.launcher import api

    if not hasattr(api.LaunchConfig, "shutdown_timeout"):
        pytest.skip("this torch always waits 30 s")
    seconds: list[int] = []
    monkeypatch.setattr(api, "elastic_launch", lambda config, _: lambda *_: seconds.append(config.shutdown_timeout))
    for own in ("20", None):
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", own or "")
        if own is None:
            monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
        launch(touch, tmp_path)
    assert seconds == [20, 300]


def test_alone_nobody_is_waited_for() -> None:
    runtime.meet()
    assert runtime.told(torch.tensor([1.0, 2.0])).tolist() == [[1, 2]]
    assert [runtime.any_of(wish) for wish in (True, False)] == [True, False]


def test_devices_are_checked_by_name() -> None:
    assert runtime.resolve_device("cpu") == CPU
    with pytest.raises(UsageError, match="auto, cpu, cuda"):
        runtime.resolve_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_asking_for_a_gpu_that_is_not_there_names_the_way_out() -> None:
    with pytest.raises(D2CError, match="--device cpu"):
        runtime.resolve_device("cuda")


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine with two GPUs, and what was made the current one there."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_a_gpu_that_is_named_becomes_the_current_one(current: list[torch.device]) -> None:
    assert runtime.resolve_device("cuda") == torch.device("cuda:0")
    assert not current  # a parent of several processes takes no memory there
    assert runtime.resolve_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]
    with pytest.raises(UsageError, match=r"no such GPU(.|\n)*cuda:0 to cuda:1"):
        runtime.resolve_device("cuda:2")


@pytest.mark.usefixtures("current")
def test_several_processes_take_a_gpu_each_and_never_one_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert runtime.resolve_device("cuda") == runtime.resolve_device("auto") == torch.device("cuda:1")
    with pytest.raises(UsageError, match=r"cannot share one GPU(.|\n)*--device cuda:0 for 4 processes"):
        runtime.resolve_device("cuda:0")


def test_seeds_follow_their_parts_and_their_order() -> None:
    assert runtime.seed_of("a", 1) == runtime.seed_of("a", 1)
    assert len({runtime.seed_of("a", 1), runtime.seed_of("a", 2), runtime.seed_of(1, "a"), runtime.seed_of("a1")}) == 4
    assert 0 <= runtime.seed_of("x") < 2**63


def test_arithmetic_on_one_thread_gives_the_threads_back() -> None:
    before = torch.get_num_threads()
    with runtime.one_thread(CPU):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
