"""The report as one JSON object, for programs."""

from __future__ import annotations

import json
from typing import Any

from gradflow.ablation_rows import ablation_rows
from gradflow.findings import Finding
from gradflow.plain_values import to_plain
from gradflow.repair_outcomes import RepairOutcome
from gradflow.report import Report
from gradflow.reporters.failed_target import FailedTarget
from gradflow.trace_file import finding_rows, layer_rows, parameter_rows, residual_rows
from gradflow.trace_model import SCHEMA_VERSION, Trunk
from gradflow.trunk_profile import TrunkProfile, profile


def render(report: Report) -> str:
    """``schema``, ``run``, ``profile`` and the flat arrays, keyed as the CSV columns; all ASCII.

    A float is written so that it reads back the same; NaN and infinities are the strings "NaN", "Infinity",
    "-Infinity"; not measured is ``null``.
    """
    return json.dumps(to_plain(contents(report)), allow_nan=False, indent=1) + "\n"


def contents(report: Report) -> dict[str, Any]:
    """The object that :func:`render` writes."""
    trace = report.trace
    return {
        "schema": trace.schema,
        "run": trace.run,
        "profile": _profile(trace.trunk, report.profile),
        "layers": layer_rows(trace),
        "residuals": residual_rows(trace),
        "parameters": parameter_rows(trace),
        "findings": finding_objects(report.findings),
        "batch_norms": to_plain(trace.batch_norms),
        "ablation": ablation_rows(trace),
        "streams": to_plain(report.streams),
        "repairs": [_repair(outcome) for outcome in report.repairs],
        "attentions": to_plain(trace.attentions),
        "side_profiles": [_profile(trunk, profile(trunk)) for trunk in trace.side_trunks],
        "gradient_correlation": trace.gradient_correlation,
    }


def _profile(trunk: Trunk, summary: TrunkProfile) -> dict[str, Any]:
    return {
        "trunk": trunk.kind,
        **to_plain(summary),
        "tensors": [point.name for point in trunk.points],
        "path": trunk.path,
        "token_geometry": trunk.token_geometry,
    }


def _repair(outcome: RepairOutcome) -> dict[str, Any]:
    plain: dict[str, Any] = to_plain(outcome)
    return plain | {"helped": outcome.helped}


def render_failure(failed: FailedTarget) -> str:
    """``schema``, ``error``, ``traceback`` and ``findings`` of a model that raised and that a rule speaks about."""
    whole = {
        "schema": SCHEMA_VERSION,
        "error": failed.message,
        "traceback": failed.traceback,
        "findings": finding_objects(() if failed.finding is None else (failed.finding,)),
    }
    return json.dumps(to_plain(whole), allow_nan=False, indent=1) + "\n"


def finding_objects(findings: tuple[Finding, ...]) -> list[dict[str, Any]]:
    """A row a finding as in ``findings.csv``, with its reason and its evidence."""
    rows = finding_rows(findings)
    return [
        {**row, "why": finding.why, "evidence": dict(finding.evidence)}
        for row, finding in zip(rows, findings, strict=True)
    ]
