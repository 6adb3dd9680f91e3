"""CSV, JSON, Markdown and DataFrames: one set of rows, written so that nothing is lost or obeyed."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import gradflow.columns
from gradflow import trace_file
from gradflow.columns import (
    ABLATION_COLUMNS,
    FINDING_COLUMNS,
    LAYER_COLUMNS,
    PARAMETER_COLUMNS,
    RESIDUAL_COLUMNS,
    Kind,
)
from gradflow.findings import Location
from gradflow.report import Report
from gradflow.reporters import csv_files, json_file, markdown, reporters
from gradflow.reporters.screen import Screen
from gradflow.trace_model import Coverage
from tests.screens import SCREENS, make_finding, make_report
from tests.traces import make_layer, make_parameter, make_trace

CONTRACT = {
    "LAYER_COLUMNS": "order, name, call, output, type, shape, dtype, coverage, activation_mean, "
    "activation_std, activation_rms, activation_absmax, activation_zero_fraction, "
    "activation_nonfinite, signal, common_mode, gradient_norm, gradient_nonfinite",
    "RESIDUAL_COLUMNS": "order, name, index, call, kind, source, shape, skip_norm, branch_norm, rho, cosine, "
    "block_influence, gradient_norm, source_gradient_norm, branch_scale, branches, parent, span",
    "PARAMETER_COLUMNS": "name, aliases, module, shape, dtype, coverage, norm, gradient_norm, "
    "gradient_nonfinite, elasticity",
    "FINDING_COLUMNS": "rule, slug, severity, location, value, threshold, message, hint, consequence_of",
}
EVERY_SCREEN = pytest.mark.parametrize("name", SCREENS)


def odd() -> Report:
    """Numbers that are hard to write, and everything that can be absent."""
    layers = [
        make_layer("a", 0, gradient_norm=0.1 + 0.2),
        make_layer("b", 1, gradient_norm=5e-324, gradient_nonfinite=None),
        make_layer("c", 2, gradient_norm=math.nan, gradient_nonfinite=7),
        make_layer("d", 3, gradient_norm=-math.inf),
        make_layer(
            "e",
            4,
            gradient_norm=None,
            gradient_nonfinite=None,
            activation=None,
            coverage=Coverage.NEVER_CALLED,
            shape=(),
            dtype="",
        ),
    ]
    parameters = [make_parameter("a.weight"), make_parameter("b.weight", in_optimizer=True)]
    return make_report(make_trace(layers=layers, parameters=parameters), make_finding())


@pytest.mark.parametrize("table", CONTRACT)
def test_the_first_columns_are_the_contract(table: str) -> None:
    columns = [column.name for column in getattr(gradflow.columns, table)]
    promised = CONTRACT[table].split(", ")
    assert columns[: len(promised)] == promised
    assert len(set(columns)) == len(columns)


@pytest.mark.parametrize("report", [odd(), *(make() for make in SCREENS.values())])
def test_rows_have_exactly_the_columns(report: Report) -> None:
    for rows, columns in (
        (trace_file.layer_rows(report.trace), LAYER_COLUMNS),
        (trace_file.parameter_rows(report.trace), PARAMETER_COLUMNS),
        (trace_file.residual_rows(report.trace), RESIDUAL_COLUMNS),
        (trace_file.finding_rows(report.findings), FINDING_COLUMNS),
    ):
        for row in rows:
            assert list(row) == [column.name for column in columns]
            for column in columns:
                assert fits(row[column.name], column.kind), (column, row[column.name])


def fits(cell: object, kind: Kind) -> bool:
    kinds = {Kind.TEXT: str, Kind.INTEGER: int, Kind.NUMBER: (float, int), Kind.BOOLEAN: bool}
    return cell is None or (
        isinstance(cell, kinds[kind]) and (isinstance(cell, bool) is (kind is Kind.BOOLEAN))
    )


def test_frames_keep_their_types_whatever_was_measured() -> None:
    for report in (odd(), SCREENS["empty_trunk"]()):
        layers, parameters = report.layers, report.parameters
        assert layers["gradient_norm"].dtype == "float64"
        assert layers["gradient_nonfinite"].dtype == "Int64"
        assert parameters["in_optimizer"].dtype == "boolean"
        assert list(report.residuals.columns) == [column.name for column in RESIDUAL_COLUMNS]
    layers = odd().layers
    assert layers["gradient_norm"].isna().tolist() == [False, False, True, False, True]
    assert layers["gradient_nonfinite"].isna().tolist() == [False, True, False, False, True]
    assert layers["gradient_norm"][0] == 0.1 + 0.2
    assert odd().parameters["in_optimizer"].tolist() == [pd.NA, True]


def test_csv_reads_back_through_pandas(tmp_path: Path) -> None:
    report = odd()
    report.to_csv(tmp_path)
    for name, frame in (("layers", report.layers), ("parameters", report.parameters)):
        read = pd.read_csv(tmp_path / f"{name}.csv")
        assert list(read.columns) == list(frame.columns)
        for column in frame.columns:
            ours, theirs = frame[column], read[column]
            if frame[column].dtype in ("float64", "Int64"):
                pd.testing.assert_series_equal(
                    ours.astype("float64"), theirs.astype("float64"), rtol=0, atol=0
                )
    cells = list(csv.reader((tmp_path / "layers.csv").read_text(encoding="utf-8").splitlines()))
    norm = cells[0].index("gradient_norm")
    assert [row[norm] for row in cells[1:]] == ["0.30000000000000004", "5e-324", "NaN", "-Infinity", ""]


@EVERY_SCREEN
def test_a_folder_holds_every_table_and_the_trace(tmp_path: Path, name: str) -> None:
    report = SCREENS[name]()
    report.to_csv(tmp_path / "made" / "here")
    written = {path.name for path in (tmp_path / "made" / "here").iterdir()}
    residuals = {"residuals.csv"} if report.trace.residuals else set()
    assert written == {"layers.csv", "parameters.csv", "findings.csv", "trace.json"} | residuals
    again = trace_file.load(tmp_path / "made" / "here" / "trace.json")
    assert repr(again) == repr(report.trace)


@pytest.mark.parametrize("start", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_cell_is_a_formula(start: str) -> None:
    report = make_report(
        make_trace(layers=[make_layer(start, type=start)]),
        make_finding(location=Location(first=start), message=start, hint=start),
    )
    for text in csv_files.files(report).values():
        if not text.startswith("{"):
            for row in csv.reader(io.StringIO(text)):
                assert not [cell for cell in row if cell.startswith(("=", "+", "@", "\t", "\r"))]
                assert not [cell for cell in row if cell.startswith("-") and not number(cell)]


def number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return cell != "-1"


def test_no_cell_breaks_its_line() -> None:
    report = make_report(make_trace(layers=[make_layer('a\nb,"c"\r\nd')]))
    text = csv_files.render(report)
    assert len(text.splitlines()) == 2
    assert next(csv.DictReader(io.StringIO(text)))["name"] == r'a\nb,"c"\r\nd'


@EVERY_SCREEN
def test_json_is_one_strict_object_keyed_as_the_csv(name: str) -> None:
    report = SCREENS[name]()
    plain = json.loads(json_file.render(report), parse_constant=pytest.fail)
    assert list(plain)[:7] == ["schema", "run", "profile", "layers", "residuals", "parameters", "findings"]
    assert {"batch_norms", "attentions", "ablation", "streams", "repairs"} <= set(list(plain)[7:])
    assert plain["schema"] == 1
    keys = {
        "layers": [column.name for column in LAYER_COLUMNS],
        "parameters": [column.name for column in PARAMETER_COLUMNS],
        "residuals": [column.name for column in RESIDUAL_COLUMNS],
        "findings": [*(column.name for column in FINDING_COLUMNS), "why", "evidence"],
        "ablation": [column.name for column in ABLATION_COLUMNS],
    }
    for table, names in keys.items():
        assert all(list(row) == names for row in plain[table])
        assert all(not isinstance(cell, list) for row in plain[table] for cell in row.values())
    assert len(plain["layers"]) == len(report.trace.layers)
    assert (
        len(plain["profile"]["gains"]) == len(plain["profile"]["tensors"]) == len(report.trace.trunk.points)
    )


def test_json_spells_what_json_lacks(tmp_path: Path) -> None:
    report = odd()
    finding = replace(make_finding(), evidence=(("gain", math.nan), ("where", "a"), ("tensors", 3)))
    report = replace(report, findings=(finding,))
    report.to_json(tmp_path / "report.json")
    plain = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    norms = [row["gradient_norm"] for row in plain["layers"]]
    assert norms == [0.1 + 0.2, 5e-324, "NaN", "-Infinity", None]
    assert plain["findings"][0]["evidence"] == {"gain": "NaN", "where": "a", "tensors": 3}


def test_markdown_shows_names_and_obeys_none() -> None:
    name = "a|b`c<script>*d*_e_\n# f [g](h)"
    report = make_report(
        make_trace(layers=[make_layer(name)]),
        make_finding(location=Location(first=name), message=name),
    )
    text = markdown.render(report)
    assert "<script>" not in text
    assert not [line for line in text.splitlines() if line.startswith("# ")]
    tables = [line for line in text.splitlines() if line.startswith("|")]
    # A cell's own bar is escaped, so that each table keeps its number of columns.
    assert {line.replace("\\|", "").count("|") for line in tables} == {7, 9}


@EVERY_SCREEN
def test_markdown_names_every_finding(name: str) -> None:
    report = SCREENS[name]()
    text = markdown.render(report)
    assert all(finding.rule in text and markdown.escaped(finding.hint) in text for finding in report.findings)
    assert "\x1b" not in text


def test_every_format_ends_with_one_newline() -> None:
    for form, render in reporters(Screen()).items():
        text = render(odd())
        assert text.endswith("\n") and not text.endswith("\n\n"), form


def test_a_threshold_fails_at_its_own_severity() -> None:
    from gradflow.findings import Severity

    report = SCREENS["non_finite"]()
    only_warning = replace(report, findings=report.findings[1:])
    assert [only_warning.fails(severity) for severity in (None, *Severity)] == [False, True, True, False]
    assert only_warning.worst is Severity.WARNING
    assert SCREENS["healthy"]().worst is None


def documented(section: str) -> list[tuple[str, str, str]]:
    """(name, kind, unit) of each row of a table in docs/csv.md."""
    page = (Path(__file__).parents[1] / "docs" / "csv.md").read_text(encoding="utf-8")
    body = page.split(f"## {section}\n")[1].split("\n## ")[0]
    rows = [line.split("|") for line in body.splitlines() if line.startswith("| `")]
    return [(row[1].strip(" `"), row[2].strip(), row[3].strip()) for row in rows]


@pytest.mark.parametrize(
    ("section", "columns"),
    [
        ("layers.csv", LAYER_COLUMNS),
        ("parameters.csv", PARAMETER_COLUMNS),
        ("residuals.csv", RESIDUAL_COLUMNS),
        ("findings.csv", FINDING_COLUMNS),
        ("ablation.csv", ABLATION_COLUMNS),
    ],
)
def test_the_page_says_what_the_code_writes(section: str, columns: Any) -> None:
    assert documented(section) == [(column.name, column.kind.value, column.unit) for column in columns]
