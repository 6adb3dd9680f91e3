"""Findings that someone has decided to live with, in some modules, for a reason."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gradflow.findings import Finding

ROOT = "(model)"
"""What a pattern calls the root, whose name is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleIgnore:
    """One line of ``per-module-ignores``."""

    pattern: str
    """As in a shell, on fully qualified names: "encoder.embed*"."""
    code: str
    """A rule's code or the start of one."""
    reason: str
    scope: str = ""
    """The configured target whose table it stands in; "" for all of them."""

    def __str__(self) -> str:
        where = f"target {self.scope!r}: " if self.scope else ""
        return f'{where}{self.code} in "{self.pattern}" ({self.reason})'


@dataclass(frozen=True, slots=True, kw_only=True)
class IgnoredFinding:
    """A finding that does not count."""

    finding: Finding
    reason: str


def covers(ignore: ModuleIgnore, finding: Finding) -> bool:
    """Tell whether a finding is one of those; of a range, both ends must be."""
    if not finding.rule.startswith(ignore.code.upper()):
        return False
    ends = {finding.location.first, finding.location.last or finding.location.first}
    return all(fnmatchcase(name or ROOT, ignore.pattern) for name in ends)


def set_aside(
    findings: Sequence[Finding], ignores: Sequence[ModuleIgnore]
) -> tuple[tuple[Finding, ...], tuple[IgnoredFinding, ...]]:
    """Split findings into those that stand, and those that are ignored for the first reason that covers them."""
    kept, ignored = [], []
    for finding in findings:
        reason = next((ignore.reason for ignore in ignores if covers(ignore, finding)), None)
        if reason is None:
            kept.append(finding)
        else:
            ignored.append(IgnoredFinding(finding=finding, reason=reason))
    return tuple(kept), tuple(ignored)


def unused(
    ignores: Sequence[ModuleIgnore], findings: Sequence[Finding], codes: Collection[str]
) -> tuple[ModuleIgnore, ...]:
    """Return those that covered nothing although a rule of theirs ran.

    Args:
        ignores: What was in force.
        findings: Everything that was said, ignored findings included.
        codes: The rules that could speak.
    """
    return tuple(
        ignore
        for ignore in ignores
        if any(code.startswith(ignore.code.upper()) for code in codes)
        and not any(covers(ignore, finding) for finding in findings)
    )
