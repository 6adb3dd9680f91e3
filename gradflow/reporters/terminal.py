"""The screen: header, verdict, profile, residual blocks, layers, findings, repairs tried, what to do next."""

from __future__ import annotations

from rich.text import Text

from gradflow.report import Report
from gradflow.reporters.screen import Screen, rendered
from gradflow.reporters.terminal_chart import chart_lines
from gradflow.reporters.terminal_findings import finding_lines, next_lines
from gradflow.reporters.terminal_header import header_lines, verdict_lines
from gradflow.reporters.terminal_repairs import repair_lines
from gradflow.reporters.terminal_residuals import residual_lines
from gradflow.reporters.terminal_table import table_lines


def render(report: Report, screen: Screen) -> str:
    """The report as text; no line is wider than the screen, and has colour codes only if it wants them."""
    sections = [
        header_lines(report.trace.run, screen.width),
        verdict_lines(report, screen.width),
        chart_lines(report, screen.width),
        residual_lines(report, screen),
        table_lines(report, screen),
        finding_lines(report, screen),
        repair_lines(report.repairs, screen),
        next_lines(report, screen),
    ]
    lines: list[Text] = []
    for section in sections:
        if section:
            lines += [*section, Text("")]
    return rendered(lines[:-1], screen)
