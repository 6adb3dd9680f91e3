"""A check's outcome to where it was asked to go, and what it has to say on standard error."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gradflow.checking.outcome import CheckOutcome
from gradflow.commands.delivery import Delivery, check_form, check_output
from gradflow.errors import UsageError

if TYPE_CHECKING:
    from gradflow.reporters.failed_target import FailedTarget


def copy_place(text: str, place: Delivery) -> Delivery:
    """ "sarif=gradflow.sarif" -> where one more form of the same check goes.

    Raises:
        UsageError: There is no such format, or no such folder.
    """
    form, equals, file = text.partition("=")
    if not equals or not file:
        raise UsageError(f"--also {text}: write a format and a file, sarif=gradflow.sarif")
    check_form(form, "--also")
    check_output(form, Path(file), parquet=False)
    return replace(place, form=form, output=Path(file), csv=None)


def deliver_check(outcome: CheckOutcome, place: Delivery, copies: Sequence[Delivery] = ()) -> None:
    """Write files first, then standard output, then what went wrong.

    Args:
        outcome: What is told.
        place: Where it goes.
        copies: Files that hold it in other forms.

    Raises:
        TraceFileError: A file cannot be written.
    """
    from gradflow.atomic_files import write_text
    from gradflow.reporters.screen import emit

    text = _rendered(outcome, place)
    written = [(copy.output, _rendered(outcome, copy)) for copy in copies if copy.output is not None]
    if place.output is not None:
        written.append((place.output, text))
    if place.csv is not None:
        _write_csv(outcome, place)
    if place.form == "github":
        from gradflow.reporters.github import write_step_summary

        write_step_summary(outcome.reports, os.environ, _failed(outcome))
    for file, content in written:
        write_text(file, content)
        print(f"wrote {file}", file=sys.stderr)
    if place.output is None:
        emit(text, sys.stdout)
    for line in _talk(outcome, on_screen=place.form == "table" and place.output is None):
        print(line, file=sys.stderr)


def _rendered(outcome: CheckOutcome, place: Delivery) -> str:
    from gradflow.reporters import JOINT_REPORTERS, check_csv, check_json, check_screen
    from gradflow.reporters.screen import Screen, wants_colour, width_of

    if place.form == "table":
        colour = place.output is None and wants_colour(sys.stdout)
        screen = Screen(
            width=width_of(sys.stdout), colour=colour, show_all=place.show_all, command=place.command
        )
        return check_screen.render(outcome, screen)
    own = {"json": check_json.render, "csv": check_csv.render}
    if place.form in own:
        return own[place.form](outcome)
    return JOINT_REPORTERS[place.form](outcome.reports, _failed(outcome))


def _failed(outcome: CheckOutcome) -> list[FailedTarget]:
    from gradflow.reporters.failed_target import FailedTarget

    return [
        FailedTarget(
            target=target.target,
            message=target.failure.message,
            traceback=target.failure.trace_text,
            finding=target.failure.finding,
            place=target.failure.place,
            name="" if target.name == target.target else target.name,
        )
        for target in outcome.targets
        if target.failure is not None
    ]


def _write_csv(outcome: CheckOutcome, place: Delivery) -> None:
    assert place.csv is not None
    names = [target.name for target in outcome.targets]
    folders = [place.csv] if len(names) == 1 else [place.csv / name for name in folder_names(names)]
    for target, folder in zip(outcome.targets, folders, strict=True):
        if target.report is not None:
            target.report.to_csv(folder, byte_order_mark=place.csv_bom)
            print(f"wrote {folder}", file=sys.stderr)


def folder_names(names: list[str]) -> list[str]:
    """A folder for each target: its name with what no file system minds, numbered where two become alike."""
    plain = [re.sub(r"[^\w.-]+", "_", name).strip("._") or "target" for name in names]
    taken: set[str] = set()
    for at, name in enumerate(plain):
        number, free = 2, name
        while free.lower() in taken:
            free, number = f"{name}-{number}", number + 1
        taken.add(free.lower())
        plain[at] = free
    return plain


def _talk(outcome: CheckOutcome, *, on_screen: bool) -> Iterator[str]:
    """What a form for programs does not say; where the table was shown, what it did not."""
    for target in outcome.targets:
        if target.failure is not None:
            if target.failure.trace_text:
                yield target.failure.trace_text.rstrip("\n")
            yield f"gradflow: {target.name}: {target.failure.message}"
        for line in () if on_screen else target.gone:
            yield f"gradflow: gone: {line}; --write-baseline drops it"
    for line in outcome.stale:
        yield f"gradflow: gone with its target: {line}; --write-baseline drops it"
    for ignore in outcome.unused_ignores:
        yield f"gradflow: this ignore matches nothing, remove it: {ignore}"
