"""Intervals of means: how far a number measured a few times can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom (any table of the distribution).
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_T95_NORMAL = 1.960


def t95(freedom: float) -> float:
    """Two-sided 95% quantile of Student's t.

    Rounded down to a whole number of degrees, which makes an interval wider and never narrower.
    """
    whole = max(1, math.floor(freedom))
    return _T95[whole - 1] if whole <= len(_T95) else max(_T95_NORMAL, _T95_NORMAL + 2.5 / whole)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Ends of the 95% t-interval of the mean; None for fewer than two values, or where one is not finite."""
    if len(values) < 2 or not all(math.isfinite(value) for value in values):
        return None
    middle, half = fmean(values), t95(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return middle - half, middle + half
