"""``gradflow anatomy`` on a screen: the model as its residual skeleton, and what each part of it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.text import Text

from gradflow.findings import Finding
from gradflow.report import Report
from gradflow.reporters.anatomy_ablation import ablation_lines
from gradflow.reporters.anatomy_facts import facts
from gradflow.reporters.anatomy_rows import skeleton_rows
from gradflow.reporters.anatomy_stream import ranking_lines, stream_lines
from gradflow.reporters.columns_text import TextColumn, column_lines, column_widths
from gradflow.reporters.number_text import count_text
from gradflow.reporters.screen import Screen, rendered
from gradflow.reporters.severity_style import HEADING, LABEL
from gradflow.reporters.site_rows import BAR_HIGH, BAR_LOW, counted
from gradflow.reporters.terminal_findings import finding_lines
from gradflow.reporters.terminal_header import header_lines, verdict_lines
from gradflow.reporters.text_lines import hanging, one_line

COLUMNS = {
    "name": TextColumn(heading="block", left=True),
    "kind": TextColumn(heading="kind", left=True),
    "branch": TextColumn(heading="branch", left=True, narrowest=16, words=True),
    "norm": TextColumn(heading="norm", left=True),
    "rho": TextColumn(heading="ρ", marked=True),
    "bars": TextColumn(heading="", left=True, marked=True),
    "cosine": TextColumn(heading="cosine"),
    "influence": TextColumn(heading="influence"),
    "share": TextColumn(heading="∂branch"),
    "turn": TextColumn(heading="∂cosine"),
    "growth": TextColumn(heading="growth"),
    "scale": TextColumn(heading="scale"),
    "without": TextColumn(heading="without"),
}
GIVE_WAY = ("turn", "cosine", "scale", "branch", "influence", "kind", "growth", "norm", "bars")
_LEGEND = {
    "rho": f"ρ: ‖branch‖ / ‖skip‖, ▁ {BAR_LOW:g} to █ {BAR_HIGH:g}",
    "cosine": "cosine: of skip and branch",
    "influence": "influence: 1 − cos(x, x + F)",
    "share": "∂branch: share of the gradient's energy that comes back through the branch",
    "turn": "∂cosine: of what skip and branch bring back",
    "growth": "growth: variance of the stream after / before",
    "without": "without: change of the {measure} where the branch is left out",
}


def render(report: Report, screen: Screen) -> str:
    """The anatomy as text; no line is wider than the screen."""
    sections = [header_lines(report.trace.run, screen.width), *_body(report, screen)]
    lines: list[Text] = []
    for section in sections:
        if section:
            lines += [*section, Text("")]
    return rendered(lines[:-1], screen)


def _body(report: Report, screen: Screen) -> list[list[Text]]:
    if not report.trace.residuals:
        return [without_sites(report, screen)]
    return [
        skeleton_lines(report, screen),
        stream_lines(report, screen),
        ranking_lines(report, screen),
        fact_lines(report, screen),
        ablation_lines(report, screen),
        finding_lines(replace(report, findings=about_blocks(report.findings)), screen),
    ]


def without_sites(report: Report, screen: Screen) -> list[Text]:
    """One sentence about a model without a residual site, and the verdict that it gets."""
    sentence = no_sites(report)
    lines = [*hanging(Text(""), sentence, screen.width), Text(""), *verdict_lines(report, screen.width)]
    lines += hanging(
        Text("  "), f"more of it: gradflow inspect {one_line(report.trace.run.target)}", screen.width
    )
    return lines


def no_sites(report: Report) -> str:
    """Why there is no anatomy."""
    return (
        f"{one_line(report.trace.run.model)} has no residual site: in the forward that ran, nothing adds a tensor "
        "to what was made from it, so there is no skip, no branch and no stream."
    )


def about_blocks(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The findings about residual blocks."""
    return tuple(finding for finding in findings if finding.rule.startswith("GF2"))


def skeleton_lines(report: Report, screen: Screen) -> list[Text]:
    """A block a line."""
    rows, left_out, folded = skeleton_rows(report, show_all=screen.show_all)
    median = ", medians of the steps" if report.trace.run.steps > 1 else ""
    facts_text = f"{counted(report.trace.residuals)}{', repeated blocks folded' if folded else ''}{median}"
    lines = [
        *hanging(Text.assemble(("Residual skeleton", HEADING), "  "), facts_text, screen.width),
        *column_lines(rows, COLUMNS, GIVE_WAY, screen.width),
    ]
    if left_out:
        where = "--all" if screen.command else "report.residuals"
        lines.append(Text(f"  … {count_text(left_out, 'more row')}: {where}"))
    legend = legend_text(report, list(column_widths(rows, COLUMNS, GIVE_WAY, screen.width)))
    return lines + (hanging(Text("  "), legend, screen.width) if legend else [])


def legend_text(report: Report, columns: Sequence[str]) -> str:
    """What the columns hold."""
    measure = "output" if report.trace.ablation is None else report.trace.ablation.measure
    words = [_LEGEND[column].format(measure=measure) for column in columns if column in _LEGEND]
    return "; ".join(words)


def fact_lines(report: Report, screen: Screen) -> list[Text]:
    """How the blocks are built."""
    found = facts(report)
    if not found:
        return []
    lines = [Text("Design", style=HEADING)]
    widest = max(len(label) for label, _ in found)
    for label, sentence in found:
        lines += hanging(Text.assemble("  ", (f"{label:<{widest}}  ", LABEL)), sentence, screen.width)
    return lines
