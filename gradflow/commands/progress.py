"""One line on a terminal that says what is going on; silence anywhere else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows a short phrase on standard error until the block ends.

    What the model's own code prints meanwhile goes to standard error too: standard output is the report's.
    """
    if not sys.stderr.isatty():
        with contextlib.redirect_stdout(sys.stderr):
            yield _silent
        return
    from rich.console import Console
    from rich.text import Text

    with (
        Console(stderr=True).status(Text("starting")) as status,
        contextlib.redirect_stdout(sys.stderr),
    ):
        yield lambda phrase: status.update(Text(phrase))


def _silent(phrase: str) -> None:
    """There is nobody to watch."""
