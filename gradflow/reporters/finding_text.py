"""A finding as plain text, for the forms that have no columns."""

from __future__ import annotations

from gradflow.findings import Finding
from gradflow.reporters.number_text import number_text
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
    cause = finding.consequence_of
    lines = (
        _with_number(finding),
        _ended(finding.why),
        f"Try: {finding.hint}" if finding.hint else "",
        f"A consequence of {cause}" if cause else "",
    )
    return tuple(f"{one_line(line)}." for line in lines if line)


def placed(finding: Finding) -> str:
    """The sentences after the location, which some of them begin with themselves."""
    where, text = f"{place(finding)}: ", " ".join(sentences(finding))
    return text if text.startswith(where) else where + text


def _with_number(finding: Finding) -> str:
    """The message; most say the number themselves."""
    said, number = _ended(finding.message), beside_threshold(finding)
    return f"{said} ({number})" if number and number_text(finding.value) not in said else said


def _ended(sentence: str) -> str:
    return sentence.rstrip(". ")
