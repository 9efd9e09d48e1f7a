"""Where a job runs: device, precision, seeds, and processes. The one module that reads torchrun's variables."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from d2c.errors import D2CError, InterruptedRunError, UsageError
from formats.errors import FormatError, IntegrityError, VersionError
from formats.hashing import xxh3

T = TypeVar("T")
_alone: ContextVar[bool] = ContextVar("alone", default=False)
_STOP = (signal.SIGTERM, signal.SIGUSR1)
_PATIENCE = timedelta(days=7)
"""How long ranks wait for the one that works: training a scorer takes longer than torch's half hour."""
_SUMS = timedelta(minutes=30)
"""How long they wait within a step, where nobody works alone: a node that died must not leave the others spinning."""
_SAVING = 300
"""Seconds in which a state is surely written: SiT-XL/2's 14.5 GB, to a slow disk."""
_patient: list[Any] = []
"""The group that waits for `_PATIENCE`, once `_join` made it; gloo's, since waiting in NCCL keeps a GPU busy."""


@dataclass(frozen=True)
class Ranks:
    """This process among the ones that share a job."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        return self.rank == 0


def ranks() -> Ranks:
    """This process's place, as torchrun (or d2c's own launcher) set it; alone where neither did, and inside `once`."""
    if _alone.get():
        return Ranks()
    return Ranks(
        rank=int(os.environ.get("RANK", "0")),
        world=int(os.environ.get("WORLD_SIZE", "1")),
        local=int(os.environ.get("LOCAL_RANK", "0")),
    )


def resolve_device(name: str) -> torch.device:
    """``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``, as this rank's device.

    Raises:
        D2CError: CUDA was asked for and torch sees none.
        UsageError: the name is none of these, or of a GPU that is not there or would serve several processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not (name == "cuda" or (name.startswith("cuda:") and name[5:].isdigit())):
        raise UsageError("unknown device", found=name, expected="auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise D2CError(
            "torch sees no GPU on this machine",
            found=f"--device {name}",
            hint="add --device cpu, or set D2C_DEVICE=cpu",
        )
    count, world = torch.cuda.device_count(), ranks().world
    if ":" not in name:
        return torch.device(f"cuda:{ranks().local % count}")
    if world > 1:
        raise UsageError(
            "several processes cannot share one GPU",
            found=f"--device {name} for {world} processes",
            expected="--device cuda, of which each takes its own",
        )
    if int(name[5:]) >= count:
        raise UsageError("there is no such GPU", found=f"--device {name}", expected=f"cuda:0 to cuda:{count - 1}")
    # Streams, events and pinned memory that name no device are the current one's.
    torch.cuda.set_device(torch.device(name))
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> str:
    """``auto`` is bf16 on a GPU and fp32 on a CPU."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" else "fp32"


def precisions(name: str, device: torch.device) -> list[str]:
    """What ``name`` may stand for, best first: what was finished as ``auto`` on another device is taken as it is."""
    found = [resolve_precision(name, device)]
    return found + [other for other in ("bf16", "fp32") if name == "auto" and other not in found]


@contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Mixed precision over fp32 weights; fp32 is left alone, and tf32 multiplies matrices with 10 bits on a GPU."""
    dtype = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        if precision != "tf32" or device.type != "cuda":
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def seed_of(*parts: object) -> int:
    """A 63-bit seed that is a pure function of its parts."""
    return int(xxh3("\0".join(map(str, parts)).encode())[:16], 16) >> 1


def generator(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by ``seed_of(*parts)``."""
    return torch.Generator(device).manual_seed(seed_of(*parts))


def rng(*parts: object) -> np.random.Generator:
    """A numpy generator seeded by ``seed_of(*parts)``."""
    return np.random.Generator(np.random.PCG64(seed_of(*parts)))


def one_thread(device: torch.device) -> AbstractContextManager[None]:
    """Run CPU arithmetic on one thread: sums must not depend on how many processes share the cores."""
    return cpu_threads(device, 1)


@contextmanager
def cpu_threads(device: torch.device, count: int | None) -> Iterator[None]:
    """Run CPU arithmetic on ``count`` threads; None leaves torch's own number, and so does a GPU."""
    before = torch.get_num_threads()
    if count and device.type == "cpu":
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGUSR1 came since: they are noted and no more, so that a job can save its state first."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread hears signals
        return
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in _STOP}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def once(action: Callable[[], T]) -> T | None:
    """Under torchrun, let the first rank do it while the others wait; alone, just do it. Others get None.

    Inside, the first rank is alone: what it launches does not wait for the ranks that wait for it.
    """
    here = ranks()
    if here.world == 1:
        return action()
    _join()
    # At the entry too: nobody may look at what the first rank is about to change.
    meet()
    token = _alone.set(True)
    try:
        return action() if here.main else None
    finally:
        _alone.reset(token)
        meet()


