"""A target of a check that has no report, for the forms that must not pass it over."""

from __future__ import annotations

from dataclasses import dataclass

from gradflow.findings import Finding


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedTarget:
    """Why a target could not be checked: it was not understood, or its own code raised."""

    target: str
    message: str
    traceback: str = ""
    """The user's own, trimmed; empty where there is none."""
    finding: Finding | None = None
    """What a rule has to say about it, where one does."""
    place: str = ""
    """"models/net.py:31", the user's line that raised; "" where there is none."""
    name: str = ""
    """Of the target in pyproject.toml; empty for one that has none."""

    @property
    def label(self) -> str:
        """The name, else the target as it was given."""
        return self.name or self.target
