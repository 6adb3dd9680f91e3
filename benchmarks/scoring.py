"""Counting verdicts, and the two halves of what they are counted on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

HALVES = ("tuned", "untouched")


def half_of(name: str) -> str:
    """The half that a name is in, by its SHA-256: nobody chose it, and it never moves."""
    return HALVES[digest(name) % 2]


def digest(name: str) -> int:
    """The SHA-256 of a name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What was found, missed, and said without reason."""

    hits: int
    misses: int
    false: int

    @property
    def precision(self) -> float | None:
        """Share of what was said that is true; None where nothing was said."""
        return _share(self.hits, self.false)

    @property
    def recall(self) -> float | None:
        """Share of what is true that was said; None where there was nothing to say."""
        return _share(self.hits, self.misses)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of the two; None where there was nothing to say and nothing was said."""
        return _share(2 * self.hits, self.misses + self.false)

    def cells(self) -> tuple[str, str, str]:
        """Precision, recall and F1 as a table shows them."""
        values = (self.precision, self.recall, self.f1)
        return tuple("–" if value is None else f"{value:.3f}" for value in values)


def _share(part: int, rest: int) -> float | None:
    return part / (part + rest) if part + rest else None
