"""GF202: the residual stream grows from block to block, or a branch drowns its skip."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules.gain import LARGEST_LOG, Evidence, exceeded, number
from gradflow.rules.rule import Limits, Rule, Threshold, in_force
from gradflow.rules.sites import Sites, adding_sites, main_stream, neighbours, place, stretches, subject
from gradflow.trace_model import ResidualRecord, Trace
from gradflow.trunk_profile import SLOPE_POINTS, profile

LASTING = 0.25
"""The share of the trend that must be left without its largest step: one block that lifts the stream once, as
massive activations do, is no growth."""

FEWEST_SITES = 4
"""A stretch of fewer sites than this has no trend, nor have fewer in the last halves of all."""

LARGEST_HALF = 65504.0
"""The largest float16."""

MEASURED = "measured: a normalised stream grows 1 + 1/l a block (1.06 at l = 18), an un-normalised one 2 or 3"
GROWTH_LIMITS = (
    Threshold(key="growth", name="growth gamma above", value=1.15, severity=Severity.INFO, source=MEASURED),
    Threshold(
        key="growth", name="growth gamma above", value=1.25, severity=Severity.WARNING, source=MEASURED
    ),
)
GAIN_LIMIT = Threshold(
    key="gain",
    name="growth above its warning limit, and the gain J of GF102 above",
    value=1e4,
    severity=Severity.ERROR,
    source="calibration on 88 small nets: above it all failed with Adam and with SGD; alone, without growth, "
    "J is judged by GF102 at 1e5",
)
HALF_LIMIT = Threshold(
    name="growth above its warning limit, and in float16 the projected size of the last sum above",
    value=LARGEST_HALF,
    severity=Severity.ERROR,
    source="the largest float16",
)
SMALL_STREAM = 0.1
"""At initialisation a stream smaller than this is an embedding: N(0, 0.02) under unit-size branches."""

DOMINANCE_LIMIT = Threshold(
    key="dominance",
    name="rho above",
    value=10.0,
    severity=Severity.WARNING,
    source="the skip is then below 1% of the energy; the largest healthy rho measured is 2.25",
)
ALIGNED_GROWTH = {Severity.INFO: 2.0, Severity.WARNING: 4.0}
"""What a normalised stream does at most over its last half, where branches are independent (variance 1 + l)
and where they are all aligned ((1 + l)^2): no growth rate, however few the blocks."""

GROWTH_WHY = (
    "Each block multiplies the variance instead of adding to it: the backward grows alike, deep blocks "
    "decide alone, and low precision overflows"
)
GROWTH_HINT = (
    "Normalise the input of each branch (pre-norm), scale each branch by 1/sqrt(number of blocks), or start "
    "its last layer at zero"
)
DOMINANCE_WHY = (
    "The skip is lost in the sum: the block replaces its input instead of adding to it, and the gradient "
    "takes the branch, as in a net without skips"
)
DOMINANCE_HINT = (
    "Scale the branch down (a smaller last layer, a LayerScale), normalise its input, or check that what "
    "enters the stream is not far too small: an embedding drawn from N(0, 0.02) under unit-size branches"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """The trend of ln var over the last half of each stretch of a stream."""

    halves: tuple[Sites, ...]
    """Of each stretch the site whose sum enters its last half, and that half."""
    slope: float
    """Of ln var, a site."""
    overflowed: int
    """Sites at the end of the stream whose sums are no longer finite."""

    @property
    def sites(self) -> Sites:
        """The sites of the last halves."""
        return tuple(site for half in self.halves for site in half[1:])

    @property
    def gamma(self) -> float:
        """The factor on the variance of one site."""
        return math.exp(min(self.slope, LARGEST_LOG))

    @property
    def in_all(self) -> float:
        """The factor on the variance over the longest last half."""
        return math.exp(min(self.slope * max(len(half) - 1 for half in self.halves), LARGEST_LOG))

    @property
    def projected(self) -> float:
        """The standard deviation of the stream's last sum, by the fit: it goes on where float16 overflows."""
        last = self.halves[-1]
        steps = len(last) - 1 + self.overflowed
        return math.exp(min(math.log(last[0].std or 1.0) + 0.5 * self.slope * steps, LARGEST_LOG))


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield at most one finding about growth, and one for each run of dominating branches."""
    growth, limits = measure(main_stream(trace)), in_force(RULE, config)
    if growth is not None:
        yield from _grows(trace, growth, limits)
    sites = adding_sites(trace)
    largest = limits.only("dominance")
    drowned = [site for site in sites if _dominates(site, largest)]
    for small in (True, False):
        wanted = [site for site in drowned if (not trace.run.trained and _enters_small(site)) is small]
        for run in neighbours(wanted, sites):
            yield _dominance(run, sites, largest, small=small)


def measure(stream: Sites) -> Growth | None:
    """Fit the growth of a stream.

    Args:
        stream: The sites of one stream, in execution order.

    Returns:
        gamma = exp(Theil-Sen slope of ln var of the sums), or None where there are too few sites for a trend.
        The stream is cut at a projection and where the shape changes, as both give it a new variance. Of each
        stretch the last half is fitted, with the sum that enters it.
    """
    known = tuple(site for site in stream if site.std and math.isfinite(site.std))
    long = [part for part in stretches(known, starts=_starts_anew) if len(part) >= FEWEST_SITES]
    halves = tuple(part[len(part) // 2 - 1 :] for part in long)
    if sum(len(half) - 1 for half in halves) < FEWEST_SITES:
        return None
    logs = [[2 * math.log(site.std or 1.0) for site in half] for half in halves]
    slope = _slope(logs)
    lasts = _slope(_without_largest_step(logs)) >= LASTING * slope
    finite = [site.std is None or math.isfinite(site.std) for site in stream]
    overflowed = finite[::-1].index(True)
    return Growth(halves=halves, slope=slope if lasts else 0.0, overflowed=overflowed)


def _starts_anew(before: ResidualRecord, site: ResidualRecord) -> bool:
    return site.kind == "projection" or site.shape != before.shape


def _slope(logs: Sequence[Sequence[float]]) -> float:
    """The median of the slopes between all pairs of one stretch, over all stretches (Theil 1950, Sen 1968)."""
    return median(slope for part in logs for slope in _slopes(part))


def _slopes(part: Sequence[float]) -> Iterator[float]:
    points = list(enumerate(part))
    if len(points) > SLOPE_POINTS:
        step = (len(points) - 1) / (SLOPE_POINTS - 1)
        points = [points[round(i * step)] for i in range(SLOPE_POINTS)]
    return ((y2 - y1) / (x2 - x1) for i, (x1, y1) in enumerate(points) for x2, y2 in points[i + 1 :])


def _without_largest_step(logs: Sequence[Sequence[float]]) -> list[list[float]]:
    steps = [(b - a, part, k) for part, y in enumerate(logs) for k, (a, b) in enumerate(pairwise(y), start=1)]
    size, at, start = max(steps)
    return [
        [value - size * (part == at and k >= start) for k, value in enumerate(y)]
        for part, y in enumerate(logs)
    ]


def _grows(trace: Trace, growth: Growth, limits: Limits) -> Iterator[Finding]:
    growing = sorted(limits["growth"], key=lambda limit: limit.severity.rank)
    limit = exceeded(growing, growth.gamma, below=False)
    while limit is not None and growth.in_all <= ALIGNED_GROWTH[limit.severity]:
        limit = growing[0] if limit.severity is Severity.WARNING else None
    if limit is None:
        return
    gain, most = profile(trace.trunk).gain, limits.only("gain").value
    worst, because = limit.severity, ""
    if worst is Severity.WARNING and gain > most:
        worst = Severity.ERROR
        because = f"; the gradient grows {number(gain)}-fold with it (error above {number(most)})"
    elif worst is Severity.WARNING and _is_half(trace) and growth.projected > LARGEST_HALF:
        worst = Severity.ERROR
        because = f"; it reaches {number(growth.projected)}, and float16 ends at {LARGEST_HALF:g}"
    yield Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=worst,
        location=place(growth.sites),
        message=(
            f"The variance of the residual stream grows {number(growth.gamma)}-fold an add over "
            f"{_last_half(growth)} ({limit.severity} above {number(limit.value)}){because}"
        ),
        why=GROWTH_WHY,
        hint=GROWTH_HINT,
        value=growth.gamma,
        threshold=limit.value,
        evidence=_evidence(growth, gain),
    )


def _last_half(growth: Growth) -> str:
    several = (
        f"the last halves of {len(growth.halves)} stretches" if len(growth.halves) > 1 else "its last half"
    )
    return f"{several}, {len(growth.sites)} adds"


def _is_half(trace: Trace) -> bool:
    return trace.run.dtype == "float16" or any(layer.dtype == "float16" for layer in trace.layers)


def _evidence(growth: Growth, gain: float) -> Evidence:
    facts: Evidence = (
        ("sites", len(growth.sites)),
        ("stretches", len(growth.halves)),
        ("growth_in_all", growth.in_all),
        ("first_std", growth.halves[-1][0].std or 0.0),
        ("last_std", growth.halves[-1][-1].std or 0.0),
        ("projected_std", growth.projected),
        ("gain", gain),
    )
    return tuple((name, fact) for name, fact in facts if fact == fact)


def _dominates(site: ResidualRecord, limit: Threshold) -> bool:
    # A zero skip (a decoder's queries that start at zero) has nothing to drown.
    return site.rho is not None and limit.value < site.rho < math.inf


def _enters_small(site: ResidualRecord) -> bool:
    return site.source_std is not None and site.source_std < SMALL_STREAM


def _dominance(run: Sites, sites: Sequence[ResidualRecord], limit: Threshold, *, small: bool) -> Finding:
    severity = Severity.INFO if small else limit.severity
    usual = f"; what enters it has a standard deviation below {SMALL_STREAM}" if small else ""
    largest = max(site.rho or 0.0 for site in run)
    times = f"{'is' if len(run) == 1 else 'are up to'} {number(largest)} times as large as the skip"
    return Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=severity,
        location=place(run),
        message=(
            f"{subject('branch', run, sites)} {times} ({severity} above {number(limit.value)}): "
            f"the skip brings {number(100 / (1 + largest**2))}% of the energy{usual}"
        ),
        why=DOMINANCE_WHY,
        hint=DOMINANCE_HINT,
        value=largest,
        threshold=limit.value,
        evidence=(("sites", len(run)), ("clause", "branch dominance")),
    )


RULE = Rule(
    code="GF202",
    slug="residual-growth",
    summary="The residual stream grows from block to block, or a branch drowns its skip.",
    meaning=(
        "Looks at the variance of the sums along the residual stream with the most adds. Each block adds "
        "the variance of its branch. Where branches are normalised that is a constant, so the stream grows "
        "by 1 + 1/l and less and less; where they are not, each branch is as large as the stream, and the "
        "variance doubles at every add.\n\n"
        "gamma is the factor of one add, fitted over the last half of the stream: the trend of ln var, and "
        "it must go on without its largest step, so that one block that lifts the stream is no growth. A "
        "block with two adds (attention and MLP) counts as two. A projection and a change of shape give "
        "the stream a new variance, so it is cut there, and the last half of each stretch is fitted. A "
        "stretch of three adds or fewer has no trend; four adds must be fitted in all, so a stream of six "
        "or fewer is not judged.\n\n"
        "Growth and an exploding gradient (GF102) are two sides of one fault and are both reported.\n\n"
        "A second clause looks at each site alone: a branch ten times as large as its skip leaves the skip "
        "less than a hundredth of the energy."
    ),
    formula=(
        "gamma = exp(Theil-Sen slope of ln var(x + F) over the last half of each stretch); "
        "rho = ‖F‖ / ‖skip‖; the skip's share of the energy is 1 / (1 + rho²)"
    ),
    why=f"{GROWTH_WHY}. {DOMINANCE_WHY}.",
    hint=f"{GROWTH_HINT}. {DOMINANCE_HINT}.",
    thresholds=(*GROWTH_LIMITS, GAIN_LIMIT, HALF_LIMIT, DOMINANCE_LIMIT),
    exemptions=(
        "Growth that a normalised stream shows over its last half: 2-fold in all is no info (independent "
        "branches), 4-fold no warning (branches that are all aligned).",
        "A stretch between projections or changes of shape with fewer than four adds, as in ResNet-18.",
        "Sites inside another site's branch, for growth; they are judged for dominance.",
        "A branch that dominates a stream whose standard deviation is below 0.1 at initialisation, as an "
        "embedding's is: info.",
        "A skip that is exactly zero, as of queries that start at zero.",
    ),
    sources=(
        "De and Smith, Batch normalization biases residual blocks towards the identity function, 2020",
        "Brock et al., Characterizing signal propagation to close the performance gap in unnormalized "
        "ResNets, ICLR 2021",
        "Sun et al., The curse of depth in large language models, 2025",
        "Zhang et al., Fixup initialization, ICLR 2019",
    ),
    phase="both",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        for linear in (self.branch[1], self.branch[3]):
            nn.init.kaiming_normal_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x):
        return x + self.branch(x)


model = nn.Sequential(*[Block() for _ in range(30)], nn.Linear(64, 10))
example_inputs = torch.randn(64, 64)
""",
    healthy_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        for linear in (self.branch[1], self.branch[3]):
            nn.init.kaiming_normal_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x):
        return x + self.branch(x)


model = nn.Sequential(*[Block() for _ in range(30)], nn.Linear(64, 10))
example_inputs = torch.randn(64, 64)
""",
    check=check,
)
