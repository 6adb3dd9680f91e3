"""``gradflow report``: a saved trace -> the same report as on the day it was recorded, without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradflow.commands import options
from gradflow.commands.delivery import deliver, delivery, judged_by


def report(
    context: typer.Context,
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace.json that --csv DIR wrote.")],
    select: options.Select = None,
    ignore: options.Ignore = None,
    threshold: options.Thresholds = None,
    fail_on: options.FailOn = None,
    form: options.Format = "table",
    output: options.Output = None,
    csv: options.Csv = None,
    csv_bom: options.CsvBom = False,
    show_all: options.ShowAll = False,
) -> int:
    """Show a saved trace again, in any format, without the model or torch."""
    from gradflow import trace_file
    from gradflow.analyzer import analyze

    place = delivery(context, form, output, csv, show_all, csv_bom=csv_bom)
    config = judged_by(select, ignore, fail_on, threshold)
    judged = analyze(trace_file.load(trace), config)
    deliver(judged, place)
    return 1 if judged.fails(config.fail_on) else 0
