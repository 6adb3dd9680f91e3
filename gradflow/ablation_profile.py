"""Ablation -> what it means: means with their intervals, and how well the cheap measures foretell it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import StatisticsError, correlation, fmean

from gradflow.student_t import mean_interval
from gradflow.trace_model import Ablation, BranchAblation, Removal, ResidualRecord, Trace

FEWEST_RANKED = 3
"""Of fewer blocks no rank correlation is worth a number."""

MEASURES: Mapping[str, Callable[[ResidualRecord], float | None]] = {
    "rho": lambda site: site.rho,
    "block influence": lambda site: site.block_influence,
    "angular distance": lambda site: site.angular_distance,
    "branch gain": lambda site: site.branch_gain,
}
"""The cheap measures by their names: what a single forward and backward says of a branch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What leaving branches out changes, over the samples."""

    change: float | None
    """Mean of the paired differences of the loss; None without a loss."""
    interval: tuple[float, float] | None
    """95% t-interval of that mean; None for a single sample."""
    relative: float | None
    """change / |mean loss of the whole model|; None for a loss of 0."""
    output_change: float | None
    """Mean of ||y - y'|| / ||y||."""

    @property
    def harm(self) -> float | None:
        """By which branches are compared: the change of the loss, without a loss that of the output."""
        return self.output_change if self.change is None else self.change

    @property
    def verdict(self) -> str:
        """ "worse", "better", "no difference" (the interval holds 0), "changed" without a loss, or "" (unknown)."""
        if self.output_change == 0.0 and not self.change:
            return "no difference"
        if self.change is None:
            return "" if self.output_change is None else "changed"
        if self.interval is None:
            return ""
        low, high = self.interval
        return "no difference" if low <= 0.0 <= high else "worse" if low > 0 else "better"


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How the order of the blocks by a cheap measure agrees with the order by ablation."""

    measure: str
    blocks: int
    """How many have both numbers."""
    spearman: float | None
    """Of the change of the loss; None without a loss."""
    kendall: float | None
    """Kendall's tau-b, likewise."""
    output_spearman: float | None
    """Of the change of the output."""
    output_kendall: float | None


def effect(of: BranchAblation | Removal, ablation: Ablation) -> Effect:
    """Means over the samples, and their interval."""
    change = fmean(of.changes) if of.changes else None
    whole = abs(fmean(ablation.losses)) if ablation.losses else 0.0
    return Effect(
        change=change,
        interval=mean_interval(of.changes),
        relative=change / whole if change is not None and whole > 0 else None,
        output_change=fmean(of.output_changes) if of.output_changes else None,
    )


def agreements(trace: Trace) -> tuple[Agreement, ...]:
    """One a cheap measure that enough blocks have; empty without an ablation."""
    if trace.ablation is None:
        return ()
    effects = {branch.order: effect(branch, trace.ablation) for branch in trace.ablation.branches}
    sites = [site for site in trace.residuals if site.order in effects]
    found = [
        _agreement(name, [(of(site), effects[site.order]) for site in sites]) for name, of in MEASURES.items()
    ]
    return tuple(agreement for agreement in found if agreement is not None)


def _agreement(name: str, blocks: Sequence[tuple[float | None, Effect]]) -> Agreement | None:
    measured = [(value, found) for value, found in blocks if value is not None and math.isfinite(value)]
    by_loss = _finite((value, found.change) for value, found in measured)
    by_output = _finite((value, found.output_change) for value, found in measured)
    count = max(len(by_loss), len(by_output))
    if spearman(by_loss) is None and spearman(by_output) is None:
        return None
    return Agreement(
        measure=name,
        blocks=count,
        spearman=spearman(by_loss),
        kendall=kendall(by_loss),
        output_spearman=spearman(by_output),
        output_kendall=kendall(by_output),
    )


def _finite(pairs: Iterable[tuple[float, float | None]]) -> list[tuple[float, float]]:
    return [(value, other) for value, other in pairs if other is not None and math.isfinite(other)]


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation, ties by their mean rank; None for too few pairs, or all tied."""
    if len(pairs) < FEWEST_RANKED:
        return None
    try:
        return correlation(*(_ranks([pair[side] for pair in pairs]) for side in (0, 1)))
    except StatisticsError:  # one side is constant
        return None


def kendall(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Kendall's tau-b, which allows for ties; None for too few pairs, or all tied."""
    if len(pairs) < FEWEST_RANKED:
        return None
    signs = [(_sign(a[0] - b[0]), _sign(a[1] - b[1])) for a, b in combinations(pairs, 2)]
    agreeing = sum(left * right for left, right in signs)
    untied = [sum(1 for sign in signs if sign[side]) for side in (0, 1)]
    return agreeing / math.sqrt(untied[0] * untied[1]) if all(untied) else None


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {value: at for at, value in reversed(list(enumerate(ordered, 1)))}
    last = {value: at for at, value in enumerate(ordered, 1)}
    return [(first[value] + last[value]) / 2 for value in values]


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
