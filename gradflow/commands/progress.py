"""One line on a terminal that says what is going on; silence anywhere else."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from gradflow.standard_streams import diverted


@contextlib.contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows a short phrase on standard error until the block ends.

    What the model's own code prints meanwhile goes to standard error too, and a working directory that it
    leaves does not move the report.
    """
    if not sys.stderr.isatty():
        with diverted(), _directory_kept():
            yield _silent
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text("starting")) as status, diverted(), _directory_kept():
        yield lambda phrase: status.update(Text(phrase))


@contextlib.contextmanager
def _directory_kept() -> Iterator[None]:
    before = os.getcwd()  # noqa: PTH109 - a directory that is gone raises here, not where a file is written
    try:
        yield
    finally:
        os.chdir(before)


def _silent(phrase: str) -> None:
    """There is nobody to watch."""
