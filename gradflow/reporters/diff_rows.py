"""Two folders side by side, as rows of text that the screen and Markdown share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from gradflow.folder_diff import SAME, FolderDiff, RowDiff, TableDiff
from gradflow.reporters.number_text import count_text, number_text
from gradflow.reporters.text_lines import one_line
from gradflow.row_alignment import AlignedBy
from gradflow.trace_file import Cell

SHORT = 20
"""Rows of a table that are shown where not all are asked for."""
NAMED = 6
"""Rows of one folder alone that are named in a sentence."""
BESIDE = {
    "layers": ("gradient_norm", "activation_rms", "signal"),
    "residuals": ("rho", "gradient_ratio", "block_influence"),
    "parameters": ("gradient_norm", "norm", "elasticity"),
    "findings": (),
}
"""The columns whose ratio is shown for every row where there is room, by table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedRow:
    """One line about a row that moved: what moved most, and the ratios beside it."""

    label: str
    what: str
    a: str
    b: str
    ratio: str
    beside: tuple[str, ...]
    """A ratio for each column of :data:`BESIDE`; "" where one side was not measured."""


def moved_rows(table: TableDiff) -> list[MovedRow]:
    """The rows that moved, the furthest first."""
    return [_moved(row, table.name) for row in table.rows if row.factor > SAME]


def _moved(row: RowDiff, table: str) -> MovedRow:
    ratios = {change.column: change.ratio for change in row.changes}
    what, a, b, ratio = _most(row)
    return MovedRow(
        label=label(row),
        what=what,
        a=a,
        b=b,
        ratio=ratio,
        beside=tuple(ratio_text(ratios[column]) for column in BESIDE[table]),
    )


def _most(row: RowDiff) -> tuple[str, str, str, str]:
    """What became something else goes before what moved, however far."""
    if row.changed or row.moved is None:
        what, before, after = row.changed[0]
        return what, cell_text(before), cell_text(after), ""
    moved = row.moved
    return moved.column, number_text(moved.a), number_text(moved.b), ratio_text(moved.ratio)


def label(row: RowDiff) -> str:
    """One name where both have it, else both."""
    names = dict.fromkeys(one_line(name) for name in (row.label_a, row.label_b) if name)
    return " → ".join(names)


def ratio_text(ratio: float | None) -> str:
    """ "×1.5"; "" where there is none; "=" for what did not move."""
    if ratio is None:
        return ""
    if ratio > 0 and math.isfinite(ratio) and max(ratio, 1 / ratio) <= SAME:
        return "="
    return f"×{number_text(ratio)}"


def cell_text(cell: Cell) -> str:
    """A cell on one line; a dash for not measured."""
    if isinstance(cell, float) or cell is None:
        return number_text(cell)
    return one_line(str(cell))


def summary(table: TableDiff) -> str:
    """ "21 rows: 20 by name, 1 by position; 14 moved"."""
    counts = Counter(row.by for row in table.rows)
    parts = [f"{counts[by]} {_WORDS[by]}" for by in AlignedBy if counts[by]]
    moved = sum(row.factor > SAME for row in table.rows)
    return f"{count_text(len(table.rows), 'row')}: {', '.join(parts)}; {moved or 'none'} moved"


_WORDS = {
    AlignedBy.NAME: "by name",
    AlignedBy.POSITION: "by position",
    AlignedBy.ONLY_A: "only in a",
    AlignedBy.ONLY_B: "only in b",
}


def alone(table: TableDiff, *, show_all: bool) -> Iterator[tuple[str, str]]:
    """ "only in a" and the labels of those rows, a few of them unless all are asked for."""
    for by in (AlignedBy.ONLY_A, AlignedBy.ONLY_B):
        labels = [label(row) for row in table.rows if row.by is by]
        shown = labels if show_all else labels[:NAMED]
        more = f" and {len(labels) - len(shown)} more" if len(labels) > len(shown) else ""
        if labels:
            yield _WORDS[by], f"{', '.join(shown)}{more}"


def tables(diff: FolderDiff) -> list[TableDiff]:
    """Those that have rows in either folder."""
    return [table for table in diff.tables if table.rows]
