"""The findings as JUnit XML: a test suite a target, a test case a rule that judged it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from gradflow.findings import Finding, Severity
from gradflow.report import Report
from gradflow.reporters.failed_target import FailedTarget
from gradflow.reporters.finding_places import source_place
from gradflow.reporters.finding_text import place, sentences
from gradflow.reporters.number_text import count_text
from gradflow.reporters.text_lines import one_line
from gradflow.rules import select_rules
from gradflow.trace_model import RunInfo

# Everything that XML 1.0 cannot hold, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(reports: Sequence[Report], failed: Sequence[FailedTarget] = ()) -> str:
    """One document. A rule fails where a finding is at or above the run's ``fail_on``, error without one.

    Findings below it, and those that a baseline knows, stand in the case's ``system-out``.
    A target that failed is a suite with one error.
    """
    suites = [*(_suite(report) for report in reports), *map(_failed_suite, failed)]
    root = ElementTree.Element("testsuites", {"name": "gradflow"} | _totals(suites))
    root.extend(suites)
    ElementTree.indent(root)
    return "<?xml version='1.0' encoding='utf-8'?>\n" + ElementTree.tostring(root, encoding="unicode") + "\n"


def _totals(suites: Sequence[ElementTree.Element]) -> dict[str, str]:
    return {
        key: str(sum(int(suite.get(key, 0)) for suite in suites)) for key in ("tests", "failures", "errors")
    }


def _suite(report: Report) -> ElementTree.Element:
    run = report.trace.run
    names = {rule.code: rule.slug for rule in select_rules(report.config.select, report.config.ignore)}
    names |= {finding.rule: finding.slug for finding in report.findings}
    cases = [_case(report, code, slug) for code, slug in names.items()]
    failures = sum(case.find("failure") is not None for case in cases)
    counts = {"tests": len(cases), "failures": failures, "errors": 0, "skipped": 0}
    suite = ElementTree.Element(
        "testsuite", {"name": _xml(report.label), **{key: str(count) for key, count in counts.items()}}
    )
    suite.append(_properties(run))
    suite.extend(cases)
    return suite


def _failed_suite(failed: FailedTarget) -> ElementTree.Element:
    name = _xml(failed.label)
    suite = ElementTree.Element(
        "testsuite", {"name": name, "tests": "1", "failures": "0", "errors": "1", "skipped": "0"}
    )
    case = ElementTree.SubElement(suite, "testcase", {"name": _failed_case(failed), "classname": name})
    kind = "not checked" if failed.finding is None else failed.finding.severity.value
    what = {"message": _xml(one_line(failed.message)), "type": kind}
    ElementTree.SubElement(case, "error", what).text = _xml(failed.traceback or failed.message)
    return suite


def _failed_case(failed: FailedTarget) -> str:
    return "run" if failed.finding is None else f"{failed.finding.rule} {failed.finding.slug}"


def _properties(run: RunInfo) -> ElementTree.Element:
    facts = {
        "model": run.model,
        "inputs": ", ".join(run.inputs),
        "loss": run.loss,
        "seed": str(run.seed),
        "gradflow": run.gradflow_version,
        "torch": run.torch_version,
    }
    properties = ElementTree.Element("properties")
    for name, value in facts.items():
        ElementTree.SubElement(properties, "property", {"name": name, "value": _xml(value)})
    return properties


def _case(report: Report, code: str, slug: str) -> ElementTree.Element:
    run = report.trace.run
    limit = report.config.fail_on or Severity.ERROR
    said = [finding for finding in report.findings if finding.rule == code]
    failing = [finding for finding in said if finding.severity.rank >= limit.rank and not finding.known]
    case = ElementTree.Element("testcase", {"name": _xml(f"{code} {slug}"), "classname": _xml(report.label)})
    if failing:
        what = {"message": _xml(_headline(failing)), "type": failing[0].severity.value}
        ElementTree.SubElement(case, "failure", what).text = _text(failing, run)
    rest = [finding for finding in said if finding not in failing]
    if rest:
        ElementTree.SubElement(case, "system-out").text = _text(rest, run)
    return case


def _headline(findings: Sequence[Finding]) -> str:
    first = f"{place(findings[0])}: {one_line(findings[0].message)}"
    return first if len(findings) == 1 else f"{count_text(len(findings), 'finding')}; {first}"


def _text(findings: Sequence[Finding], run: RunInfo) -> str:
    return _xml("\n\n".join("\n".join(_lines(finding, run)) for finding in findings))


def _lines(finding: Finding, run: RunInfo) -> list[str]:
    source = source_place(finding, run)
    where = f" ({source.path}:{source.line})" if source is not None else ""
    known = " (in the baseline)" if finding.known else ""
    return [f"{finding.severity}: {place(finding)}{where}{known}", *sentences(finding)]


def _xml(text: str) -> str:
    return _NOT_XML.sub(lambda found: repr(found[0])[1:-1], text)
