"""A recording -> what the rules say about it: pure functions, no torch."""

from __future__ import annotations

from collections.abc import Mapping

from gradflow.config import Config
from gradflow.findings import Finding
from gradflow.report import Report
from gradflow.rules import select_rules
from gradflow.rules.places import Span, span_of, spans
from gradflow.rules.precedence import attribute
from gradflow.trace_model import Trace
from gradflow.trunk_profile import profile


def analyze(trace: Trace, config: Config) -> Report:
    """Judge a recording.

    Args:
        trace: The recording, fresh or loaded from a file.
        config: Which rules may speak.

    Returns:
        The trace with its findings and the trunk's profile.

    Raises:
        UsageError: ``config`` selects or ignores a rule that does not exist.
    """
    return Report(trace=trace, findings=find(trace, config), profile=profile(trace.trunk), config=config)


def find(trace: Trace, config: Config) -> tuple[Finding, ...]:
    """Run the selected rules and name root causes; a rule that may not speak explains nothing either.

    Returns:
        Worst first, then in execution order, then by code; the same trace always gives the same tuple.

    Raises:
        UsageError: ``config`` selects or ignores a rule that does not exist.
    """
    known = spans(trace)
    said = [
        finding
        for rule in select_rules(config.select, config.ignore)
        for finding in rule.check(trace, config)
    ]
    return tuple(sorted(attribute(said, known), key=lambda finding: _rank(finding, known)))


def _rank(finding: Finding, known: Mapping[str, Span]) -> tuple[int, int, int, str, str, str]:
    first, last = span_of(finding.location, known)
    return -finding.severity.rank, first, last, finding.rule, str(finding.location), finding.message
