"""Text in lines: wrapping, hanging indents, and names that break at their dots."""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

_CONSOLE = Console(width=80, legacy_windows=False)
PROSE_WIDTH = 110
"""Longer lines are hard to read, whatever the terminal."""


def one_line(text: str) -> str:
    """Text with control characters and line breaks made visible or turned to spaces."""
    spaced = " ".join(text.split())
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in spaced)


def wrap(text: Text | str, width: int) -> list[Text]:
    """Lines of at most ``width`` cells; words longer than that are cut."""
    body = text if isinstance(text, Text) else Text(text)
    lines = list(body.wrap(_CONSOLE, max(width, 8), overflow="fold"))
    for line in lines:
        line.rstrip()
    return lines


def breakable(text: str, width: int) -> str:
    """Text whose words are at most ``width`` cells: longer ones, mostly names, get a space at a dot."""
    return " ".join(piece for word in text.split() for piece in fold_name(word, width))


def hanging(head: Text, body: Text | str, width: int) -> list[Text]:
    """``head``, then ``body`` wrapped beside it; following lines are indented by the head's width."""
    indent = head.cell_len
    room = min(width, PROSE_WIDTH) - indent
    lines = wrap(breakable(body, room) if isinstance(body, str) else body, room)
    first, *rest = lines or [Text("")]
    return [Text.assemble(head, first), *(Text.assemble(" " * indent, line) for line in rest)]


def fold_name(name: str, limit: int) -> list[str]:
    """A dotted name in pieces of at most ``limit`` cells, broken after a dot or before a bracket where one is."""
    pieces: list[str] = []
    for part in name.replace(".", ".\0").replace("[", "\0[").split("\0"):
        for chunk in _chunks(part, limit):
            if pieces and cell_len(pieces[-1]) + cell_len(chunk) <= limit:
                pieces[-1] += chunk
            else:
                pieces.append(chunk)
    return pieces


def _chunks(part: str, limit: int) -> list[str]:
    chunks = [""]
    for char in part:
        if cell_len(chunks[-1] + char) > limit:
            chunks.append("")
        chunks[-1] += char
    return chunks


def pad(text: str, width: int, *, right: bool = False) -> str:
    """Text filled with spaces to ``width`` cells, on its left where ``right`` aligns it."""
    spaces = " " * max(0, width - cell_len(text))
    return spaces + text if right else text + spaces


def shorten(text: str, width: int) -> str:
    """Text of at most ``width`` cells; the middle gives way, for a name's ends say most."""
    if cell_len(text) <= width:
        return text
    head, tail = (width - 1) - (width - 1) // 2, (width - 1) // 2
    start, end = text, text
    while cell_len(start) > head:
        start = start[:-1]
    while cell_len(end) > tail:
        end = end[1:]
    return f"{start}…{end}"
