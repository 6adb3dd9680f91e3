"""What a rule is: static facts that can be listed without running anything, and one pure check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.trace_model import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """One limit, and where it comes from."""

    name: str
    """As the check calls it: "warning gain"."""
    value: float
    severity: Severity
    source: str
    """Paper, tool or measurement; "engineering choice" where there is none."""
    key: str = ""
    """What a configuration calls it, with the rule and the severity: "gain" of GF101.gain.error; "" for a limit
    that follows from a definition and cannot be moved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule: its page (``gradflow explain``) and its check."""

    code: str
    """"GF101"; never renumbered."""
    slug: str
    """"vanishing-gradient"."""
    summary: str
    """One line for ``gradflow rules``."""
    meaning: str
    """What it looks at and what it wants, in plain words; paragraphs separated by a blank line."""
    formula: str
    """The statistic, as text."""
    why: str
    """Why it hurts."""
    hint: str
    """What to try."""
    thresholds: tuple[Threshold, ...]
    exemptions: tuple[str, ...]
    """What is deliberately not reported, a sentence each."""
    sources: tuple[str, ...]
    phase: str
    """"initialisation", "trained" or "both"."""
    failing_example: str
    """A short model the rule speaks on, as Python source that runs as a target."""
    healthy_example: str
    """Its healthy twin, on which the rule stays silent."""
    check: Callable[[Trace, Config], Iterator[Finding]]

    @property
    def settings(self) -> dict[str, Threshold]:
        """The thresholds that a configuration can move, by their full names: "GF101.gain.error"."""
        return {f"{self.code}.{t.key}.{t.severity}": t for t in self.thresholds if t.key}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The thresholds of a rule that are in force, by key."""

    thresholds: tuple[Threshold, ...]

    def __getitem__(self, key: str) -> tuple[Threshold, ...]:
        """All with this key, one a severity."""
        return tuple(threshold for threshold in self.thresholds if threshold.key == key)

    def only(self, key: str) -> Threshold:
        """The one with this key."""
        (threshold,) = self[key]
        return threshold


def in_force(rule: Rule, config: Config) -> Limits:
    """The thresholds of a rule, with those that the configuration moves."""
    moved = dict(config.thresholds)
    return Limits(
        thresholds=tuple(
            replace(t, value=moved.get(f"{rule.code}.{t.key}.{t.severity}", t.value)) for t in rule.thresholds
        )
    )
