"""The report as GitHub-flavoured Markdown, for a pull request or a page."""

from __future__ import annotations

from collections.abc import Sequence

from gradflow.findings import Finding, Severity
from gradflow.report import Report
from gradflow.reporters.failed_target import FailedTarget
from gradflow.reporters.layer_choice import shown
from gradflow.reporters.markdown_text import escaped, size, table
from gradflow.reporters.number_text import count_text
from gradflow.reporters.severity_style import MARKS
from gradflow.reporters.site_rows import counted, site_table
from gradflow.reporters.terminal_chart import last_gradient
from gradflow.reporters.terminal_findings import beside_threshold, ranked
from gradflow.reporters.terminal_findings import counted as severities
from gradflow.reporters.terminal_header import header_rows, verdict
from gradflow.reporters.terminal_repairs import repair_cells
from gradflow.reporters.terminal_table import TableRow, table_rows

_COLUMNS = {
    "name": "layer",
    "type": "type",
    "shape": "shape",
    "rms": "rms",
    "std": "std",
    "zeros": "zeros",
    "gradient": "gradient",
    "gain": "gain",
}
_SITE_COLUMNS = {
    "name": "site",
    "kind": "kind",
    "rho": "ρ",
    "cosine": "cosine",
    "influence": "influence",
    "gradient": "gradient source / sum",
    "scale": "branch scale",
}
_LOG = "`findings.csv`"
MARKER = "<!-- gradflow -->"
"""First line, by which the comment of an earlier run is found and replaced."""
LIMIT = 65_000
"""Bytes; GitHub takes no comment above 65,536 characters."""
_LEAST = 1_500
"""Bytes below which a report is told in one line."""


def render(report: Report) -> str:
    """Verdict and findings, and layers, residual sites and run in a block to unfold; ends with a newline."""
    return render_all((report,))


def render_all(reports: Sequence[Report], failed: Sequence[FailedTarget] = ()) -> str:
    """One comment for several targets, worst first, each with its share of what a comment can hold."""
    room = (LIMIT - size([MARKER])) // max(len(reports) + len(failed), 1) - 2
    if room < _LEAST:
        return _listed(reports, failed)
    ordered = sorted(reports, key=_urgency)
    sections = [*(_failure(target) for target in failed), *(_report(report, room) for report in ordered)]
    parts = ["\n".join(section).rstrip("\n") for section in sections]
    text = "\n".join([MARKER, "\n\n".join(parts) or "gradflow: no target."]) + "\n"
    return text if size([text]) <= LIMIT else _listed(reports, failed)


def _urgency(report: Report) -> int:
    """The worse what is new in a report, the earlier a reviewer reads it."""
    return -max((finding.severity.rank for finding in report.findings if not finding.known), default=-1)


