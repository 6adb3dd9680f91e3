"""The gradient along the trunk, as a handful of scale-free numbers (docs/numbers.md).

A tensor whose gradient was not measured (None) is stepped over: J is then between the first and the last
measured tensor. A zero has no logarithm, so it stays out of the slope; NaN and Inf stay out of the slope and
of the drop, and reach J and the gains as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from gradflow.findings import Location
from gradflow.trace_model import Trunk, TrunkPoint

SLOPE_POINTS = 200
"""More points than this are thinned to this many, evenly, before the pairwise slopes (19 900 pairs).

Of K points with noise of standard deviation s the slope is off by s sqrt(12 / 200) / K, whether thinned or not but
for the 200: at K = 1,000 and s = 0.3, as random weights give, by 7e-5 a layer.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkProfile:
    """NaN stands for "not defined": fewer than two tensors, or a gradient of zero on both sides."""

    gain: float
    """J = g_0 / g_K: what is left of the last tensor's gradient at the first."""
    slope: float
    """Minus the Theil-Sen slope of ln g_k in k: exp(slope) is the gradient's gain of one layer going back."""
    largest_drop: float
    """D = max_k g_{k+1} / g_k; Inf where a gradient becomes exactly zero."""
    largest_drop_at: str
    """"layers.3–layers.4": the two tensors around the largest drop; "" where there is none."""
    signal_gain: float
    """c_K / c_0: what is left of the centred signal at the last tensor."""
    gains: tuple[float, ...] = ()
    """g_k / g_K, first tensor to last; NaN for a tensor that was not measured."""


def profile(trunk: Trunk) -> TrunkProfile:
    """Summarise a trunk.

    Args:
        trunk: The tensors T_0..T_K, nearest the input first.

    Returns:
        J, slope, drop and signal gain. Loss scale, batch size and reduction cancel in every one of them.
    """
    ends = gradient_ends(trunk)
    gradients = [math.nan if p.gradient_norm is None else p.gradient_norm for p in trunk.points]
    last = gradients[ends[1]] if ends else math.nan
    drop = max(drops(trunk), key=lambda drop: drop[0], default=None)
    return TrunkProfile(
        gain=ratio(gradients[ends[0]], last) if ends else math.nan,
        slope=-theil_sen(log_gradients(trunk)),
        largest_drop=drop[0] if drop else math.nan,
        largest_drop_at=_between(trunk, *drop[1:]) if drop else "",
        signal_gain=_signal_gain(trunk),
        gains=tuple(ratio(g, last) for g in gradients),
    )


def gradient_ends(trunk: Trunk) -> tuple[int, int] | None:
    """Return the indices of the first and the last measured tensor, or None for fewer than two."""
    measured = [k for k, point in enumerate(trunk.points) if point.gradient_norm is not None]
    return (measured[0], measured[-1]) if len(measured) > 1 else None


def log_gradients(trunk: Trunk) -> list[tuple[int, float]]:
    """Return (k, ln g_k) for each tensor whose gradient is positive and finite."""
    pairs = ((k, point.gradient_norm) for k, point in enumerate(trunk.points))
    return [(k, math.log(g)) for k, g in pairs if g is not None and 0 < g < math.inf]


def drops(trunk: Trunk) -> list[tuple[float, int, int]]:
    """Return (g_after / g_before, k before, k after) for each pair of neighbouring finite tensors."""
    known = [
        (k, point.gradient_norm)
        for k, point in enumerate(trunk.points)
        if point.gradient_norm is not None and math.isfinite(point.gradient_norm)
    ]
    return [
        (ratio(after, before), k, next_k)
        for (k, before), (next_k, after) in pairwise(known)
        if before > 0 or after > 0
    ]


def theil_sen(points: Sequence[tuple[int, float]]) -> float:
    """Return the median of the slopes between all pairs (Theil 1950, Sen 1968).

    One outlying point, such as a single collapsed layer, does not move it. Above ``SLOPE_POINTS`` the points
    are thinned evenly first.

    Args:
        points: (x, y) with distinct x.

    Returns:
        The slope in y per x; NaN for fewer than two points.
    """
    if len(points) > SLOPE_POINTS:
        step = (len(points) - 1) / (SLOPE_POINTS - 1)
        points = [points[round(i * step)] for i in range(SLOPE_POINTS)]
    slopes = [(y2 - y1) / (x2 - x1) for i, (x1, y1) in enumerate(points) for x2, y2 in points[i + 1 :]]
    return median(slopes) if slopes else math.nan


def ratio(top: float, bottom: float) -> float:
    """Return top / bottom for sizes: Inf over zero; NaN over Inf, for 0 / 0, and where either is NaN."""
    if math.isinf(bottom):
        return math.nan
    if bottom:
        return top / bottom
    return math.inf if top > 0 else math.nan


def pair_labels(trunk: Trunk, first: int, last: int) -> tuple[str, str]:
    """Name two tensors by their modules; two of one module get their place in the trunk, ``blocks.0#1``."""
    names = trunk.points[first].name, trunk.points[last].name
    return (f"{names[0]}#{first}", f"{names[1]}#{last}") if names[0] == names[1] else names


def _between(trunk: Trunk, first: int, last: int) -> str:
    start, end = pair_labels(trunk, first, last)
    return str(Location(first=start, last=end))


def _signal_gain(trunk: Trunk) -> float:
    signals = [signal for point in trunk.points if (signal := _signal(point)) is not None]
    return ratio(signals[-1], signals[0]) if len(signals) > 1 else math.nan


def _signal(point: TrunkPoint) -> float | None:
    return point.activation.signal if point.activation is not None else None
