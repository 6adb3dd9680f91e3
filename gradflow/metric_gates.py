"""Limits on how much worse a number may get than in a saved trace, told apart from noise by several seeds.

Every metric is first turned into a *cost*, a logarithm that grows as the gradient flows worse. What is compared
is the mean cost over the seeds of either side: the difference with its 95% t-interval (Welch 1947). Where the
interval holds 0 no difference can be told, and the gate passes; where it does not, the mean decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from gradflow.errors import UsageError
from gradflow.findings import Finding, Location, Severity
from gradflow.student_t import t95
from gradflow.trace_model import SeedMeasure, Trace
from gradflow.trunk_profile import profile

GATE_SEEDS = 5
"""Seeds of a target with a limit, where nobody says how many."""
FEWEST_SEEDS = 3
"""With fewer the interval is so wide that every gate would pass."""
GATE_RULE, GATE_SLUG = "GATE", "max-regression"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One number of a trunk that can be gated."""

    name: str
    """As in ``--max-regression J=10%``."""
    meaning: str
    worse: str
    """What it does as it gets worse: "is further from 1"."""
    of: Callable[[SeedMeasure], float]
    cost: Callable[[float], float]
    """The logarithm that grows as the metric gets worse; NaN where it is not defined."""


def _distance_from_one(value: float) -> float:
    return abs(_log(value))


