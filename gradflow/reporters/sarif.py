"""The findings as SARIF 2.1.0, for code scanning.

Written as plain values: the object models on PyPI (sarif-om, last released in 2019, and sarif-pydantic) bring a
dependency and no check that the schema, which the tests validate against, does not make better.
All targets share one run, for GitHub refuses a second run of the same tool in one upload.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from gradflow._version import __version__
from gradflow.findings import Finding, Severity
from gradflow.plain_values import to_plain
from gradflow.report import Report
from gradflow.reporters.failed_target import FailedTarget
from gradflow.reporters.finding_places import (
    SourcePlace,
    failed_fingerprint,
    failed_place,
    fingerprints,
    source_place,
)
from gradflow.reporters.finding_text import place, placed
from gradflow.reporters.text_lines import one_line
from gradflow.rules import RULES
from gradflow.rules.pages import render_page
from gradflow.rules.rule import Rule
from gradflow.trace_model import RunInfo

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}


def render(reports: Sequence[Report], failed: Sequence[FailedTarget] = ()) -> str:
    """One log with one run; all ASCII. Targets that failed are notifications of the tool."""
    rules = _rules(reports)
    driver = {
        "name": "gradflow",
        "version": __version__,
        "semanticVersion": __version__,
        "rules": rules,
    }
    run = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "invocations": [_invocation(failed)],
        "results": [
            *_results(reports, [rule["id"] for rule in rules]),
            *(_failed_result(target, [rule["id"] for rule in rules]) for target in failed if target.finding),
        ],
    }
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(to_plain(log), allow_nan=False, indent=1) + "\n"


def _invocation(failed: Sequence[FailedTarget]) -> dict[str, Any]:
    return {
        "executionSuccessful": not failed,
        "toolExecutionNotifications": [_notification(f) for f in failed],
    }


def _notification(failed: FailedTarget) -> dict[str, Any]:
    said = {
        "level": "error",
        "message": {"text": _message(f"{failed.label} was not checked: {failed.message}")},
    }
    source = failed_place(failed)
    return said if source is None else said | {"locations": [{"physicalLocation": _physical(source)}]}


def _rules(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Every rule, and what the findings name beside them."""
    known = {rule.code: _rule(rule) for rule in RULES}
    for report in reports:
        for finding in report.findings:
            known.setdefault(finding.rule, _described_by(finding))
    return list(known.values())


def _rule(rule: Rule) -> dict[str, Any]:
    worst = max((limit.severity for limit in rule.thresholds), key=lambda severity: severity.rank)
    return {
        "id": rule.code,
        "name": _pascal(rule.slug),
        "shortDescription": {"text": _message(rule.summary)},
        "fullDescription": {"text": _message(rule.meaning)},
        "help": {"text": _message(f"{rule.why}\n\nTry: {rule.hint}"), "markdown": render_page(rule)},
        "defaultConfiguration": {"level": LEVELS[worst]},
    }


def _described_by(finding: Finding) -> dict[str, Any]:
    return {
        "id": finding.rule,
        "name": _pascal(finding.slug),
        "shortDescription": {"text": _message(finding.slug.replace("-", " "))},
        "help": {"text": _message(finding.hint)},
        "defaultConfiguration": {"level": LEVELS[finding.severity]},
    }


def _pascal(slug: str) -> str:
    return "".join(word.capitalize() for word in slug.split("-"))


def _results(reports: Sequence[Report], codes: Sequence[str]) -> list[dict[str, Any]]:
    results = [
        _result(report, finding, fingerprint, codes)
        for report, known_as in zip(reports, fingerprints(reports), strict=True)
        for finding, fingerprint in zip(report.findings, known_as, strict=True)
    ]
    known = [finding.known for report in reports for finding in report.findings]
    if any(known):  # a log says it of every result, or of none
        for result, old in zip(results, known, strict=True):
            result["baselineState"] = "unchanged" if old else "new"
    return results


def _result(report: Report, finding: Finding, fingerprint: str, codes: Sequence[str]) -> dict[str, Any]:
    run = report.trace.run
    result = {
        "ruleId": finding.rule,
        "ruleIndex": codes.index(finding.rule),
        "level": LEVELS[finding.severity],
        "message": {"text": _message(f"{_named(report)}{placed(finding)}")},
        "locations": [_location(finding, run)],
        "partialFingerprints": {"gradflowFinding/v1": fingerprint},
        "properties": {
            "target": report.label,
            "value": finding.value,
            "threshold": finding.threshold,
            "evidence": dict(finding.evidence),
        },
    }
    causes = [cause for cause in report.findings if _names(finding, cause)]
    if causes:
        related = _location(causes[0], run) | {
            "id": 1,
            "message": {"text": _message(_explained_by(causes[0]))},
        }
        result["relatedLocations"] = [related]
    return result


def _failed_result(failed: FailedTarget, codes: Sequence[str]) -> dict[str, Any]:
    """What a rule says about a target that has no report."""
    finding = failed.finding
    assert finding is not None
    name = finding.location.first
    location: dict[str, Any] = {
        "logicalLocations": [
            {
                "name": name.rpartition(".")[2] or "model",
                "fullyQualifiedName": name or "model",
                "kind": "module",
            }
        ]
    }
    source = failed_place(failed)
    if source is not None:
        location["physicalLocation"] = _physical(source)
    return {
        "ruleId": finding.rule,
        "ruleIndex": codes.index(finding.rule),
        "level": LEVELS[finding.severity],
        "message": {"text": _message(f"{_named(failed)}{placed(finding)}")},
        "locations": [location],
        "partialFingerprints": {"gradflowFinding/v1": failed_fingerprint(failed)},
        "properties": {"target": failed.label, "evidence": dict(finding.evidence)},
    }


def _named(which: Report | FailedTarget) -> str:
    """Which of several targets: two of them may be one model, otherwise set."""
    return f"{which.name}: " if which.name else ""


def _names(finding: Finding, cause: Finding) -> bool:
    return finding.consequence_of == f"{cause.rule} {cause.location}" and cause is not finding


def _explained_by(cause: Finding) -> str:
    return f"A consequence of {cause.rule} {cause.slug} at {place(cause)}"


def _location(finding: Finding, run: RunInfo) -> dict[str, Any]:
    """The first module of a range is the place; the last stands beside it."""
    ends = dict.fromkeys((finding.location.first, finding.location.last or finding.location.first))
    location: dict[str, Any] = {
        "logicalLocations": [
            {
                "name": name.rpartition(".")[2] or run.model,
                "fullyQualifiedName": name or run.model,
                "kind": "module",
            }
            for name in ends
        ]
    }
    source = source_place(finding, run)
    if source is not None:
        location["physicalLocation"] = _physical(source)
    return location


def _physical(source: SourcePlace) -> dict[str, Any]:
    return {"artifactLocation": {"uri": _uri(source.path)}, "region": {"startLine": source.line}}


def _uri(path: str) -> str:
    """A relative reference, or for an absolute path a file URI."""
    quoted = quote(path.encode("utf-8", "surrogatepass"))
    if path.startswith("/"):
        return f"file://{quoted}"
    return f"file:///{quoted.replace('%3A', ':', 1)}" if path[1:3] == ":/" else quoted


def _message(text: str) -> str:
    """Text in which nothing is SARIF's own: ``{0}`` is a placeholder there, ``[a](b)`` a link (§3.11.5, 6)."""
    lines = "\n".join(one_line(line) for line in text.split("\n"))
    return lines.replace("{", "{{").replace("}", "}}").replace("](", "\\](")
