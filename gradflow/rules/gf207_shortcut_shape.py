"""GF207: the add of a residual broadcasts one of its operands."""

from __future__ import annotations

from collections.abc import Iterator

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules.rule import Rule, Threshold
from gradflow.rules.sites import Sites, by, in_order, place, subject
from gradflow.trace_model import Trace

LIMIT = Threshold(
    name="residual adds that broadcast the stream in a dimension other than the batch, above",
    value=0,
    severity=Severity.WARNING,
    source="engineering choice; it is the silent form of a shape error",
)
WHY = (
    "The add repeats the smaller tensor along that dimension without a word: (N, 1) + (N, N) mixes every "
    "sample's value into all others, or one value into every feature, and no block was meant to do that"
)
HINT = (
    "Give both operands the same shape: unsqueeze or keepdim in one place too many or too few, a last layer "
    "with 1 output, or a shortcut that needs a projection (nn.Linear, a 1x1 convolution)"
)


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield one finding for each line that adds so, with all its sites."""
    everything = in_order(trace)
    found = [site for site in everything if site.broadcast]
    for group in by(lambda site: (site.source or site.like or site.name,), found):
        yield _finding(group, everything)


def _finding(group: Sites, everything: Sites) -> Finding:
    shape = "×".join(map(str, group[0].shape))
    verb = "is" if len(group) == 1 else "are"
    return Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=LIMIT.severity,
        location=place(group),
        message=(
            f"{subject('stream', group, everything)} {verb} broadcast to {shape} by the add (warning above 0)"
        ),
        why=WHY,
        hint=HINT,
        value=float(len(group)),
        threshold=LIMIT.value,
        evidence=(("sites", len(group)), ("shape", shape)),
    )


RULE = Rule(
    code="GF207",
    slug="shortcut-shape",
    summary="The add of a residual broadcasts the stream.",
    meaning=(
        "Looks at every add of a tensor and a branch of it. Both operands of a residual have the same "
        "shape. Where they do not and torch can broadcast them, the add runs, its result is larger than "
        "the stream, and the network is another one than was written."
    ),
    formula="shape(x + F(x)) differs from shape(x) in a dimension other than the first",
    why=WHY + ".",
    hint=HINT + ".",
    thresholds=(LIMIT,),
    exemptions=(
        "Adds of a bias, a position, a mask or any other tensor that is no branch of the stream.",
        "Broadcasting along the batch: a state or a token shared by all samples.",
    ),
    sources=("The broadcasting semantics of the PyTorch documentation",),
    phase="both",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.narrow = nn.Linear(64, 1)
        self.branch = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x):
        x = self.narrow(x)
        return x + self.branch(x)


model = nn.Sequential(nn.Linear(64, 64), Gate(), nn.Linear(64, 10))
example_inputs = torch.randn(64, 64)
""",
    healthy_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x):
        return x + self.branch(x)


model = nn.Sequential(nn.Linear(64, 64), Block(), nn.Linear(64, 10))
example_inputs = torch.randn(64, 64)
""",
    check=check,
)
