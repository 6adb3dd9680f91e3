"""A finding as plain text, for the forms that have no columns."""

from __future__ import annotations

from gradflow.findings import Finding
from gradflow.reporters.terminal_findings import beside_threshold
from gradflow.reporters.text_lines import one_line


def title(finding: Finding) -> str:
    """ "GF101 vanishing-gradient at layers.0–layers.18"."""
    return one_line(f"{finding.rule} {finding.slug} at {place(finding)}")


def place(finding: Finding) -> str:
    """The location; "(model)" for the root, whose name is empty."""
    return one_line(str(finding.location)) or "(model)"


def sentences(finding: Finding) -> tuple[str, ...]:
    """What with its number and limit, why it hurts, what to try, and what explains it; a line each, none empty."""
    number = beside_threshold(finding)
    cause = finding.consequence_of
    lines = (
        f"{_ended(finding.message)} ({number})" if number else _ended(finding.message),
        _ended(finding.why),
        f"Try: {finding.hint}" if finding.hint else "",
        f"A consequence of {cause}" if cause else "",
    )
    return tuple(f"{one_line(line)}." for line in lines if line)


def _ended(sentence: str) -> str:
    return sentence.rstrip(". ")
