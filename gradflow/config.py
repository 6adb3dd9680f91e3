"""What the user asked of the rules: defaults, then the command line."""

from __future__ import annotations

from dataclasses import dataclass

from gradflow.findings import Severity


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Which rules speak and which findings fail a run."""

    select: tuple[str, ...] = ("GF",)
    """Rule codes or prefixes that may speak."""
    ignore: tuple[str, ...] = ()
    """Rule codes or prefixes that may not; they win over ``select``."""
    fail_on: Severity | None = None
    """Exit 1 for a finding at or above this; None never does."""
    thresholds: tuple[tuple[str, float], ...] = ()
    """Limits that take the place of the rules' own: ("GF101.gain.error", 1e-6)."""
