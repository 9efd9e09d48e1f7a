"""Known failures: what, where, found, expected, what to try. Anything else is a bug and keeps its traceback."""

from __future__ import annotations

from formats.errors import FormatError


class D2CError(FormatError):
    """A known failure of a d2c stage; the command line prints it and exits with 1."""


class UsageError(D2CError):
    """The options contradict each other or do not fit the data; the command line exits with 2."""


class InterruptedRunError(D2CError):
    """A signal asked the job to stop; its state is saved and the same command resumes it (exit 75, EX_TEMPFAIL)."""
