"""GF201: a residual block whose branch adds next to nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules.gain import Evidence, number
from gradflow.rules.rule import Limits, Rule, Threshold, in_force
from gradflow.rules.sites import (
    ALIKE,
    Sites,
    adding_sites,
    alike,
    inside,
    joined,
    neighbours,
    place,
    ranking,
    stack_of,
    subject,
    upper_quartile,
)
from gradflow.trace_model import ResidualRecord, Trace

MARGIN = "engineering choice; the papers rank blocks and give no cut"
HEALTHY = "measured: the smallest healthy rho without a gate is 0.058 (zero-gamma ResNet-20 after 60 steps)"

EVEN_LIMIT = Threshold(
    key="rho",
    name="at initialisation, evenly over its like: rho below",
    value=0.05,
    severity=Severity.INFO,
    source=HEALTHY,
)
SHARE_LIMIT = Threshold(
    key="share",
    name=f"rho, as a share of the upper quartile of its like (at least {ALIKE}), below",
    value=0.05,
    severity=Severity.WARNING,
    source=MARGIN,
)
SMALL_LIMIT = Threshold(
    key="rho", name="at initialisation also: rho below", value=0.05, severity=Severity.WARNING, source=HEALTHY
)
TRAINED_LIMIT = Threshold(
    key="trained-rho",
    name="after training: rho below",
    value=0.01,
    severity=Severity.WARNING,
    source=f"{MARGIN}; 0.01 is a Block Influence of 5e-5 for an orthogonal branch",
)
GATED = 0.05
"""A factor on the branch smaller than this is what makes the branch small."""

WHY = (
    "The block passes its input on: its parameters and its time buy nothing, and a skip this much larger "
    "than the branch hides whatever the branch learns"
)
STAND_OUT_HINT = (
    "Compare its initialisation and its factors with those of the other blocks: a branch scaled twice, a "
    "last layer drawn too small, an activation that is dead for every sample"
)
EVEN_HINT = (
    "Nothing needs to be done where a gate or a small initialisation is meant; measure again after some "
    "training with --trained, where a branch that stayed shut is a warning"
)
TRAINED_HINT = (
    "Run without the block and compare the loss; if it does not move, remove it, and otherwise look for a "
    "gate that received no gradient, weight decay on a gate, or a learning rate too small for the branch"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A weak site, with what is usual among its like (None where too few are alike)."""

    site: ResidualRecord
    usual: float | None
    count: int
    stands_out: bool


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield a warning for each run of neighbouring blocks that stand out, and the evenly small as info."""
    sites, limits = adding_sites(trace), in_force(RULE, config)
    weak = {j.site.order: j for j in _weak(sites, limits, trained=trace.run.trained)}
    out = [site for site in sites if site.order in weak and weak[site.order].stands_out]
    even = [site for site in sites if site.order in weak and not weak[site.order].stands_out]
    for run in neighbours(out, sites):
        yield _warning(trace, run, weak[_weakest(run).order], sites, limits)
    for run in joined(neighbours(even, sites)):
        yield _info(run, sites, _even(limits))


def _weak(sites: Sequence[ResidualRecord], limits: Limits, *, trained: bool) -> Iterator[Judged]:
    for group in alike(sites).values():
        # An exact zero is a gate that has not opened or a dead branch: GF204 tells which.
        known = [s for s in group if s.rho is not None and 0 < s.rho < math.inf]
        usual = upper_quartile([site.rho or 0.0 for site in known])
        judged = [_judge(site, usual, len(known), limits, trained=trained) for site in known]
        yield from _without_stages([j for j in judged if j is not None], known, trained=trained)


def _without_stages(
    weak: Sequence[Judged], known: Sequence[ResidualRecord], *, trained: bool
) -> Iterator[Judged]:
    """At initialisation a whole stage that is small is so by its width and its stream: no block of it stands out."""
    out = [_stage(j.site) for j in weak if j.stands_out]
    of = [_stage(site) for site in known]
    for judged in weak:
        stage = _stage(judged.site)
        whole = 2 <= out.count(stage) == of.count(stage) < len(known)
        yield replace(judged, stands_out=False) if whole and not trained else judged


def _stage(site: ResidualRecord) -> tuple[str, tuple[int, ...]]:
    """What the sums of one stage share: the stack that numbers them, and their shape, the batch's dimension apart."""
    return stack_of(site.name), site.shape[1:]


def _judge(
    site: ResidualRecord, usual: float | None, count: int, limits: Limits, *, trained: bool
) -> Judged | None:
    rho = site.rho or 0.0
    stands_out = usual is not None and rho < limits.only("share").value * usual
    if trained:
        stands_out = stands_out or rho < limits.only("trained-rho").value
    elif rho >= _even(limits):
        return None
    # A trained block that is only small is not judged further.
    return (
        Judged(site=site, usual=usual, count=count, stands_out=stands_out)
        if stands_out or not trained
        else None
    )


def _weakest(sites: Sequence[ResidualRecord]) -> ResidualRecord:
    return min(sites, key=lambda site: site.rho or 0.0)


def _warning(trace: Trace, run: Sites, worst: Judged, sites: Sites, limits: Limits) -> Finding:
    rho, threshold = worst.site.rho or 0.0, _threshold(worst, limits, trained=trace.run.trained)
    adds = f"add{'s' if len(run) == 1 else ' at least'} {number(rho)} of the skip's norm"
    usual = "" if worst.usual is None else f"; {number(worst.usual)} is usual among the {worst.count} alike"
    return Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=Severity.WARNING,
        location=place(run),
        message=f"{subject('branch', run, sites)} {adds} (warning below {number(threshold)}){usual}"
        + _factor(run),
        why=WHY,
        hint=TRAINED_HINT if trace.run.trained else STAND_OUT_HINT,
        value=rho,
        threshold=threshold,
        evidence=_evidence(run, sites, worst.usual),
    )