def meet() -> None:
    """Wait for the other ranks, for as long as one of them works alone; alone, do nothing."""
    if ranks().world > 1:
        dist.barrier(group=_patient[0])


def told(values: Tensor) -> Tensor:
    """What each rank brings: float32 [...] on the CPU -> [ranks, ...]. They wait for one another as in `meet`."""
    if ranks().world == 1:
        return values[None]
    found = [torch.empty_like(values) for _ in range(ranks().world)]
    dist.all_gather(found, values, group=_patient[0])
    return torch.stack(found)


def any_of(wish: bool) -> bool:
    """Whether any rank wishes it; they wait for one another as in `meet`."""
    return bool(told(torch.tensor([float(wish)])).any())


def launch(worker: Callable[[Ranks, Any], None], argument: Any, *, workers: int, device: torch.device) -> None:
    """Run ``worker(ranks, argument)`` on ``workers`` processes and wait for all of them.

    Under torchrun the processes exist already. One worker runs in this process. More are started through torch's
    elastic launcher; ``worker`` and ``argument`` must then be picklable.

    Raises:
        D2CError: a worker died; what it finished is kept.
    """
    here = ranks()
    if here.world > 1:
        _join()
        meet()
        worker(here, argument)
        meet()
    elif workers <= 1:
        worker(Ranks(), argument)
    else:
        _spawn(worker, argument, workers, device)


def _spawn(worker: Callable[[Ranks, Any], None], argument: Any, workers: int, device: torch.device) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if device.type == "cuda" and workers > torch.cuda.device_count():
        raise UsageError(
            "there are fewer GPUs than asked for",
            found=f"--gpus {workers}",
            expected=f"at most {torch.cuda.device_count()}",
        )
    # Workers have that long to save their state on SIGTERM; an older torch kills them after 30 s whatever one says.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVING))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    with tempfile.TemporaryDirectory(prefix="d2c-") as folder:
        try:
            elastic_launch(config, _child)(worker, argument, folder)
        except ChildFailedError as error:
            raise _cause(Path(folder)) or D2CError(
                "a worker process died",
                found=f"rank {min(error.failures)}, exit code {min(error.failures.values(), key=_time).exitcode}",
                hint="finished parts are kept: run the same command again; if it dies again, memory may be short",
            ) from error


def _time(failure: Any) -> float:
    return float(failure.timestamp)


def _child(worker: Callable[[Ranks, Any], None], argument: Any, folder: str) -> None:
    # Ctrl-C ends a worker even where it waits for a GPU, rather than when torch's patience with workers ends.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _join()
    try:
        worker(ranks(), argument)
    except Exception as error:
        # Told before the group falls apart: the other ranks' lost connections would hide it.
        if not _lost_peer(error):
            _tell(Path(folder), error)
        raise
    # Not after a failure: NCCL would wait for peers that wait for this rank in a sum, and nobody would see it fail.
    dist.destroy_process_group()


def _lost_peer(error: Exception) -> bool:
    """Whether a rank only noticed that another one had gone."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Gloo", "NCCL"))


def _tell(folder: Path, error: Exception) -> None:
    """Leave the error for the parent, unless another rank was first."""
    told: dict[str, Any] = {"kind": "bug", "what": traceback.format_exc()}
    if isinstance(error, FormatError):
        parts = {name: getattr(error, name) for name in ("where", "found", "expected", "hint")}
        told = {"kind": type(error).__name__, "what": error.what, "parts": parts}
    elif isinstance(error, OSError) and error.errno is not None:
        told = {"kind": "OSError", "what": [error.errno, error.strerror, str(error.filename or "")]}
    temporary = folder / f"{ranks().rank}.tmp"
    temporary.write_text(json.dumps(told), encoding="utf-8")
    with contextlib.suppress(FileExistsError):
        os.link(temporary, folder / "error.json")


def _cause(folder: Path) -> Exception | None:
    """The first worker's own error, of its own type where it was a known failure."""
    path = folder / "error.json"
    if not path.exists():
        return None
    told = json.loads(path.read_text(encoding="utf-8"))
    if told["kind"] == "OSError":
        return OSError(*told["what"])
    if told["kind"] == "bug":
        return RuntimeError(f"a worker process failed:\n{told['what']}")
    known = (UsageError, InterruptedRunError, FormatError, IntegrityError, VersionError)
    types = {kind.__name__: kind for kind in known}
    return types.get(told["kind"], D2CError)(told["what"], **told["parts"])


def _join() -> None:
    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks().local % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=_SUMS)
    else:
        dist.init_process_group("gloo", timeout=_SUMS)
    _patient[:] = [dist.new_group(backend="gloo", timeout=_PATIENCE)]
