"""Known failures become a message and an exit code; anything else is a bug and keeps its traceback.

0 done, 1 known failure, 2 usage, 3 integrity, 4 version, 75 stopped by a signal (run again), 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer

from d2c.errors import InterruptedRunError, UsageError
from d2c_cli.config_file import JSON
from d2c_cli.render import safe
from formats.errors import FormatError, IntegrityError, VersionError

FAILURE, USAGE, INTEGRITY, VERSION, TRY_AGAIN, CTRL_C = 1, 2, 3, 4, 75, 130
_CODES: tuple[tuple[type[FormatError], int], ...] = (
    (InterruptedRunError, TRY_AGAIN),
    (UsageError, USAGE),
    (VersionError, VERSION),
    (IntegrityError, INTEGRITY),
    (FormatError, FAILURE),
)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_HINTS = {
    errno.EACCES: "check who owns it and its permissions, or choose another place",
    errno.EPERM: "check who owns it and its permissions, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENOENT: "check the path: it, or a folder above it, is not there and cannot be made",
    errno.ENOTDIR: "a part of this path is a file where a folder is needed: choose another path",
    errno.EEXIST: "something else is in its place: move that away, or choose another path",
    errno.EISDIR: "a folder is where a file is needed: move it away, or choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EBUSY: "something is mounted there, or it is in use: choose another path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ESTALE: "the network file system lost it: run the same command again",
    errno.EIO: "the storage itself failed: look at the system's log, and verify what was written before",
}
"""What an operating system refuses for reasons outside the program, and what to do about it."""


@dataclass(frozen=True)
class Failure:
    """What a person is told, and the exit code."""

    kind: str
    what: str
    code: int
    where: str | None = None
    found: str | None = None
    expected: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        parts = [("where", self.where), ("found", self.found), ("expected", self.expected), ("try", self.hint)]
        # Names come from files and servers that may hold control characters for the terminal.
        return safe("\n".join([f"error: {self.what}", *(f"  {name}: {value}" for name, value in parts if value)]))

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "what": self.what,
            "where": self.where,
            "found": self.found,
            "expected": self.expected,
            "hint": self.hint,
        }


def failure_of(error: BaseException) -> Failure | None:
    """What to say about ``error``, or None where it is a bug."""
    if isinstance(error, FormatError):
        code = next(code for kind, code in _CODES if isinstance(error, kind))
        return Failure(type(error).__name__, error.what, code, error.where, error.found, error.expected, error.hint)
    if isinstance(error, KeyboardInterrupt):
        return _interrupted(signal.SIGINT)
    if isinstance(error, OSError) and (error.errno in _HINTS or error.errno in _DISK_FULL):
        return _refused(error)
    if _disk_full_inside(error):
        return _disk_full("the disk", str(error).splitlines()[0])
    return _of_torch(error)


@contextmanager
def known_failures(ctx: typer.Context) -> Iterator[None]:
    """Print a known failure on stderr (with ``--json`` also as a document on stdout) and exit with its code."""
    try:
        yield
    except typer.BadParameter as error:
        _name_the_place(error)
        if ctx.meta.get(JSON):
            _document(ctx, Failure("UsageError", error.format_message(), USAGE))
        raise
    except (typer.Exit, typer.Abort):
        raise
    except (Exception, KeyboardInterrupt) as error:
        failure = failure_of(error)
        if failure is None:
            raise
        typer.echo(failure if failure.code != CTRL_C else failure.what, err=True)
        if ctx.meta.get(JSON):
            _document(ctx, failure)
        raise typer.Exit(failure.code) from None


def _document(ctx: typer.Context, failure: Failure) -> None:
    document = {"command": ctx.invoked_subcommand, "ok": False, "error": failure.to_dict()}
    typer.echo(json.dumps(document, indent=2))


def _name_the_place(error: typer.BadParameter) -> None:
    """A bad value that nobody typed: say where it stands."""
    source = error.ctx.get_parameter_source(error.param.name or "") if error.ctx and error.param else None
    if error.param is not None and source is not None and source.name == "ENVIRONMENT":
        error.message += f" It is set by the environment variable {error.param.envvar}."
    elif source is not None and source.name == "DEFAULT_MAP":
        error.message += " It is set by the --config file."


def _interrupted(number: int) -> Failure:
    if number == signal.SIGINT:
        return Failure("Interrupted", "interrupted: run the same command again to resume", CTRL_C)
    name = signal.Signals(number).name
    return Failure("Interrupted", f"stopped by {name}", TRY_AGAIN, hint="run the same command again to resume")


def _refused(error: OSError) -> Failure:
    where = None if error.filename is None else str(error.filename)
    if error.errno in _DISK_FULL:
        return _disk_full(where, error.strerror)
    hint = _HINTS.get(error.errno or 0)
    return Failure(type(error).__name__, "the operating system refused", FAILURE, where, error.strerror, hint=hint)


def _disk_full(where: str | None, found: str | None) -> Failure:
    return Failure(
        "DiskFull",
        "the disk is full; nothing finished is lost",
        FAILURE,
        where,
        found,
        hint="free some space and run the same command again: it goes on where it stopped",
    )


def _disk_full_inside(error: BaseException) -> bool:
    """Libraries in other languages report a full disk as an error of their own."""
    foreign = type(error).__module__.split(".")[0] in ("safetensors", "pyarrow", "safetensors_rust")
    text = str(error)
    return foreign and ("No space left" in text or "StorageFull" in text)


def _of_torch(error: BaseException) -> Failure | None:
    # Looked up, not imported: without torch in memory the error cannot be torch's.
    elastic = sys.modules.get("torch.distributed.elastic.multiprocessing.api")
    if elastic is not None and isinstance(error, elastic.SignalException):
        return _interrupted(int(error.sigval))
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        first = str(error).splitlines()[0]
        # The batch of a training is part of what it learns.
        hint = "lower --batch-size; of d2c train, --micro-batch"
        return Failure("OutOfMemory", "the GPU is out of memory", FAILURE, found=first, hint=hint)
    return None
