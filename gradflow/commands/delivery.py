"""From the options about rules and output to a report in its place; shared by the commands that report."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import typer

from gradflow.config import Config
from gradflow.errors import UsageError
from gradflow.findings import Severity
from gradflow.report import Report

if TYPE_CHECKING:
    from gradflow.reporters import Reporter
    from gradflow.reporters.failed_target import FailedTarget
    from gradflow.reporters.screen import Screen

Forms: TypeAlias = "Callable[[Screen], dict[str, Reporter]]"

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
    csv_bom: bool = False
    """Whether the tables of ``csv`` start with a byte-order mark."""
    forms: Forms | None = None
    """Every output form of the command by its name; None for those of a report."""


def delivery(
    context: typer.Context,
    form: str,
    output: Path | None,
    csv: Path | None,
    show_all: bool,
    *,
    csv_bom: bool = False,
    parquet: bool = True,
    forms: Forms | None = None,
) -> Delivery:
    """The options about output, checked before anything runs.

    ``parquet`` says whether the command has one table to write so, where the name of ``output`` asks for it;
    ``forms`` are the command's own, where it does not write reports as ``inspect`` does.

    Raises:
        UsageError: There is no such format, or no such folder for ``output``, or no pyarrow for Parquet.
    """
    from gradflow.atomic_files import check_folder

    check_form(form, "--format", forms)
    if output is not None:
        check_output(form, output, parquet=parquet)
    if csv is not None:
        check_folder(csv)
    elif csv_bom:
        raise UsageError("--csv-bom marks the files of --csv, which is missing: add --csv DIR")
    command = shlex.join(["gradflow", *context.meta.get(ARGUMENTS, ())])
    return Delivery(
        form=form, output=output, csv=csv, show_all=show_all, command=command, csv_bom=csv_bom, forms=forms
    )


def check_form(form: str, option: str, forms: Forms | None = None) -> None:
    """Raise UsageError for a form that no reporter writes; the sentence names the nearest."""
    from gradflow.reporters import reporters
    from gradflow.reporters.screen import Screen

    known = list((forms or reporters)(Screen()))
    if form not in known:
        near = get_close_matches(form, known, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"there is no format {form!r}; {meant}{option} takes {', '.join(known)}")


def check_output(form: str, output: Path, *, parquet: bool) -> None:
    """Raise where a form could not be written to ``output``; ``parquet`` as for :func:`delivery`."""
    from gradflow.atomic_files import check_place

    check_place(output)
    _check_parquet(form, output, possible=parquet)


def _check_parquet(form: str, output: Path, *, possible: bool) -> None:
    from gradflow.reporters.parquet_files import check_installed

    if not _is_parquet(output):
        return
    if not possible:
        raise UsageError(
            f"{output} asks for Parquet, which a check does not write; --csv DIR writes its tables"
        )
    if form != "table":
        raise UsageError(f"{output} asks for Parquet and --format for {form}: leave one of them out")
    check_installed()


def _is_parquet(output: Path) -> bool:
    return output.suffix == ".parquet"


def judged_by(
    select: list[str] | None,
    ignore: list[str] | None,
    fail_on: Severity | None,
    thresholds: list[str] | None = None,
) -> Config:
    """The options about rules, checked before anything runs; without one, what pyproject.toml says for all targets.

    Raises:
        UsageError: A code selects no rule, or pyproject.toml is not understood.
    """
    from gradflow.commands.threshold_option import thresholds_in
    from gradflow.config_file import read_project
    from gradflow.rules import select_rules

    said = read_project().values
    config = Config(
        select=_codes(select) or said.get("select", Config().select),
        ignore=_codes(ignore) or said.get("ignore", ()),
        fail_on=fail_on,
        thresholds=thresholds_in(thresholds) or said.get("thresholds", ()),
    )
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
    from gradflow.reporters import parquet_files
    from gradflow.reporters.screen import emit

    text = _text(report, place)
    if place.csv is not None:
        report.to_csv(place.csv, byte_order_mark=place.csv_bom)
        print(f"wrote {place.csv}", file=sys.stderr)
    if place.output is None:
        emit(text, sys.stdout)
        return
    if _is_parquet(place.output):
        write_text(place.output, parquet_files.render(report, parquet_files.table_of(place.output)))
    else:
        write_text(place.output, text)
    print(f"wrote {place.output}", file=sys.stderr)


@contextlib.contextmanager
def failures_delivered(target: str, place: Delivery, config: Config) -> Iterator[None]:
    """Also where a model raises, write what a rule says about it, in the forms for programs; then raise.

    Raises:
        TraceFileError: The file cannot be written.
    """
    from gradflow.failed_add import ResidualShapeError

    try:
        yield
    except ResidualShapeError as error:
        from gradflow.checking.target_runs import shapes_differ
        from gradflow.reporters.failed_target import FailedTarget

        said = shapes_differ(error, config)
        failed = FailedTarget(
            target=target,
            message=said.message,
            traceback=said.trace_text,
            finding=said.finding,
            place=said.place,
        )
        _deliver_failure(failed, place)
        raise


def _deliver_failure(failed: FailedTarget, place: Delivery) -> None:
    from gradflow.atomic_files import write_text
    from gradflow.reporters import JOINT_REPORTERS, json_file
    from gradflow.reporters.screen import emit

    if place.form == "json":
        text = json_file.render_failure(failed)
    elif place.form in JOINT_REPORTERS:
        text = JOINT_REPORTERS[place.form]((), (failed,))
    else:
        return  # a person reads the error itself, and a table has no row for it
    if place.output is None:
        emit(text, sys.stdout)
    else:
        write_text(place.output, text)
        print(f"wrote {place.output}", file=sys.stderr)


def _text(report: Report, place: Delivery) -> str:
    from gradflow.reporters import reporters
    from gradflow.reporters.screen import Screen, wants_colour, width_of

    screen = Screen(
        width=width_of(sys.stdout),
        colour=place.output is None and wants_colour(sys.stdout),
        show_all=place.show_all,
        command=place.command,
    )
    return (place.forms or reporters)(screen)[place.form](report)
