"""GF205: where the blocks of a stream normalise, where that is worth knowing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules.gain import Evidence, number
from gradflow.rules.rule import Rule, Threshold, in_force
from gradflow.rules.sites import ALIKE, Sites, adding_sites, label, main_stream, place
from gradflow.trace_model import ResidualRecord, Trace
from gradflow.trunk_profile import profile

POST_NORM = Threshold(
    key="post-norm",
    name="adds of a stream with the norm on their sum, from",
    value=12,
    severity=Severity.INFO,
    source="Xiong et al. 2020: from six blocks of two the last layers' gradient is what warm-up is for",
)
WITHOUT_NORM = Threshold(
    key="without-norm",
    name="adds of a stream without any norm or factor, which grow, from",
    value=8,
    severity=Severity.INFO,
    source="engineering choice: at the growth of GF202's info a stream of eight has tripled its variance",
)
ODD_ONE = Threshold(
    key="odd-one",
    name="share of like adds that normalise elsewhere than the others, above 0 and up to",
    value=0.25,
    severity=Severity.INFO,
    source="engineering choice: a block copied by hand, not a design",
)
NO_NORM = "without norm"
"""The ``kind`` of the findings about streams that nothing holds at their size."""

GROWING = 1.15
"""1 + rho^2, what an un-normalised add at right angles multiplies the variance by; as GF202's info."""
MOST = 0.75
"""A stream is of a kind where so large a share of its adds is."""
WORDS = {
    "before": "before the branch",
    "after": "on the sum",
    "end": "at the end of the branch",
    "both": "before and after the branch",
    "inside": "inside the branch",
    "none": "nowhere",
}
POST_WHY = (
    "The gradient of the last layers is as large in a deep stack as in a shallow one, where pre-norm divides it "
    "by sqrt(depth): a full learning rate in the first steps moves them too far"
)
POST_HINT = (
    "Warm the learning rate up over the first few thousand steps, or normalise before the branch "
    "(x + f(norm(x))) with one norm at the end of the stream"
)
NONE_WHY = "Nothing holds the stream's size: each add multiplies its variance, and the gradient's going back"
NONE_HINT = (
    "Normalise the input of each branch, or give each branch a factor that starts at zero or at "
    "1/sqrt(number of adds)"
)
ODD_WHY = "One block of a kind that is built differently is more often a slip than a design"
ODD_HINT = "Compare its forward with that of the others; where it is meant, ignore the finding"


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield at most one finding about the main stream, and one for each group of like adds with an odd one."""
    stream, limits = main_stream(trace), in_force(RULE, config)
    if not trace.run.trained:
        yield from _post_norm(trace, stream, limits.only("post-norm"))
        yield from _without_norm(stream, limits.only("without-norm"))
    yield from _odd_ones(adding_sites(trace), limits.only("odd-one"))


def _post_norm(trace: Trace, stream: Sites, limit: Threshold) -> Iterator[Finding]:
    found = _of(stream, "after")
    if len(found) < limit.value or len(found) < MOST * len(stream):
        return
    gain = profile(trace.trunk).gain
    measured = trace.trunk.kind == "residual" and math.isfinite(gain) and gain > 0
    each = gain ** (1 / (len(trace.trunk.points) - 1)) if measured else None
    kept = f"; going back, an add keeps {number(each)} of the gradient here" if each is not None else ""
    evidence: Evidence = (("kind", "post-norm"), ("sites", len(found)))
    yield _finding(
        found,
        f"{len(found)} adds of the stream normalise their sum (post-norm, info from {limit.value:g})"
        f"{kept}: the last layers' gradient does not shrink with depth",
        POST_WHY,
        POST_HINT,
        value=float(len(found)),
        limit=limit,
        evidence=evidence if each is None else (*evidence, ("gain", gain), ("gain_each", each)),
    )


def _without_norm(stream: Sites, limit: Threshold) -> Iterator[Finding]:
    found = tuple(site for site in _of(stream, "none") if not site.branch_factors)
    growth = [1 + site.rho**2 for site in found if site.rho is not None and math.isfinite(site.rho)]
    if len(found) < max(limit.value, MOST * len(stream)) or not growth or median(growth) <= GROWING:
        return
    yield _finding(
        found,
        f"{len(found)} adds of the stream have no norm and no factor (info from {limit.value:g}): each "
        f"multiplies the variance by about {number(median(growth))}",
        NONE_WHY,
        NONE_HINT,
        value=float(len(found)),
        limit=limit,
        evidence=(("kind", NO_NORM), ("sites", len(found)), ("growth", median(growth))),
    )


def _odd_ones(sites: Sites, limit: Threshold) -> Iterator[Finding]:
    groups: dict[str, list[ResidualRecord]] = {}
    for site in sites:
        if site.norm_placement:
            groups.setdefault(_make(site), []).append(site)
    for group in groups.values():
        placements = [site.norm_placement for site in group]
        usual = max(WORDS, key=placements.count)
        odd = tuple(site for site in group if site.norm_placement != usual)
        if odd and len(group) > ALIKE and len(odd) <= limit.value * len(group):
            yield _odd(odd, len(group), usual, sites, limit)


def _odd(odd: Sites, group: int, usual: str, sites: Sites, limit: Threshold) -> Finding:
    named = ", ".join(f"{label(site, sites)} {WORDS.get(site.norm_placement, '')}" for site in odd[:ALIKE])
    more = f" and {len(odd) - ALIKE} more" if len(odd) > ALIKE else ""
    share = len(odd) / group
    return _finding(
        odd,
        f"{named}{more}: {group - len(odd)} of {group} like adds normalise {WORDS[usual]} "
        f"(info up to {number(limit.value)})",
        ODD_WHY,
        ODD_HINT,
        value=share,
        limit=limit,
        evidence=(("kind", "odd one out"), ("sites", len(odd)), ("like", group), ("usual", usual)),
    )


def _make(site: ResidualRecord) -> str:
    """Class of the adding module, index and kind: the ops of the branch would tell the odd one apart."""
    return site.like.partition(":")[0]


def _of(stream: Sites, placement: str) -> Sites:
    return tuple(site for site in stream if site.norm_placement == placement)


def _finding(
    sites: Sites, message: str, why: str, hint: str, *, value: float, limit: Threshold, evidence: Evidence
) -> Finding:
    return Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=limit.severity,
        location=place(sites),
        message=message,
        why=why,
        hint=hint,
        value=value,
        threshold=limit.value,
        evidence=evidence,
    )


RULE = Rule(
    code="GF205",
    slug="norm-placement",
    summary="Where the blocks of a stream normalise, where that has consequences for training.",
    meaning=(
        "Looks at where each residual block normalises: before its branch (pre-norm), on the sum (post-norm), at "
        "the end of the branch, before and after it, or nowhere. None of them is a fault, so this is info, and it "
        "speaks of three things only.\n\n"
        "A long post-norm stream at initialisation: the gradient of its last layers is as large at any depth, "
        "where pre-norm divides it by sqrt(depth). That is what learning-rate warm-up is for. It is not true that "
        "a post-norm stack loses 1/sqrt(2) of the gradient a sublayer at initialisation: that is the skip alone, "
        "and a random branch returns the rest (measured: 0.99 a feed-forward, 0.89 to 0.94 an attention).\n\n"
        "A stream without norms and without factors whose branches are large enough to make it grow. GF202 says "
        "so from the variances; where it does, this is its consequence.\n\n"
        "One block among its like that normalises elsewhere than the others."
    ),
    formula=(
        "placement of each add of the main stream, from the dataflow (docs/residual.md)\n"
        "1 + rho^2 = the factor on the variance of an add whose branch is at right angles to its skip"
    ),
    why=f"{POST_WHY}. {NONE_WHY}. {ODD_WHY}.",
    hint=f"{POST_HINT}. {NONE_HINT}. {ODD_HINT}.",
    thresholds=(POST_NORM, WITHOUT_NORM, ODD_ONE),
    exemptions=(
        "Pre-norm streams, norms at the end of the branch (ResNet, OLMo 2, Swin V2), before and after it (Gemma 2): "
        "anatomy shows them.",
        "Trained models, but for the odd block: warm-up and growth at the start are behind them.",
        "Streams without norms whose branches carry a factor (ReZero, SkipInit, Fixup's scalars) or are small.",
    ),
    sources=(
        "Xiong et al., On layer normalization in the transformer architecture, ICML 2020",
        "Zhang et al., Fixup initialization, ICLR 2019 (residual nets without norms)",
        "Measured with gradflow on encoders of 2 to 18 layers (docs/residual.md)",
    ),
    phase="both",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.body = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, x):
        return self.norm(x + self.body(x))


model = nn.Sequential(nn.Linear(64, 64), *[Block() for _ in range(12)], nn.Linear(64, 10))
example_inputs = torch.randn(64, 64)
""",
    healthy_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.body = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, x):
        return x + self.body(self.norm(x))


model = nn.Sequential(
    nn.Linear(64, 64), *[Block() for _ in range(12)], nn.LayerNorm(64), nn.Linear(64, 10)
)
example_inputs = torch.randn(64, 64)
""",
    check=check,
)
