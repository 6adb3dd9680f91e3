"""What a rule says: plain frozen values, no torch, nothing of ours."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad: *error* fails whatever the optimizer, *warning* for some, *info* is true and worth showing."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    @property
    def rank(self) -> int:
        """0 for info, 1 for warning, 2 for error."""
        return ("info", "warning", "error").index(self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where: a fully qualified name, or a range of them in execution order."""

    first: str
    last: str = ""
    """"" for a single place."""

    def __str__(self) -> str:
        return f"{self.first}–{self.last}" if self.last and self.last != self.first else self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing a rule has to say about one place."""

    rule: str
    """"GF101"."""
    slug: str
    """"vanishing-gradient"."""
    severity: Severity
    location: Location
    message: str
    """What, how bad as a number beside its threshold; one sentence, no trailing period needed."""
    why: str
    """Why it hurts; one sentence."""
    hint: str
    """What to try; one sentence, imperative."""
    value: float | None = None
    """The number that was judged."""
    threshold: float | None = None
    """The limit it was judged against."""
    evidence: tuple[tuple[str, float | int | str], ...] = ()
    """Further facts, named as in the trace, for the JSON."""
    consequence_of: str | None = None
    """"GF303 blocks.4": the root cause whose consequence this is (its severity is then info)."""
    known: bool = False
    """It stands in the baseline: shown, and no reason to fail."""
