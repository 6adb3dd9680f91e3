"""The report as GitHub-flavoured Markdown, for a pull request or a page."""

from __future__ import annotations

from collections.abc import Sequence

from gradflow.findings import Finding
from gradflow.report import Report
from gradflow.reporters.layer_choice import shown
from gradflow.reporters.number_text import count_text
from gradflow.reporters.severity_style import MARKS
from gradflow.reporters.site_rows import counted, site_table
from gradflow.reporters.terminal_chart import last_gradient
from gradflow.reporters.terminal_findings import beside_threshold, ranked
from gradflow.reporters.terminal_header import header_rows, verdict
from gradflow.reporters.terminal_table import TableRow, table_rows
from gradflow.reporters.text_lines import one_line

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
_SPECIAL = str.maketrans(
    {char: f"\\{char}" for char in "\\`*_{}[]|#~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
)


def render(report: Report) -> str:
    """Verdict, findings, layers and run; ends with a newline."""
    said = verdict(report)
    rule = f" ({said.rule})" if said.rule else ""
    lines = [
        f"## gradflow: {escaped(report.trace.run.target)}",
        "",
        f"{MARKS[said.severity]} **{escaped(said.subject)}**: {escaped(said.sentence)}{rule}",
        "",
        *_findings(report.findings),
        *_residuals(report),
        *_layers(report),
        *_run(report),
    ]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text on one line in which no character is Markdown or HTML."""
    return one_line(text).translate(_SPECIAL)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """A table whose first ``left`` columns are aligned left, the others right; cells are already escaped."""
    rule = ["---"] * left + ["---:"] * (len(headings) - left)
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]


def _findings(findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return []
    placed = ranked(findings)
    rows = [_finding_cells(place.finding) for place in placed]
    headings = ("", "rule", "where", "what", "try", "number")
    return ["### Findings", "", *_table(headings, rows, left=5), ""]


def _finding_cells(finding: Finding) -> tuple[str, ...]:
    what = f"{escaped(finding.message)}. {escaped(finding.why)}".rstrip()
    if finding.consequence_of:
        what += f" (a consequence of {escaped(finding.consequence_of)})"
    return (
        f"{MARKS[finding.severity]} {finding.severity}",
        f"{finding.rule} {escaped(finding.slug)}",
        escaped(str(finding.location)) or "(model)",
        what,
        escaped(finding.hint),
        escaped(beside_threshold(finding)),
    )


def _residuals(report: Report) -> list[str]:
    if not report.trace.residuals:
        return []
    table = site_table(report)
    rows = [[escaped(row.cells[column]) for column in _SITE_COLUMNS] for row in table.rows]
    more = ["", f"{count_text(table.left_out, 'more row')} in `residuals.csv`."] if table.left_out else []
    said = f"{counted(report.trace.residuals)}; ρ is ‖branch‖ / ‖skip‖."
    return [
        "### Residual blocks",
        "",
        said,
        "",
        *_table(tuple(_SITE_COLUMNS.values()), rows, left=2),
        *more,
        "",
    ]


def _layers(report: Report) -> list[str]:
    groups, chosen = shown(report)
    rows = [_layer_cells(row) for row in table_rows(chosen, last_gradient(report.trace.trunk))]
    left_out = len(groups) - len(chosen)
    more = ["", f"{count_text(left_out, 'more row')} in `layers.csv`."] if left_out else []
    return ["### Layers", "", *_table(tuple(_COLUMNS.values()), rows, left=3), *more, ""]


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
