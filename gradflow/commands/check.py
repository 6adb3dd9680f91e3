"""``gradflow check``: every target of a project -> one exit code."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gradflow.commands import check_options, options
from gradflow.commands.check_options import given_settings
from gradflow.commands.delivery import delivery
from gradflow.commands.progress import progress_line
from gradflow.errors import UsageError

if TYPE_CHECKING:
    from gradflow.baseline import KnownFinding
    from gradflow.checking.outcome import CheckOutcome
    from gradflow.checking.plan import CheckPlan
    from gradflow.checking.target_runs import TargetRun


def check(
    context: typer.Context,
    targets: check_options.Targets = None,
    inputs: options.Inputs = None,
    loss: options.Loss = None,
    batch_size: options.BatchSize = None,
    checkpoint: options.Checkpoint = None,
    trained: check_options.Trained = None,
    shattered: check_options.Shattered = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: check_options.Seed = None,
    steps: check_options.Steps = None,
    train: options.Training = None,
    jobs: check_options.Jobs = 1,
    select: options.Select = None,
    ignore: options.Ignore = None,
    threshold: options.Thresholds = None,
    fail_on: check_options.FailOn = None,
    strict_ignores: check_options.StrictIgnores = None,
    baseline: check_options.Baseline = None,
    write_baseline: check_options.WriteBaseline = False,
    max_regression: check_options.MaxRegression = None,
    reference: check_options.Reference = None,
    seeds: check_options.Seeds = None,
    form: check_options.Format = None,
    output: options.Output = None,
    also: check_options.Also = None,
    csv: check_options.Csv = None,
    csv_bom: options.CsvBom = False,
    show_all: options.ShowAll = False,
) -> int:
    """Check targets and exit with 1 for a finding that nobody accepted.

    Without TARGET: all targets of pyproject.toml. The exit code is the
    highest of the targets' codes; a target that cannot be run does not stop
    the others.
    """
    from gradflow.checking.outcome import judge
    from gradflow.checking.plan import make_plan
    from gradflow.checking.target_runs import run_targets
    from gradflow.commands.check_delivery import copy_place, deliver_check
    from gradflow.config_file import read_project
    from gradflow.reporters.github import default_format

    form = form or default_format(os.environ)
    place = delivery(context, form, output, csv, show_all, csv_bom=csv_bom, parquet=False)
    copies = [copy_place(text, place) for text in also or ()]
    plan = make_plan(read_project(), targets or (), given_settings(context.params))
    known = _known(plan, writing=write_baseline)
    with progress_line() as show:
        runs = tuple(_hinted(run, plan) for run in run_targets(plan.targets, jobs=jobs, progress=show))
    outcome = judge(plan, runs, known)
    if write_baseline:
        outcome = _accepted(plan, runs, outcome, known)
    deliver_check(outcome, place, copies)
    return outcome.exit_code


def _known(plan: CheckPlan, *, writing: bool) -> tuple[KnownFinding, ...]:
    """Lines of the baseline, read before anything runs; one that is to be written may be missing."""
    from gradflow.atomic_files import check_place
    from gradflow.baseline import load

    if writing:
        check_place(_baseline_path(plan))
        return load(_baseline_path(plan)) if _baseline_path(plan).exists() else ()
    return load(plan.baseline) if plan.baseline is not None else ()


def _baseline_path(plan: CheckPlan) -> Path:
    """Where a baseline is written that nobody named: beside pyproject.toml, else here."""
    from gradflow.baseline import DEFAULT_NAME

    if plan.baseline is not None:
        return plan.baseline
    return plan.path.parent / DEFAULT_NAME if plan.path is not None else Path(DEFAULT_NAME)


def _hinted(run: TargetRun, plan: CheckPlan) -> TargetRun:
    """A target that is not understood may be a configured one, misspelt."""
    from gradflow.checking.plan import near_target

    hint = near_target(run.name, plan)
    if run.failure is None or run.failure.exit_code != UsageError.exit_code or not hint:
        return run
    return replace(run, failure=replace(run.failure, message=run.failure.message + hint))


def _accepted(
    plan: CheckPlan, runs: tuple[TargetRun, ...], outcome: CheckOutcome, known: tuple[KnownFinding, ...]
) -> CheckOutcome:
    """Write the baseline, and judge again by what it holds now."""
    from gradflow.baseline import save
    from gradflow.checking.outcome import judge, renewed_baseline

    path = _baseline_path(plan)
    lines = renewed_baseline(plan, outcome, known)
    save(lines, path)
    print(f"wrote {path}: {len(lines)} known, {len(known)} before", file=sys.stderr)
    if plan.baseline is None:
        print(f"gradflow check --baseline {path} accepts them from now on", file=sys.stderr)
    return judge(plan, runs, lines)