def _log(value: float) -> float:
    if math.isnan(value) or value < 0:
        return math.nan
    return math.log(value) if value else -math.inf


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            name="J",
            meaning="the gradient's gain along the trunk",
            worse="is further from 1",
            of=lambda seed: seed.gain,
            cost=_distance_from_one,
        ),
        Metric(
            name="signal",
            meaning="the signal's gain along the trunk",
            worse="is further from 1",
            of=lambda seed: seed.signal_gain,
            cost=_distance_from_one,
        ),
        Metric(
            name="drop",
            meaning="the gradient's largest drop between two tensors",
            worse="is larger",
            of=lambda seed: seed.largest_drop,
            cost=_log,
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """What came of one limit."""

    metric: str
    limit: float
    """0.1 for 10%."""
    verdict: str
    """"regressed", "within the limit", "improved", "no difference" or "not measured"."""
    change: float
    """Geometric mean of the change for the worse: 0.25 where the cost is 25% higher, negative where lower."""
    low: float
    high: float
    """The change's 95% interval."""
    now: float
    before: float
    """Geometric means over the seeds."""
    seeds: tuple[int, int]
    """How many there were, now and in the reference."""

    @property
    def fails(self) -> bool:
        """Whether the run must not pass."""
        return self.verdict in ("regressed", "not measured")


def measure(trace: Trace, seed: int) -> SeedMeasure:
    """The gated numbers of one recording."""
    summary = profile(trace.trunk)
    return SeedMeasure(
        seed=seed,
        gain=summary.gain,
        signal_gain=summary.signal_gain,
        largest_drop=summary.largest_drop,
    )


def seed_measures(trace: Trace) -> tuple[SeedMeasure, ...]:
    """The numbers of each seed that a trace holds; of a trace of one seed, its own."""
    return trace.seeds or (measure(trace, trace.run.seed),)


def gate(
    limits: Sequence[tuple[str, float]], now: Trace, reference: Trace, *, name: str = "the reference"
) -> tuple[GateResult, ...]:
    """Hold a recording against a saved one.

    Args:
        limits: Metric and the share by which it may get worse: (("J", 0.1),).
        now: A recording of several seeds.
        reference: The saved one; of one seed, its spread is taken to be that of ``now``.
        name: What to call the reference in an error.

    Raises:
        UsageError: There are too few seeds, or the reference has no such number.
    """
    current, saved = seed_measures(now), seed_measures(reference)
    if len(current) < FEWEST_SEEDS:
        raise UsageError(
            f"--max-regression tells a change from noise by several seeds, and {len(current)} is too few: "
            f"give --seeds {GATE_SEEDS}"
        )
    return tuple(_gate(METRICS[metric], limit, current, saved, name) for metric, limit in limits)


def _gate(
    metric: Metric,
    limit: float,
    current: Sequence[SeedMeasure],
    saved: Sequence[SeedMeasure],
    name: str,
) -> GateResult:
    now, before = [metric.of(seed) for seed in current], [metric.of(seed) for seed in saved]
    costs, saved_costs = [metric.cost(value) for value in now], [metric.cost(value) for value in before]
    if not all(math.isfinite(cost) for cost in saved_costs):
        raise UsageError(
            f"{name} has no {metric.name} to compare with ({metric.meaning}); gate another number"
        )
    change, margin = difference(costs, saved_costs)
    low, high = change - margin, change + margin
    return GateResult(
        metric=metric.name,
        limit=limit,
        verdict=_verdict(change, low, high, math.log1p(limit)),
        change=_share(change),
        low=_share(low),
        high=_share(high),
        now=_geometric_mean(now),
        before=_geometric_mean(before),
        seeds=(len(now), len(before)),
    )


def difference(now: Sequence[float], before: Sequence[float]) -> tuple[float, float]:
    """Difference of two means, and the half width of its 95% interval.

    Welch's t-interval; a side of one value is taken to scatter as the other does (pooled, n - 1 degrees of
    freedom). An infinite value makes the difference infinite and leaves no doubt; NaN stays NaN.
    """
    change = fmean(now) - fmean(before)
    if not math.isfinite(change):
        return change, 0.0
    if len(before) == 1:
        spread = variance(now) * (1 / len(now) + 1)
        return change, t95(len(now) - 1) * math.sqrt(spread)
    parts = [(variance(side) / len(side), len(side) - 1) for side in (now, before)]
    spread = sum(part for part, _ in parts)
    if not spread:
        return change, 0.0
    freedom = spread**2 / sum(part**2 / degrees for part, degrees in parts)
    return change, t95(freedom) * math.sqrt(spread)


def _verdict(change: float, low: float, high: float, limit: float) -> str:
    if math.isnan(change):
        return "not measured"
    if low <= 0 <= high:
        return "no difference"
    if change < 0:
        return "improved"
    return "regressed" if change > limit else "within the limit"


def _share(log_change: float) -> float:
    return math.expm1(min(log_change, 700.0)) if not math.isinf(log_change) or log_change < 0 else math.inf


def _geometric_mean(values: Sequence[float]) -> float:
    logs = [_log(value) for value in values]
    mean = fmean(logs)
    return math.exp(min(mean, 700.0)) if not math.isnan(mean) else math.nan


def gate_sentence(result: GateResult) -> str:
    """What came of a gate, with its interval."""
    metric = METRICS[result.metric]
    if result.verdict == "not measured":
        before = _number(result.before)
        return f"{metric.name} ({metric.meaning}) cannot be measured any more; the reference has {before}"
    numbers = (
        f"{metric.name} {_number(result.now)} against {_number(result.before)} in the reference: "
        f"worse by {_percent(result.change)} (95% interval {_percent(result.low)} to {_percent(result.high)}, "
        f"{result.seeds[0]} seeds against {result.seeds[1]}), limit {_percent(result.limit)}"
    )
    words = {
        "regressed": f"{metric.name} {metric.worse} than it may be",
        "no difference": "no difference can be told from noise",
    }
    return f"{words.get(result.verdict, result.verdict)}: {numbers}"


def gate_finding(result: GateResult, trace: Trace) -> Finding:
    """A gate that failed, for the formats that know findings."""
    points = trace.trunk.points
    metric = METRICS[result.metric]
    return Finding(
        rule=GATE_RULE,
        slug=GATE_SLUG,
        severity=Severity.ERROR,
        location=Location(first=points[0].name, last=points[-1].name) if points else Location(first=""),
        message=gate_sentence(result),
        why=f"{metric.meaning[:1].upper()}{metric.meaning[1:]} got worse than the saved trace allows",
        hint="Find the change that did it, or save a new reference if it was meant (--csv writes trace.json)",
        value=None if math.isnan(result.change) else result.change,
        threshold=result.limit,
        evidence=(
            ("metric", metric.name),
            ("now", result.now),
            ("before", result.before),
            ("low", result.low),
            ("high", result.high),
        ),
    )


def _number(value: float) -> str:
    return f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:+.3g}%" if abs(share) < 10 else f"×{1 + share:.3g}"
