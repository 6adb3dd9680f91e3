"""A check as one CSV table: the layers of every target, with its name in the last column."""

from __future__ import annotations

from gradflow.checking.outcome import CheckOutcome
from gradflow.columns import LAYER_COLUMNS, Column, Kind
from gradflow.reporters.csv_files import csv_text
from gradflow.trace_file import layer_rows


def render(outcome: CheckOutcome) -> str:
    """Columns as in layers.csv, then ``target``."""
    rows = [
        {**row, "target": target.name}
        for target in outcome.targets
        if target.report is not None
        for row in layer_rows(target.report.trace)
    ]
    return csv_text(rows, (*LAYER_COLUMNS, Column("target", Kind.TEXT, "")))
