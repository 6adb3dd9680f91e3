"""Where a report is read: how wide, in colour or plain, and in which characters."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.text import Text

from gradflow.errors import TraceFileError

DEFAULT_WIDTH = 80
NARROWEST, WIDEST = 60, 160

# One character for one, so that columns stay where they are.
_ASCII = str.maketrans(
    {
        "✗": "x",
        "✓": "+",
        "▲": "!",
        "↑": "^",
        "●": "*",
        "•": "*",
        "·": "-",
        "–": "-",
        "—": "-",
        "−": "-",
        "…": "~",
        "×": "x",
        "÷": "/",
        "→": ">",
        "≥": ">",
        "≤": "<",
        "‖": "|",
        "²": "2",
        "σ": "s",
        "ρ": "r",
        "∂": "d",
        "│": "|",
        "┤": "|",
        "└": "+",
        "─": "-",
        "▁": ".",
        "▂": ".",
        "▃": ":",
        "▄": ":",
        "▅": ":",
        "▆": "#",
        "▇": "#",
        "█": "#",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """What the table needs to know about its reader."""

    width: int = DEFAULT_WIDTH
    """Columns; no line is longer."""
    colour: bool = False
    show_all: bool = False
    """Every layer row instead of those that matter."""
    command: str | None = None
    """The command line that made the report, for the suggestions; None for a report made from Python."""


def width_of(stream: TextIO) -> int:
    """Columns of a stream: ``COLUMNS`` where it is set, else the terminal's, else 80; from 60 to 160."""
    asked = os.environ.get("COLUMNS", "")
    columns = int(asked) if asked.isdecimal() and int(asked) > 0 else _terminal_width(stream)
    return max(NARROWEST, min(columns, WIDEST))


def _terminal_width(stream: TextIO) -> int:
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return DEFAULT_WIDTH
    return columns or DEFAULT_WIDTH


def wants_colour(stream: TextIO) -> bool:
    """True on a terminal with colours; ``NO_COLOR`` forbids them, ``FORCE_COLOR`` asks for them in a pipe."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def rendered(lines: Iterable[Text], screen: Screen) -> str:
    """Lines, already no wider than the screen, as text with or without colour codes."""
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=screen.width,
        force_terminal=screen.colour,
        color_system="standard" if screen.colour else None,
        no_color=not screen.colour,
        legacy_windows=False,
        highlight=False,
        markup=False,
        emoji=False,
    )
    for line in lines:
        line.rstrip()
        console.print(line, soft_wrap=True)
    return stream.getvalue()


def encodable(text: str, encoding: str) -> str:
    """Text that ``encoding`` can take: ASCII stands in for our own characters, an escape for any other."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_ASCII).encode(encoding, "backslashreplace").decode(encoding)
    return text


def emit(text: str, stream: TextIO) -> None:
    """Write a report to a stream and flush it; a reader that has gone away (``| head``) is no error.

    Raises:
        TraceFileError: The stream takes no more (a full disk).
    """
    try:
        stream.write(encodable(text, stream.encoding or "utf-8"))
        stream.flush()
    except OSError as error:
        # Python flushes standard output once more at exit, which would raise again without this.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not isinstance(error, BrokenPipeError):
            raise TraceFileError(f"cannot write to standard output: {error.strerror}") from error
