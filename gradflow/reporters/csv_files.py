"""The report as CSV files, for spreadsheets and review."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from gradflow import trace_file
from gradflow.ablation_rows import ablation_rows
from gradflow.atomic_files import write_folder
from gradflow.columns import (
    ABLATION_COLUMNS,
    FINDING_COLUMNS,
    LAYER_COLUMNS,
    PARAMETER_COLUMNS,
    RESIDUAL_COLUMNS,
    Column,
)
from gradflow.plain_values import spell
from gradflow.report import Report
from gradflow.trace_file import Cell, Row

BYTE_ORDER_MARK = "\ufeff"
"""By which some spreadsheets tell UTF-8 from an older encoding."""
# The full-width forms too: some spreadsheets read them as the plain ones.
_FORMULA_STARTS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # noqa: RUF001
# Control characters, and what else ends a line or hides: a cell is one line, and shows all it holds.
_ESCAPED = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]")


def render(report: Report) -> str:
    """The layers table as CSV text."""
    return csv_text(trace_file.layer_rows(report.trace), LAYER_COLUMNS)


def write(report: Report, directory: str | Path, *, byte_order_mark: bool = False) -> None:
    """Write every table and the trace into a folder, together or not at all.

    Raises:
        TraceFileError: The folder cannot be made or written to.
    """
    mark = BYTE_ORDER_MARK if byte_order_mark else ""
    texts = files(report)
    write_folder(
        directory, {name: mark + text if name.endswith(".csv") else text for name, text in texts.items()}
    )


def files(report: Report) -> dict[str, str]:
    """Text by file name; residuals.csv only where the model has residual sites, ablation.csv where it was ablated."""
    trace = report.trace
    texts = {
        "layers.csv": render(report),
        "parameters.csv": csv_text(trace_file.parameter_rows(trace), PARAMETER_COLUMNS),
        "findings.csv": csv_text(trace_file.finding_rows(report.findings), FINDING_COLUMNS),
        "trace.json": trace_file.dumps(trace),
    }
    if trace.residuals:
        texts["residuals.csv"] = csv_text(trace_file.residual_rows(trace), RESIDUAL_COLUMNS)
    if trace.ablation is not None:
        texts["ablation.csv"] = csv_text(ablation_rows(trace), ABLATION_COLUMNS)
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
    shown = _ESCAPED.sub(lambda found: repr(found[0])[1:-1], text)
    return f"'{shown}" if shown.startswith(_FORMULA_STARTS) else shown