def _even(limits: Limits) -> float:
    return next(limit.value for limit in limits["rho"] if limit.severity is Severity.INFO)


def _threshold(worst: Judged, limits: Limits, *, trained: bool) -> float:
    """The limit that the weakest site is under; of two the larger, as either is enough after training."""
    relative = 0.0 if worst.usual is None else limits.only("share").value * worst.usual
    small = next(limit.value for limit in limits["rho"] if limit.severity is Severity.WARNING)
    return max(relative, limits.only("trained-rho").value) if trained else min(relative, small)


def _factor(run: Sites) -> str:
    scales = [abs(site.branch_scale) for site in run if site.branch_scale is not None]
    if len(scales) < len(run) or max(scales) >= GATED:
        return ""
    return f"; the factor on it is {number(max(scales))}"


def _info(run: Sites, sites: Sites, limit: float) -> Finding:
    largest = max(site.rho or 0.0 for site in run)
    verb = "adds" if len(run) == 1 else "add at most"
    gated = _factor(run)
    evenly = "gated" if gated else "evenly small by initialisation"
    return Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=Severity.INFO,
        location=place(run),
        message=(
            f"{subject('branch', run, sites)} {verb} {number(largest)} of the skip's norm "
            f"(info below {number(limit)}), {evenly}{gated}"
        ),
        why="Blocks that start near the identity are a common choice, and stay so only if nothing opens them",
        hint=EVEN_HINT,
        value=largest,
        threshold=limit,
        evidence=_evidence(run, sites, None),
    )


def _evidence(run: Sites, sites: Sites, usual: float | None) -> Evidence:
    makes = {site.like for site in run}
    influences = [site.block_influence for site in run if site.block_influence is not None]
    facts: Evidence = (("sites", len(run)),)
    if usual is not None:
        facts += (("usual_rho", usual),)
    if influences:
        facts += (("block_influence", min(influences)),)
    facts += (("ranking", ranking((s for s in sites if s.like in makes), sites)),)
    return facts + tuple(("not_reported", words) for words in _exempt(sites))


def _exempt(sites: Sites) -> list[str]:
    """The zero-initialised sites that are left to GF204, in words."""
    gates = {name: None for s in sites if s.branch_norm == 0 for name in (inside(s, p) for p in s.opened_by)}
    return [f"zero-initialised gate, opens by {', '.join(gates)}"] if gates else []


RULE = Rule(
    code="GF201",
    slug="near-identity-block",
    summary="A residual block adds next to nothing to its skip.",
    meaning=(
        "Looks at every identity, projection and scaled residual site: how large what the branch brings to "
        "the add is, beside what the skip brings. It wants every block to do its share.\n\n"
        "At initialisation small branches are often meant (a LayerScale, a small last layer), so evenly "
        "small ones are info. What is not meant is one block, or a few, far below all others of the same "
        "make: that is a warning. Sites are of the same make when the same class adds, at the same place "
        "in its forward, the same kind of shortcut and the same branch. Their usual value is the upper "
        "quartile and not the median, so that half of the blocks being faulty does not make the fault look "
        "usual.\n\n"
        "After training (--checkpoint, --trained) a branch below 0.01 is a warning by itself. It is never "
        "an error: a near-identity block wastes capacity and breaks nothing. The evidence holds the "
        "ranking of the blocks; only leaving one out and measuring the loss decides whether it is "
        "redundant."
    ),
    formula=(
        "rho = ‖F‖ / ‖skip‖, Frobenius norms of the two operands of the add; "
        "BI = 1 - mean cos(x, x + F), for an orthogonal branch 1 - 1/sqrt(1 + rho²)"
    ),
    why=WHY + ".",
    hint=f"{STAND_OUT_HINT}. {TRAINED_HINT}.",
    thresholds=(EVEN_LIMIT, SHARE_LIMIT, SMALL_LIMIT, TRAINED_LIMIT),
    exemptions=(
        "At initialisation, a whole stage or tower of at least two blocks that are all small beside those of "
        "another: weights of one deviation make a branch grow with its width, and an embedding sets the scale of "
        "its stream, so that is what differs.",
        "A branch that is exactly zero is GF204's, and is stated there as \"zero-initialised gate, opens by "
        'bn2.weight" where a gate will open it.',
        "Depth by itself: behind a normalised branch rho falls as 1/sqrt(l + 1) over l blocks, far slower "
        "than the limits.",
        "Gated, concatenated, low-rank and opaque sites: their norms do not compare as a skip and a branch.",
        "A site whose skip is zero, or whose norms are NaN or Inf.",
    ),
    sources=(
        "Men et al., ShortGPT: Layers in large language models are more redundant than you expect, 2024",
        "Gromov et al., The unreasonable ineffectiveness of the deeper layers, 2024",
        "He et al., Deep residual learning for image recognition, CVPR 2016 (figure 7)",
    ),
    phase="both",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x):
        return x + self.branch(x)


model = nn.Sequential(*[Block() for _ in range(8)], nn.Linear(64, 10))
nn.init.normal_(model[3].branch[3].weight, std=1e-5)
nn.init.zeros_(model[3].branch[3].bias)
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

    def forward(self, x):
        return x + self.branch(x)


model = nn.Sequential(*[Block() for _ in range(8)], nn.Linear(64, 10))
example_inputs = torch.randn(64, 64)
""",
    check=check,
)
