"""GF206: the gradient hardly takes the branches of a trained stream."""

from __future__ import annotations

from collections.abc import Iterator

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules.gain import number
from gradflow.rules.rule import Rule, Threshold, in_force
from gradflow.rules.sites import Sites, in_order, label, place
from gradflow.stream_profile import StreamProfile, stream_profiles
from gradflow.trace_model import Trace

LIMIT = Threshold(
    key="depth",
    name="D_eff / (H_{L+1} - 1) below",
    value=0.5,
    severity=Severity.INFO,
    source="engineering choice: half of what unit-variance branches behind a norm give; measured at "
    "initialisation 1.0 to 1.3 for pre-norm and 3 for batch-normalised residual nets",
)
FEWEST = 8
"""A shorter stream has no depth to lose."""
SHOWN = 5
WHY = (
    "Most of the gradient passes by the branches: the layers in them learn little from it, and the model behaves "
    "like a shallower one"
)
HINT = (
    "Leave the weakest branches out one by one (gradflow anatomy --ablate) before believing it; then train a "
    "shallower model, or scale the branches of deep blocks up"
)


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield one finding for each stream of a trained model whose effective depth is far below the usual."""
    if not trace.run.trained:
        return
    limit = in_force(RULE, config).only("depth")
    for stream in stream_profiles(trace):
        if stream.parent is not None or stream.measured < FEWEST or stream.effective_depth is None:
            continue
        share = stream.effective_depth / stream.normalised_depth
        if share < limit.value:
            yield _finding(trace, stream, stream.effective_depth, share, limit)


def _finding(trace: Trace, stream: StreamProfile, depth: float, share: float, limit: Threshold) -> Finding:
    chosen = set(stream.sites)
    sites = tuple(site for site in in_order(trace) if site.order in chosen)
    return Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=limit.severity,
        location=place(sites),
        message=(
            f"A path of the gradient takes {number(depth)} of {stream.measured} branches (D_eff), "
            f"{number(share)} of the {number(stream.normalised_depth)} of unit-variance branches behind a norm "
            f"(info below {number(limit.value)}); weakest: {_weakest(sites)}"
        ),
        why=WHY,
        hint=HINT,
        value=share,
        threshold=limit.value,
        evidence=(
            ("effective_depth", depth),
            ("branches", stream.measured),
            ("depth_share", depth / stream.measured),
            ("normalised_depth", stream.normalised_depth),
            ("unnormalised_depth", stream.unnormalised_depth),
        ),
    )


def _weakest(sites: Sites) -> str:
    known = sorted((s.path_share, s.order, s) for s in sites if s.path_share is not None)
    return ", ".join(f"{label(site, sites)} {number(share)}" for share, _, site in known[:SHOWN])


RULE = Rule(
    code="GF206",
    slug="diminishing-depth",
    summary="The gradient hardly takes the branches: the model is shallower than it looks.",
    meaning=(
        "Looks at how the gradient of each residual site splits between skip and branch, and adds up the "
        "branches' shares of its energy: D_eff, the mean number of branches that a path of the gradient takes. It "
        "is compared with what theory knows of L branches of unit variance behind a norm, H_{L+1} - 1, about "
        "ln L.\n\n"
        "It is info and nothing more: gradients that take few branches are normal (of a ResNet-110 most come "
        "through 10 to 34 layers), and only leaving a branch out says what it is worth."
    ),
    formula=(
        "D_eff = sum_b s_b,   s_b = ||F_b^T d||^2 / (||S_b^T d||^2 + ||F_b^T d||^2)\n"
        "      = sum_b r_b^2 / (1 + r_b^2) for bare skips, r_b = ||F_b^T d|| / ||d||\n"
        "baseline H_{L+1} - 1 = 1/2 + 1/3 + ... + 1/(L + 1); for branches as large as their skip it is L / 2"
    ),
    why=WHY + ".",
    hint=HINT + ".",
    thresholds=(LIMIT,),
    exemptions=(
        "Models at initialisation: there D_eff follows from the scale of the weights, and zero-initialised "
        "branches have none. GF201 speaks of small branches there.",
        f"Streams with fewer than {FEWEST} measured sites, and streams inside a branch.",
        "Sites whose gradient was not split (`split_note` says why).",
    ),
    sources=(
        "Veit et al., Residual networks behave like ensembles of relatively shallow networks, NeurIPS 2016",
        "Sun et al., The curse of depth in large language models, 2025",
    ),
    phase="trained",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        for layer in (self.body[1], self.body[3]):
            nn.init.normal_(layer.weight, std=0.05)

    def forward(self, x):
        return x + self.body(x)


model = nn.Sequential(nn.Linear(64, 64), *[Block() for _ in range(16)], nn.LayerNorm(64), nn.Linear(64, 10))
example_inputs = torch.randn(64, 64)
trained = True  # gradflow inspect model.py --trained
""",
    healthy_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        for layer in (self.body[1], self.body[3]):
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, x):
        return x + self.body(x)


model = nn.Sequential(nn.Linear(64, 64), *[Block() for _ in range(16)], nn.LayerNorm(64), nn.Linear(64, 10))
example_inputs = torch.randn(64, 64)
trained = True  # gradflow inspect model.py --trained
""",
    check=check,
)
