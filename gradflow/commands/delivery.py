"""From the options about rules and output to a report in its place; shared by the commands that report."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import typer

from gradflow.config import Config
from gradflow.errors import UsageError
from gradflow.findings import Severity
from gradflow.report import Report

ARGUMENTS = "gradflow.arguments"
"""Under this key of the context's ``meta`` the arguments stand as they were typed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """Where a report goes, and in which form."""

    form: str
    """A key of :func:`gradflow.reporters.reporters`."""
    output: Path | None
    csv: Path | None
    show_all: bool
    command: str
    """The command line, for the table's suggestions."""


def delivery(
    context: typer.Context, form: str, output: Path | None, csv: Path | None, show_all: bool
) -> Delivery:
    """The options about output, checked before anything runs.

    Raises:
        UsageError: There is no such format, or no such folder for ``output``.
    """
    from gradflow.atomic_files import check_folder, check_place
    from gradflow.reporters import reporters
    from gradflow.reporters.screen import Screen

    forms = list(reporters(Screen()))
    if form not in forms:
        near = get_close_matches(form, forms, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"there is no format {form!r}; {meant}--format takes {', '.join(forms)}")
    if output is not None:
        check_place(output)
    if csv is not None:
        check_folder(csv)
    command = shlex.join(["gradflow", *context.meta.get(ARGUMENTS, ())])
    return Delivery(form=form, output=output, csv=csv, show_all=show_all, command=command)


def judged_by(select: list[str] | None, ignore: list[str] | None, fail_on: Severity | None) -> Config:
    """The options about rules, checked before anything runs.

    Raises:
        UsageError: A code selects no rule.
    """
    from gradflow.rules import select_rules

    config = Config(select=_codes(select) or Config().select, ignore=_codes(ignore), fail_on=fail_on)
    select_rules(config.select, config.ignore)
    return config


def _codes(values: list[str] | None) -> tuple[str, ...]:
    """["GF1,GF3", "GF201"] -> ("GF1", "GF3", "GF201")."""
    return tuple(code.strip() for value in values or () for code in value.split(",") if code.strip())


def deliver(report: Report, place: Delivery) -> None:
    """Write the report where it was asked to go: files first, then standard output.

    Raises:
        TraceFileError: A file cannot be written.
    """
    from gradflow.atomic_files import write_text
    from gradflow.reporters import reporters
    from gradflow.reporters.screen import Screen, emit, wants_colour, width_of

    to_stdout = place.output is None
    screen = Screen(
        width=width_of(sys.stdout),
        colour=to_stdout and wants_colour(sys.stdout),
        show_all=place.show_all,
        command=place.command,
    )
    text = reporters(screen)[place.form](report)
    if place.csv is not None:
        report.to_csv(place.csv)
        print(f"wrote {place.csv}", file=sys.stderr)
    if place.output is None:
        emit(text, sys.stdout)
        return
    write_text(place.output, text)
    print(f"wrote {place.output}", file=sys.stderr)
