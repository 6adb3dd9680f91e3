"""The findings as a GitLab code quality report.

The form is that of https://docs.gitlab.com/ci/testing/code_quality/#code-quality-report-format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gradflow.findings import Finding, Severity
from gradflow.report import Report
from gradflow.reporters.finding_places import SourcePlace, fingerprints, source_place
from gradflow.reporters.finding_text import place, sentences

SEVERITIES = {Severity.ERROR: "critical", Severity.WARNING: "major", Severity.INFO: "info"}


def render(reports: Sequence[Report]) -> str:
    """One array, an object a finding; all ASCII."""
    entries = [
        _entry(report, finding, fingerprint)
        for report in reports
        for finding, fingerprint in zip(report.findings, fingerprints(report), strict=True)
    ]
    return json.dumps(entries, indent=1) + "\n"


def _entry(report: Report, finding: Finding, fingerprint: str) -> dict[str, Any]:
    # GitLab wants a path; a model that was given from Python has only its name.
    nowhere = SourcePlace(path=report.trace.run.target, line=1)
    source = source_place(finding, report.trace.run) or nowhere
    return {
        "description": f"{finding.slug}: {place(finding)}: {' '.join(sentences(finding))}",
        "check_name": finding.rule,
        "fingerprint": fingerprint,
        "severity": SEVERITIES[finding.severity],
        "location": {"path": source.path, "lines": {"begin": source.line}},
    }
