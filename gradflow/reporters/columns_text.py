"""Rows of text cells in columns that fit a width: the least telling columns give way before a name is broken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from gradflow.findings import Severity
from gradflow.reporters.severity_style import COLOURS, MARKS
from gradflow.reporters.text_lines import fold_name, pad, shorten

_GAP = "  "
_NAME_FOLDS_AT = 28


@dataclass(frozen=True, slots=True, kw_only=True)
class TextColumn:
    """One column of a table on the screen."""

    heading: str
    left: bool = False
    """Aligned left, as text is; numbers are aligned right."""
    narrowest: int | None = None
    """Cells may be shortened down to this width; None for never."""
    words: bool = False
    """Shortened by whole words, the last first."""
    marked: bool = False
    """Drawn in the colour of the row's mark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """One row: a cell a column, "" for nothing, and the finding it carries."""

    cells: Mapping[str, str]
    mark: Severity | None = None


def column_lines(
    rows: Sequence[TextRow], columns: Mapping[str, TextColumn], give_way: Sequence[str], width: int
) -> list[Text]:
    """A heading and each row, in lines of at most ``width`` cells.

    Args:
        rows: What to show.
        columns: In order; the first is the name, which is folded and never cut. A column without a cell is left out.
        give_way: Columns to leave out, first to go first, until the names have room.
        width: Of the screen.
    """
    widths = column_widths(rows, columns, give_way, width)
    heading = "  " + _GAP.join(_aligned(columns[key].heading, columns[key], widths[key]) for key in widths)
    lines = [Text(heading.rstrip(), style="underline")]
    for row in rows:
        lines += _row_lines(row, columns, widths)
    return lines


def column_widths(
    rows: Sequence[TextRow], columns: Mapping[str, TextColumn], give_way: Sequence[str], width: int
) -> dict[str, int]:
    """Width of each column that is shown, in order."""
    name = next(iter(columns))
    natural = {
        key: max(cell_len(column.heading), *(cell_len(row.cells[key]) for row in rows))
        for key, column in columns.items()
        if any(row.cells[key] for row in rows)
    }
    wanted = min(natural[name], _NAME_FOLDS_AT)
    for dropped in range(len(give_way) + 1):
        kept = {key: size for key, size in natural.items() if key not in give_way[:dropped]}
        room = _room(kept, name, width)
        for key, size in kept.items():
            narrowest = columns[key].narrowest
            if room < wanted and narrowest is not None and narrowest < size:
                kept[key] = max(narrowest, size - (wanted - room))
                room = _room(kept, name, width)
        if room >= wanted:
            break
    return kept | {name: min(natural[name], max(8, room))}


def _room(kept: Mapping[str, int], name: str, width: int) -> int:
    """What is left for the name."""
    others = sum(size for key, size in kept.items() if key != name)
    return width - 2 - others - len(_GAP) * (len(kept) - 1)


def _aligned(text: str, column: TextColumn, width: int) -> str:
    short = _fewer_words(text, width) if column.words else shorten(text, width)
    return pad(short, width, right=not column.left)


def _fewer_words(text: str, width: int) -> str:
    """The first words that fit, and "…" for the others; a first word that does not fit is shortened."""
    if cell_len(text) <= width:
        return text
    words = text.split()
    while words and cell_len(" ".join([*words, "…"])) > width:
        words.pop()
    return " ".join([*words, "…"]) if words else shorten(text, width)


def _row_lines(row: TextRow, columns: Mapping[str, TextColumn], widths: Mapping[str, int]) -> list[Text]:
    first = next(iter(widths))
    indent = len(row.cells[first]) - len(row.cells[first].lstrip(" └"))
    name, *more = fold_name(row.cells[first], widths[first])
    colour = COLOURS[row.mark] if row.mark else ""
    line = Text.assemble((MARKS[row.mark] if row.mark else " ", colour), " ", pad(name, widths[first]))
    for key in [key for key in widths if key != first]:
        column = columns[key]
        line.append(_GAP)
        line.append(_aligned(row.cells[key], column, widths[key]), style=colour if column.marked else "")
    return [line, *(Text(f"  {' ' * indent}{piece}") for piece in more)]
