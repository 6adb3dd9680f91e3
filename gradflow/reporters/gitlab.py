"""The findings as a GitLab code quality report.

The form is that of https://docs.gitlab.com/ci/testing/code_quality/#code-quality-report-format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gradflow.findings import Finding, Severity
from gradflow.report import Report
from gradflow.reporters.failed_target import FailedTarget
from gradflow.reporters.finding_places import (
    SourcePlace,
    failed_fingerprint,
    failed_place,
    fingerprints,
    source_place,
)
from gradflow.reporters.finding_text import placed
from gradflow.reporters.text_lines import one_line

SEVERITIES = {Severity.ERROR: "critical", Severity.WARNING: "major", Severity.INFO: "info"}


def render(reports: Sequence[Report], failed: Sequence[FailedTarget] = ()) -> str:
    """One array, an object a finding and one a target that failed; all ASCII."""
    entries = [
        _entry(report, finding, fingerprint)
        for report, known_as in zip(reports, fingerprints(reports), strict=True)
        for finding, fingerprint in zip(report.findings, known_as, strict=True)
    ]
    entries += [_failure(target, at) for at, target in enumerate(failed)]
    return json.dumps(entries, indent=1) + "\n"


def _failure(failed: FailedTarget, at: int) -> dict[str, Any]:
    source = failed_place(failed) or SourcePlace(path=failed.target, line=1)
    if failed.finding is not None:
        return {
            "description": _description(failed, failed.finding),
            "check_name": failed.finding.rule,
            "fingerprint": failed_fingerprint(failed),
            "severity": SEVERITIES[failed.finding.severity],
            "location": {"path": source.path, "lines": {"begin": source.line}},
        }
    return {
        "description": f"{one_line(failed.label)} was not checked: {one_line(failed.message)}",
        "check_name": "not-checked",
        "fingerprint": f"not-checked-{at}-{failed.label}",
        "severity": "blocker",
        "location": {"path": source.path, "lines": {"begin": source.line}},
    }


def _entry(report: Report, finding: Finding, fingerprint: str) -> dict[str, Any]:
    # GitLab wants a path; a model that was given from Python has only its name.
    nowhere = SourcePlace(path=report.trace.run.target, line=1)
    source = source_place(finding, report.trace.run) or nowhere
    return {
        "description": _description(report, finding),
        "check_name": finding.rule,
        "fingerprint": fingerprint,
        "severity": SEVERITIES[finding.severity],
        "location": {"path": source.path, "lines": {"begin": source.line}},
    }


def _description(which: Report | FailedTarget, finding: Finding) -> str:
    target = f"{one_line(which.name)}: " if which.name else ""
    return f"{target}{finding.slug}: {placed(finding)}"
