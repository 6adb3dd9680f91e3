"""``--threshold``: texts of the command line -> limits by their full names."""

from __future__ import annotations

from gradflow.errors import UsageError


def thresholds_in(texts: list[str] | None) -> tuple[tuple[str, float], ...]:
    """["GF101.gain.error=1e-6"] -> (("GF101.gain.error", 1e-6),).

    Raises:
        UsageError: There is no such threshold, or it is given no number.
    """
    from gradflow.rules import find_threshold

    pairs = []
    for text in texts or ():
        name, _, number = text.partition("=")
        full = find_threshold(name)
        try:
            pairs.append((full, float(number)))
        except ValueError as error:
            raise UsageError(f"--threshold {text}: write a number, {full}=0.5") from error
    return tuple(pairs)
