"""A folder of CSV tables, read back into typed rows."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradflow.columns import (
    FINDING_COLUMNS,
    LAYER_COLUMNS,
    PARAMETER_COLUMNS,
    RESIDUAL_COLUMNS,
    Column,
    Kind,
)
from gradflow.errors import TraceFileError
from gradflow.trace_file import Cell, Row

TABLES: Mapping[str, tuple[Column, ...]] = {
    "layers": LAYER_COLUMNS,
    "residuals": RESIDUAL_COLUMNS,
    "parameters": PARAMETER_COLUMNS,
    "findings": FINDING_COLUMNS,
}
"""Columns by the name of the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFolder:
    """What ``--csv DIR`` wrote."""

    path: str
    tables: Mapping[str, tuple[Row, ...]]
    """Rows of every table of :data:`TABLES`; none where the file is not there."""


def read_folder(path: str | Path) -> TableFolder:
    """Read the tables of a folder; columns that a version does not write are None in every row.

    Text stays as it stands in the file, with its apostrophes and escapes.

    Raises:
        TraceFileError: There is no such folder, no table in it, or one that is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise TraceFileError(f"no such folder: {path}; `gradflow inspect TARGET --csv DIR` writes one")
    files = {name: folder / f"{name}.csv" for name in TABLES}
    if not any(file.is_file() for file in files.values()):
        names = ", ".join(file.name for file in files.values())
        raise TraceFileError(f"{path} holds none of {names}; `gradflow inspect TARGET --csv DIR` writes them")
    tables = {name: _rows(file, TABLES[name]) if file.is_file() else () for name, file in files.items()}
    return TableFolder(path=str(path), tables=tables)


def _rows(file: Path, columns: Sequence[Column]) -> tuple[Row, ...]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return _parsed(csv.reader(lines, strict=True), file, columns)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceFileError(f"cannot read {file}: {error}; write it again with --csv") from error


def _parsed(lines: Iterator[list[str]], file: Path, columns: Sequence[Column]) -> tuple[Row, ...]:
    header = next(lines, [])
    if columns[0].name not in header:
        raise TraceFileError(
            f"{file} does not start with the names of its columns, separated by commas: was it saved by "
            "another program? Write it again with --csv"
        )
    places = {column: header.index(column.name) for column in columns if column.name in header}
    rows: list[Row] = []
    for number, cells in enumerate(lines, 2):
        if len(cells) != len(header):
            raise TraceFileError(
                f"{file}, line {number}: {len(cells)} cells under {len(header)} columns; "
                "was it cut short? Write it again with --csv"
            )
        values = {
            column.name: _value(cells[at], column, f"{file}, line {number}") for column, at in places.items()
        }
        rows.append({column.name: values.get(column.name) for column in columns})
    return tuple(rows)


def _value(cell: str, column: Column, where: str) -> Cell:
    if column.kind is Kind.TEXT:
        return cell
    if not cell:
        return None
    if column.kind is Kind.BOOLEAN:
        return cell.lower() == "true"
    try:
        return int(cell) if column.kind is Kind.INTEGER else float(cell)
    except ValueError as error:
        raise TraceFileError(
            f"{where}: {column.name} is {cell[:40]!r}, not a number; write it again with --csv"
        ) from error
