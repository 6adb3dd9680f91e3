"""``gradflow inspect``: a model file -> what its gradient does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from gradflow.commands import options
from gradflow.commands.delivery import deliver, delivery, failures_delivered, judged_by
from gradflow.commands.progress import progress_line
from gradflow.commands.target_loading import loaded

if TYPE_CHECKING:
    from gradflow.recording.target import Target
    from gradflow.report import Report


def inspect(
    context: typer.Context,
    target: options.Target,
    inputs: options.Inputs = None,
    loss: options.Loss = None,
    batch_size: options.BatchSize = None,
    checkpoint: options.Checkpoint = None,
    trained: options.Trained = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    steps: options.Steps = 1,
    train: options.Training = None,
    try_fixes: options.TryFixes = False,
    shattered: options.Shattered = False,
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
    """Run a model forward and backward once and say where its gradient goes.

    The exit code is 0 whatever is found, unless --fail-on is given.
    """
    from gradflow.analyzer import analyze

    place = delivery(context, form, output, csv, show_all, csv_bom=csv_bom)
    config = judged_by(select, ignore, fail_on, threshold)
    with failures_delivered(target, place, config), progress_line() as show:
        model, wanted = loaded(context.params, show)
        from gradflow.recording.execution import record
        from gradflow.recording.shattered import with_correlation

        trained = trained or checkpoint is not None
        trace = record(model, seed=seed, steps=steps, trained=trained, mode=wanted.mode, progress=show)
        if shattered:
            trace = with_correlation(model, trace, seed=seed, mode=wanted.mode)
        report = analyze(trace, config)
        report = _with_repairs(model, report, wanted.mode, show) if try_fixes else report
    deliver(report, place)
    return 1 if report.fails(config.fail_on) else 0


def _with_repairs(model: Target, report: Report, mode: str | None, show: Callable[[str], None]) -> Report:
    from gradflow.repair_trials import try_repairs

    tried = try_repairs(model, report, mode=mode, progress=show)
    if not tried.repairs:
        print("gradflow: no finding here has a repair to try", file=sys.stderr)
    return tried
