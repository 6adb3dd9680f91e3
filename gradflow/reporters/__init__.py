"""Report -> text, one file an output form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from gradflow.report import Report
from gradflow.reporters import csv_files, json_file, markdown, terminal
from gradflow.reporters.screen import Screen

Reporter: TypeAlias = Callable[[Report], str]


def reporters(screen: Screen) -> dict[str, Reporter]:
    """Every output form by its ``--format`` name; only the table needs to know its reader's screen."""
    return {
        "table": partial(terminal.render, screen=screen),
        "json": json_file.render,
        "csv": csv_files.render,
        "markdown": markdown.render,
    }
