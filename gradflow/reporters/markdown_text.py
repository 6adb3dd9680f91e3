"""Markdown that shows what it is given and obeys none of it, in as much room as there is."""

from __future__ import annotations

from collections.abc import Sequence

from gradflow.reporters.number_text import count_text
from gradflow.reporters.text_lines import one_line, shorten

_SPECIAL = str.maketrans(
    {char: f"\\{char}" for char in "\\`*_{}[]|#~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;", "@": "&#64;"}
)
_LONGEST = 600
"""Cells of one text; a name of 300 characters stands whole."""


def escaped(text: str) -> str:
    """Text on one line in which no character is Markdown or HTML, and no name calls a person."""
    return shorten(one_line(text), _LONGEST).translate(_SPECIAL)


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], left: int, *, room: int, rest: str = ""
) -> list[str]:
    """A table whose first ``left`` columns are aligned left, the others right.

    Args:
        headings: One a column.
        rows: Their cells are already escaped.
        left: How many columns are text.
        room: Bytes that it may take; rows that do not fit are counted below it.
        rest: Where the others are, for that line: "`layers.csv`".
    """
    rule = ["---"] * left + ["---:"] * (len(headings) - left)
    lines = [_line(headings), _line(rule)]
    taken = size(lines) + len(rest) + 40
    for at, row in enumerate(rows):
        line = _line(row)
        taken += size([line])
        if taken > room:
            return [*lines, "", f"{count_text(len(rows) - at, 'more row')} in {rest}."]
        lines.append(line)
    return lines


def size(lines: Sequence[str]) -> int:
    """Bytes of the lines with their ends."""
    return sum(len(line.encode("utf-8", "replace")) + 1 for line in lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
