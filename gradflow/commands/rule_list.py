"""``gradflow rules``: every rule, without running anything."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from gradflow.errors import UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from gradflow.reporters.screen import Screen

_FORMATS = ("table", "json")


def rules(
    form: Annotated[str, typer.Option("--format", metavar="FORMAT", help="table or json.")] = "table",
) -> int:
    """List every rule: its code, its name, how bad it can be, and what it says."""
    from gradflow.reporters.screen import Screen, emit, rendered, wants_colour, width_of

    if form not in _FORMATS:
        raise UsageError(f"there is no format {form!r} here; --format takes {', '.join(_FORMATS)}")
    if form == "json":
        emit(json.dumps(rule_rows(), indent=1) + "\n", sys.stdout)
        return 0
    screen = Screen(width=width_of(sys.stdout), colour=wants_colour(sys.stdout))
    emit(rendered(_lines(screen), screen), sys.stdout)
    return 0


def rule_rows() -> list[dict[str, str | list[str]]]:
    """One row a rule: ``code``, ``slug``, ``severities`` (mildest first) and ``summary``."""
    from gradflow.rules import RULES

    return [
        {
            "code": rule.code,
            "slug": rule.slug,
            "severities": [
                severity.value
                for severity in sorted({t.severity for t in rule.thresholds}, key=lambda s: s.rank)
            ],
            "summary": rule.summary,
        }
        for rule in RULES
    ]


def _lines(screen: Screen) -> list[Text]:
    from rich.text import Text

    from gradflow.findings import Severity
    from gradflow.reporters.severity_style import COLOURS, HEADING, LABEL
    from gradflow.reporters.text_lines import hanging

    lines: list[Text] = []
    for row in rule_rows():
        worst = Severity(row["severities"][-1])
        title = Text.assemble((str(row["code"]), f"bold {COLOURS[worst]}"), "  ", (str(row["slug"]), HEADING))
        lines.append(title.append(f"  {', '.join(row['severities'])}"))
        lines += hanging(Text("       "), str(row["summary"]), screen.width)
    shown = Text.assemble("gradflow explain CODE", style=LABEL)
    return [*lines, Text(""), shown.append("  shows a rule's page: formula, limits, sources, examples")]
