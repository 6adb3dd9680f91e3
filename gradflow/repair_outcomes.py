"""What a repair that was tried did: plain frozen values, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What is compared: a model as it was recorded, in a handful of numbers."""

    gain: float
    """J of the trunk; NaN below two tensors."""
    signal_gain: float
    """c_K / c_0 of the trunk."""
    errors: int
    """Root causes of severity error."""
    warnings: int
    """Root causes of severity warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairOutcome:
    """One candidate repair, applied in memory and measured again."""

    name: str
    """"skip", "he-init" ...; stable."""
    words: str
    """What was done, as the start of a sentence: "a skip around each layer"."""
    where: str
    """The location it was done at, as a finding's: "layers.0–layers.38"."""
    code: str
    """How to do it for good, as Python."""
    answers: tuple[str, ...]
    """Codes of the findings it was tried for."""
    before: Measure
    after: Measure | None
    """None where the repaired model could not be run."""
    solved: tuple[str, ...] = ()
    """Codes among ``answers`` that are gone: no root cause of severity warning or error has them."""
    remaining: tuple[str, ...] = ()
    """Codes of the root causes of severity warning or error that are left or new."""
    value_before: float | None = None
    """The number of the first finding that it answers."""
    value_after: float | None = None
    """The same number of the worst finding of that rule that is left; None where it is gone."""
    note: str = ""
    """Why it could not be run."""

    @property
    def helped(self) -> bool:
        """Fewer errors, or as many and fewer warnings."""
        if self.after is None:
            return False
        before, after = self.before, self.after
        return (after.errors, after.warnings) < (before.errors, before.warnings)
