"""Standard output is the report's: whatever a model writes goes to standard error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_OUT, _ERR = 1, 2


def open_closed() -> None:
    """Give the process a null device for every standard stream that it was started without.

    Otherwise the next file that anything opens would take the stream's number and receive its text.
    """
    for descriptor in (0, _OUT, _ERR):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


@contextlib.contextmanager
def diverted() -> Iterator[None]:
    """Send to standard error what is written to standard output meanwhile, by whatever way.

    That includes what passes by ``sys.stdout``: ``os.write``, a library in C, a child process.
    """
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
        try:
            kept = os.dup(_OUT)
            os.dup2(_ERR, _OUT)
        except OSError:  # started without one of them, and not by way of the command line
            kept = None
        if kept is not None:
            stack.callback(_put_back, kept)
        yield


def _put_back(kept: int) -> None:
    with contextlib.suppress(
        OSError, AttributeError, ValueError
    ):  # a stream that is gone has nothing waiting
        sys.__stdout__.flush()  # type: ignore[union-attr]
    os.dup2(kept, _OUT)
    os.close(kept)


def end_report() -> None:
    """Flush standard output and close it to everything that runs while the process ends."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.dup2(_ERR, _OUT)