def _failure(failed: FailedTarget) -> list[str]:
    said = [] if failed.finding is None else ["", *_findings((failed.finding,), LIMIT // 4)]
    return [f"## gradflow: {escaped(failed.label)}", "", _not_checked(failed), *said, ""]


def _not_checked(failed: FailedTarget) -> str:
    return f"{MARKS[Severity.ERROR]} **not checked**: {escaped(failed.message)}"


def _listed(reports: Sequence[Report], failed: Sequence[FailedTarget]) -> str:
    """A line a target, worst first, as many as fit."""
    ordered = sorted(reports, key=_urgency)
    rows = [(escaped(target.label), _not_checked(target)) for target in failed]
    rows += [(escaped(report.label), _verdict(report)) for report in ordered]
    heading = [MARKER, f"## gradflow: {count_text(len(rows), 'target')}", ""]
    listed = table(("target", "verdict"), rows, left=2, room=LIMIT - size(heading), rest="the job's log")
    return "\n".join([*heading, *listed]) + "\n"


def _report(report: Report, room: int) -> list[str]:
    head = [f"## gradflow: {escaped(report.label)}", "", _verdict(report), ""]
    room -= size(head)
    findings = _findings(report.findings, room * 2 // 3)
    repairs = _repairs(report, room // 3)
    room -= size(findings) + size(repairs)
    return [*head, *findings, *repairs, *_details(report, room)]


def _verdict(report: Report) -> str:
    said = verdict(report)
    rule = f" ({said.rule})" if said.rule else ""
    return f"{MARKS[said.severity]} **{escaped(said.subject)}**: {escaped(said.sentence)}{rule}"


def _details(report: Report, room: int) -> list[str]:
    """What a reviewer looks up, folded away; nothing where it would not fit."""
    opening = ["<details>", "<summary>Layers, residual blocks and run</summary>", ""]
    run = [*_run(report), "", "</details>"]
    room -= size([*opening, *run])
    if room < 0:
        return []
    residuals = _residuals(report, room // 2)
    return [*opening, *residuals, *_layers(report, room - size(residuals)), *run]


def _findings(findings: Sequence[Finding], room: int) -> list[str]:
    if not findings:
        return []
    placed = ranked(findings)
    rows = [_finding_cells(place.finding) for place in placed]
    headings = ("", "rule", "where", "what", "try", "number")
    return [
        f"### Findings: {severities(findings)}",
        "",
        *table(headings, rows, 5, room=room - 80, rest=_LOG),
        "",
    ]


def _finding_cells(finding: Finding) -> tuple[str, ...]:
    what = f"{escaped(finding.message)}. {escaped(finding.why)}".rstrip()
    if finding.consequence_of:
        what += f" (a consequence of {escaped(finding.consequence_of)})"
    return (
        f"{MARKS[finding.severity]} {finding.severity}{' (known)' if finding.known else ''}",
        f"{finding.rule} {escaped(finding.slug)}",
        escaped(str(finding.location)) or "(model)",
        what,
        escaped(finding.hint),
        escaped(beside_threshold(finding)),
    )


def _repairs(report: Report, room: int) -> list[str]:
    if not report.repairs:
        return []
    rows = [
        tuple(escaped(cell) for cell in (*repair_cells(outcome), outcome.where, outcome.code))
        for outcome in report.repairs
    ]
    head = ["### Fixes tried", ""]
    headings = ("repair", "gain J", "findings left", "where", "code")
    return [*head, *table(headings, rows, 5, room=room - size(head), rest="`--format json`"), ""]


def _residuals(report: Report, room: int) -> list[str]:
    if not report.trace.residuals:
        return []
    sites = site_table(report)
    rows = [[escaped(row.cells[column]) for column in _SITE_COLUMNS] for row in sites.rows]
    more = ["", f"{count_text(sites.left_out, 'more row')} in `residuals.csv`."] if sites.left_out else []
    head = ["### Residual blocks", "", f"{counted(report.trace.residuals)}; ρ is ‖branch‖ / ‖skip‖.", ""]
    left = room - size([*head, *more])
    listed = table(tuple(_SITE_COLUMNS.values()), rows, 2, room=left, rest="`residuals.csv`")
    return [*head, *listed, *more, ""]


def _layers(report: Report, room: int) -> list[str]:
    groups, chosen = shown(report)
    rows = [_layer_cells(row) for row in table_rows(chosen, last_gradient(report.trace.trunk))]
    left_out = len(groups) - len(chosen)
    more = ["", f"{count_text(left_out, 'more row')} in `layers.csv`."] if left_out else []
    left = room - size(["### Layers", "", *more, ""])
    listed = table(tuple(_COLUMNS.values()), rows, 3, room=left, rest="`layers.csv`")
    return ["### Layers", "", *listed, *more, ""]


def _layer_cells(row: TableRow) -> list[str]:
    cells = {column: escaped(row.cells[column]) for column in _COLUMNS}
    if row.coverage:
        cells |= {"gradient": escaped(row.coverage), "gain": ""}
    return list(cells.values())


def _run(report: Report) -> list[str]:
    run = report.trace.run
    versions = f"gradflow {run.gradflow_version}, torch {run.torch_version}"
    rows = [*header_rows(run), ("versions", versions)]
    return ["### Run", "", *(f"- **{label}**: {escaped(value)}" for label, value in rows)]
