"""Report -> text, one file an output form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from gradflow.report import Report
from gradflow.reporters import csv_files, github, gitlab, json_file, junit, markdown, sarif, terminal
from gradflow.reporters.failed_target import FailedTarget
from gradflow.reporters.screen import Screen

Reporter: TypeAlias = Callable[[Report], str]
JointReporter: TypeAlias = Callable[[Sequence[Report], Sequence[FailedTarget]], str]

JOINT_REPORTERS: dict[str, JointReporter] = {
    "markdown": markdown.render_all,
    "sarif": sarif.render,
    "junit": junit.render,
    "github": github.render,
    "gitlab": gitlab.render,
}
"""The forms that hold the reports of several targets, and those that have none, by their ``--format`` name."""


def reporters(screen: Screen) -> dict[str, Reporter]:
    """Every output form by its ``--format`` name; only the table needs to know its reader's screen."""
    return {
        "table": partial(terminal.render, screen=screen),
        "json": json_file.render,
        "csv": csv_files.render,
        "markdown": markdown.render,
        "sarif": partial(_alone, sarif.render),
        "junit": partial(_alone, junit.render),
        "github": partial(_alone, github.render),
        "gitlab": partial(_alone, gitlab.render),
    }


def _alone(render: JointReporter, report: Report) -> str:
    return render((report,), ())
