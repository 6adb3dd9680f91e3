"""The report as CSV files, for spreadsheets and review."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from gradflow import trace_file
from gradflow.atomic_files import write_folder
from gradflow.columns import FINDING_COLUMNS, LAYER_COLUMNS, PARAMETER_COLUMNS, RESIDUAL_COLUMNS, Column
from gradflow.plain_values import spell
from gradflow.report import Report
from gradflow.trace_file import Cell, Row

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def render(report: Report) -> str:
    """The layers table as CSV text."""
    return csv_text(trace_file.layer_rows(report.trace), LAYER_COLUMNS)


def write(report: Report, directory: str | Path) -> None:
    """Write every table and the trace into a folder, together or not at all.

    Raises:
        TraceFileError: The folder cannot be made or written to.
    """
    write_folder(directory, files(report))


def files(report: Report) -> dict[str, str]:
    """Text by file name; residuals.csv only where the model has residual sites."""
    trace = report.trace
    texts = {
        "layers.csv": render(report),
        "parameters.csv": csv_text(trace_file.parameter_rows(trace), PARAMETER_COLUMNS),
        "findings.csv": csv_text(trace_file.finding_rows(report.findings), FINDING_COLUMNS),
        "trace.json": trace_file.dumps(trace),
    }
    if trace.residuals:
        texts["residuals.csv"] = csv_text(trace_file.residual_rows(trace), RESIDUAL_COLUMNS)
    return texts


def csv_text(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A header line and one line a row; ``\\n`` ends a line, quotes only where needed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column.name for column in columns])
    writer.writerows([[_cell(row[column.name]) for column in columns] for row in rows])
    return text.getvalue()


def _cell(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, str):
        return _harmless(cell)
    return str(spell(cell)) if isinstance(cell, float) else str(cell)


def _harmless(text: str) -> str:
    """Text on one line that no spreadsheet takes for a formula: these are led by an apostrophe."""
    quoted = f"'{text}" if text.startswith(_FORMULA_STARTS) else text
    return quoted.replace("\r", "\\r").replace("\n", "\\n")
