"""Two folders side by side as CSV, JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence

from gradflow.columns import Column, Kind
from gradflow.folder_diff import FolderDiff, RowDiff, TableDiff, fact_columns, number_columns
from gradflow.plain_values import to_plain
from gradflow.reporters import markdown_text
from gradflow.reporters.csv_files import csv_text
from gradflow.reporters.diff_rows import SHORT, alone, moved_rows, summary, tables
from gradflow.reporters.markdown_text import escaped
from gradflow.trace_file import Row
from gradflow.trace_model import SCHEMA_VERSION

_ROOM = 15_000
"""Bytes of one Markdown table: four of them fit a comment."""


def columns(table: str) -> tuple[Column, ...]:
    """Names, alignment, what moved, then before and after of every fact, and before, after and ratio of numbers."""
    text = ("row_a", "row_b", "aligned_by", "moved")
    facts = [f"{name}_{side}" for name in fact_columns(table) for side in ("a", "b")]
    numbers = [
        Column(f"{column.name}_{side}", Kind.NUMBER, "ratio" if side == "ratio" else column.unit)
        for column in number_columns(table)
        for side in ("a", "b", "ratio")
    ]
    return (
        *(Column(name, Kind.TEXT, "") for name in text),
        Column("factor", Kind.NUMBER, "ratio"),
        *(Column(name, Kind.TEXT, "") for name in facts),
        *numbers,
    )


def rows(table: TableDiff) -> list[Row]:
    """One row a row of either folder, keyed as :func:`columns`."""
    return [_row(row, columns(table.name)) for row in table.rows]


def _row(row: RowDiff, wanted: Sequence[Column]) -> Row:
    cells: Row = {
        "row_a": row.label_a,
        "row_b": row.label_b,
        "aligned_by": row.by.value,
        "moved": row.changed[0][0] if row.changed else row.moved.column if row.moved else "",
        "factor": row.factor if row.changes else None,
    }
    for name, before, after in row.facts:
        cells |= {f"{name}_a": before, f"{name}_b": after}
    for change in row.changes:
        cells |= {
            f"{change.column}_a": change.a,
            f"{change.column}_b": change.b,
            f"{change.column}_ratio": change.ratio,
        }
    return {column.name: cells.get(column.name) for column in wanted}


def render_csv(diff: FolderDiff, table: str) -> str:
    """One table as CSV text."""
    (found,) = [each for each in diff.tables if each.name == table]
    return csv_text(rows(found), columns(table))


def render_json(diff: FolderDiff) -> str:
    """``schema``, ``a``, ``b``, and a flat array a table, keyed as the CSV columns; all ASCII."""
    whole = {"schema": SCHEMA_VERSION, "a": diff.a, "b": diff.b}
    arrays = {table.name: rows(table) for table in diff.tables}
    return json.dumps(to_plain(whole | arrays), allow_nan=False, indent=1) + "\n"


def render_markdown(diff: FolderDiff, *, show_all: bool = False) -> str:
    """A section a table, for a pull request."""
    lines = [f"## gradflow diff: {escaped(diff.a)} → {escaped(diff.b)}", ""]
    for table in tables(diff):
        lines += _section(table, show_all=show_all)
    return "\n".join(lines).rstrip("\n") + "\n"


def _section(table: TableDiff, *, show_all: bool) -> list[str]:
    moved = moved_rows(table)
    shown = moved if show_all else moved[:SHORT]
    cells = [[escaped(cell) for cell in (row.label, row.what, row.a, row.b, row.ratio)] for row in shown]
    lines = [f"### {table.name.capitalize()}", "", escaped(summary(table)), ""]
    if cells:
        lines += markdown_text.table(
            ("row", "moved most", "a", "b", "b / a"), cells, 2, room=_ROOM, rest="`--format csv`"
        )
        lines += [""]
    if len(moved) > len(shown):
        lines += [f"{len(moved) - len(shown)} more moved.", ""]
    for words, labels in alone(table, show_all=show_all):
        lines += [f"**{words}**: {escaped(labels)}", ""]
    return lines
