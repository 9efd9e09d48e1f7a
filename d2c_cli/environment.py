"""What must be set before torch is imported, and which foreign noise stays off the terminal."""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType

from d2c.errors import InterruptedRunError

_DEFAULTS = {
    # Idle OpenMP threads that spin take the cores from other processes.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Notes of torch's C++ side, such as a CPU without NNPACK: nothing a user could act on.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # These draw bars and print notes of their own beside ours.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    # torch's launcher sets its loggers to this when it is imported.
    "LOGLEVEL": "CRITICAL",
}
_LOGGERS = (
    # The launcher logs how each worker ended; `errors` says it once, with the traceback where it was a bug.
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
    "torch.multiprocessing.spawn",
    "timm.models._builder",
    "timm.models._hub",
    "httpx",
)


def prepare() -> None:
    """Set defaults that the user's environment can override; call before anything heavy is imported."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _stop)
    for logger in _LOGGERS:
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    # A file name may hold what the terminal's encoding lacks.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _stop(number: int, frame: FrameType | None) -> None:
    raise InterruptedRunError(
        f"stopped by {signal.Signals(number).name}",
        hint="run the same command again: it goes on from its last finished part or checkpoint",
    )
