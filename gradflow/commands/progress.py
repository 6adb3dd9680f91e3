"""One line on a terminal that says what is going on; silence anywhere else."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gradflow.standard_streams import diverted

if TYPE_CHECKING:
    from rich.console import RenderableType


class ProgressLine:
    """Shows what is going on, in a few words or as a bar; silent without a terminal.

    Args:
        show: Puts something in the place of what was shown before; None for nobody to watch.
    """

    def __init__(self, show: Callable[[RenderableType], None] | None) -> None:
        self._show = show
        self._started = 0.0

    def __call__(self, phrase: str) -> None:
        """Show a short phrase."""
        if self._show is not None:
            from rich.text import Text

            self._started = 0.0
            self._show(Text(phrase))

    def count(self, done: int, total: int) -> None:
        """Show a bar: so many of so many forwards."""
        if self._show is None:
            return
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = time.monotonic()
        self._started = self._started or now
        left = (now - self._started) / max(done - 1, 1) * (total - done)
        row = Table.grid(padding=(0, 1))
        row.add_row(
            Text("ablation"),
            ProgressBar(total=total, completed=done, width=30),
            Text(f"{done:,} of {total:,} forwards, {left:.0f} s left"),
        )
        self._show(row)


@contextlib.contextmanager
def progress_line() -> Iterator[ProgressLine]:
    """Yield what shows progress on standard error until the block ends.

    What the model's own code prints meanwhile goes to standard error too, and a working directory that it
    leaves does not move the report.
    """
    if not sys.stderr.isatty():
        with diverted(), _directory_kept():
            yield ProgressLine(None)
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text("starting")) as status, diverted(), _directory_kept():
        yield ProgressLine(status.update)


@contextlib.contextmanager
def _directory_kept() -> Iterator[None]:
    before = os.getcwd()  # noqa: PTH109 - a directory that is gone raises here, not where a file is written
    try:
        yield
    finally:
        os.chdir(before)
