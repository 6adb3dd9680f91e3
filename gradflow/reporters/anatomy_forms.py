"""The anatomy in every form: the screen, Markdown, JSON, CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from gradflow.ablation_profile import agreements
from gradflow.ablation_rows import ablation_rows
from gradflow.columns import RESIDUAL_COLUMNS
from gradflow.plain_values import to_plain
from gradflow.report import Report
from gradflow.reporters import Reporter, anatomy, anatomy_ablation, csv_files
from gradflow.reporters.anatomy_facts import facts
from gradflow.reporters.anatomy_rows import skeleton_rows
from gradflow.reporters.anatomy_stream import (
    RANKING_COLUMNS,
    ranking_rows,
    shown_streams,
    stream_facts,
    stream_name,
)
from gradflow.reporters.columns_text import TextColumn, TextRow
from gradflow.reporters.json_file import finding_objects
from gradflow.reporters.markdown_text import escaped, table
from gradflow.reporters.number_text import count_text
from gradflow.reporters.screen import Screen
from gradflow.reporters.severity_style import MARKS
from gradflow.reporters.site_rows import counted
from gradflow.trace_file import residual_rows

_ROOM = 30_000
"""Bytes of a Markdown table."""


def anatomy_reporters(screen: Screen) -> dict[str, Reporter]:
    """Every form of ``gradflow anatomy`` by its ``--format`` name."""
    return {
        "table": partial(anatomy.render, screen=screen),
        "json": json_text,
        "csv": lambda report: csv_files.csv_text(residual_rows(report.trace), RESIDUAL_COLUMNS),
        "markdown": partial(markdown_text, show_all=screen.show_all),
    }


def json_text(report: Report) -> str:
    """One object for programs: the tables, every stream, design facts, and how measures agree with the ablation.

    Keys: ``schema``, ``run``, ``residuals``, ``streams``, ``design``, ``ablation``, ``agreement``, ``findings``.
    ``residuals`` and ``ablation`` are keyed as the CSV columns; not measured is ``null``.
    """
    whole: dict[str, Any] = {
        "schema": report.trace.schema,
        "run": report.trace.run,
        "residuals": residual_rows(report.trace),
        "streams": report.streams,
        "design": [{"what": what, "said": said} for what, said in facts(report)],
        "ablation": ablation_rows(report.trace),
        "agreement": agreements(report.trace),
        "findings": finding_objects(anatomy.about_blocks(report.findings)),
    }
    return json.dumps(to_plain(whole), allow_nan=False, indent=1) + "\n"


def markdown_text(report: Report, *, show_all: bool = False) -> str:
    """The sections of the screen as Markdown; ends with a newline."""
    lines = [f"## gradflow anatomy: {escaped(report.trace.run.target)}", ""]
    if not report.trace.residuals:
        return "\n".join([*lines, escaped(anatomy.no_sites(report))]) + "\n"
    rows, left_out, _ = skeleton_rows(report, show_all=show_all)
    lines += [f"{escaped(counted(report.trace.residuals))}.", "", *_table(rows, anatomy.COLUMNS, 4)]
    lines += ["", f"{count_text(left_out, 'more row')} in `residuals.csv`."] if left_out else []
    lines += ["", escaped(anatomy.legend_text(report, _filled(rows, anatomy.COLUMNS))), ""]
    for stream in shown_streams(report, show_all=show_all):
        lines += _list(f"Stream: {stream_name(report, stream)}", stream_facts(report, stream))
    ranking = ranking_rows(report, show_all=show_all)
    lines += ["### Least useful", "", *_table(ranking, RANKING_COLUMNS, 1), ""] if ranking else []
    lines += _list("Design", facts(report))
    lines += _ablation(report, show_all)
    return "\n".join(lines).rstrip("\n") + "\n"


def _ablation(report: Report, show_all: bool) -> list[str]:
    ablation = report.trace.ablation
    if ablation is None:
        return []
    rows, left_out = anatomy_ablation.ablation_rows(report, show_all=show_all)
    lines = ["### Ablation", "", f"{escaped(anatomy_ablation.ablation_summary(ablation))}.", ""]
    lines += _table(rows, anatomy_ablation.COLUMNS, 1) if rows else []
    lines += ["", f"{count_text(left_out, 'more row')} in `ablation.csv`."] if left_out else []
    legend = anatomy_ablation.legend_text(ablation, _filled(rows, anatomy_ablation.COLUMNS))
    lines += ["", f"{escaped(legend)}."] if legend else []
    found = agreements(report.trace)
    if found:
        columns = anatomy_ablation.AGREEMENT_COLUMNS
        lines += ["", *_table(anatomy_ablation.agreement_rows(found), columns, 1)]
    told = [anatomy_ablation.greedy_text(report), *anatomy_ablation.ablation_notes(report)]
    return [*lines, "", *(f"- {escaped(sentence)}" for sentence in told if sentence)]


def _list(heading: str, found: Sequence[tuple[str, str]]) -> list[str]:
    items = [f"- **{label}**: {escaped(sentence)}" for label, sentence in found]
    return [f"### {escaped(heading)}", "", *items, ""] if items else []


def _filled(rows: Sequence[TextRow], columns: Mapping[str, TextColumn]) -> list[str]:
    return [key for key in columns if any(row.cells[key] for row in rows)]


def _table(rows: Sequence[TextRow], columns: Mapping[str, TextColumn], left: int) -> list[str]:
    keys = _filled(rows, columns)
    aligned = sum(1 for key in list(columns)[:left] if key in keys)
    cells = [[_marked(row, key) for key in keys] for row in rows]
    headings = tuple(columns[key].heading for key in keys)
    return table(headings, cells, aligned, room=_ROOM, rest="the tables of `--csv`")


def _marked(row: TextRow, key: str) -> str:
    mark = f"{MARKS[row.mark]} " if row.mark and key == "name" else ""
    return mark + escaped(row.cells[key])
