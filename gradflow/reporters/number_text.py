"""Numbers as a person reads them: three significant digits, non-finite ones spelled."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median

NOT_MEASURED = "–"


def number_text(value: float | None, digits: int = 3) -> str:
    """0.0123, 1234, 4.1e-09, NaN, -Inf; a dash for not measured."""
    if value is None:
        return NOT_MEASURED
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf" if value > 0 else "-Inf"
    if 10**digits - 0.5 <= abs(value) < 9999.5:
        return f"{value:.0f}"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"
    return f"{value:.{digits}g}"


def share_text(value: float | None) -> str:
    """A share of 0..1 in percent; never rounds something to 0% or 100%."""
    if value is None or not math.isfinite(value):
        return number_text(value)
    percent = 100 * value
    if 0 < percent < 0.5:
        return "<1%"
    if 99.5 <= percent < 100:
        return ">99%"
    return f"{percent:.0f}%"


def middle(values: Iterable[float | None]) -> float | None:
    """The median of what was measured; a NaN or Inf among it wins; None where nothing was measured."""
    measured = [value for value in values if value is not None]
    broken = [value for value in measured if not math.isfinite(value)]
    if broken:
        return broken[0]
    return median(measured) if measured else None


def range_text(values: Iterable[float | None]) -> str:
    """ "0.98" or, where the ends differ in two digits, "4.1e-09..0.98"."""
    measured = [value for value in values if value is not None]
    if len(measured) < 2 or not all(math.isfinite(value) for value in measured):
        return number_text(middle(measured))
    ends = [number_text(end, 2) for end in (min(measured), max(measured))]
    return number_text(median(measured)) if ends[0] == ends[1] else "..".join(ends)


def count_text(count: int, noun: str, plural: str = "") -> str:
    """ "1 tensor", "1,234 tensors"."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
