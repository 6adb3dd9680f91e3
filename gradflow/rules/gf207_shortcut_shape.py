"""GF207: the operands of a residual add have two shapes: it fails, or it broadcasts the stream."""

from __future__ import annotations

from collections.abc import Iterator

from gradflow.config import Config
from gradflow.failed_add import FailedAdd, Shape, advice, sentence
from gradflow.findings import Finding, Location, Severity
from gradflow.rules.rule import Rule, Threshold
from gradflow.rules.sites import Sites, by, in_order, place, subject
from gradflow.trace_model import Trace

FAILED_LIMIT = Threshold(
    name="residual adds that fail for their shapes, above",
    value=0,
    severity=Severity.ERROR,
    source="it raises: nothing can be trained",
)
LIMIT = Threshold(
    name="residual adds that broadcast the stream in a dimension other than the batch, above",
    value=0,
    severity=Severity.WARNING,
    source="engineering choice; it is the silent form of a shape error",
)
FAILED_WHY = "A residual add needs one shape on both sides: the model cannot run"
FAILED_HINT = "Give the skip a projection to the branch's shape (the finding writes it out)"
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


def failed_add_finding(failed: FailedAdd) -> Finding:
    """Say of a model that raised at a residual add what any other finding says of one that ran."""
    facts = (
        ("skip", _words(failed.skip_shape)),
        ("branch", _words(failed.branch_shape)),
        ("source", failed.source),
        ("changed_by", ", ".join(change.name for change in failed.changes)),
        ("projection", failed.projection),
    )
    return Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=FAILED_LIMIT.severity,
        location=Location(first=failed.name),
        message=sentence(failed),
        why=FAILED_WHY,
        hint=advice(failed),
        evidence=tuple((name, fact) for name, fact in facts if fact),
    )


def _words(shape: Shape) -> str:
    return "×".join(map(str, shape))


def _finding(group: Sites, everything: Sites) -> Finding:
    shape = _words(group[0].shape)
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
    summary="Skip and branch have two shapes: the add fails, or broadcasts the stream.",
    meaning=(
        "Looks at every add of a tensor and a branch of it. Both operands of a residual have the same "
        "shape. Where they do not and torch cannot broadcast them, the model raises: exit code 3, with the "
        "block, both shapes, the layer that changed the shape, and the projection that would mend it. That "
        "layer is found by walking back from the add, dimension by dimension, to where the size began; a "
        "bottleneck whose 3x3 strides and whose last 1x1 widens has two.\n\n"
        "Where torch can broadcast them, the add runs, its result is larger than the stream, and the "
        "network is another one than was written: a warning."
    ),
    formula=(
        "shape(x) and shape(F(x)) cannot be added; or shape(x + F(x)) differs from shape(x) in a dimension "
        "other than the first"
    ),
    why=f"{FAILED_WHY}. Where torch broadcasts: {WHY[0].lower()}{WHY[1:]}.",
    hint=f"{FAILED_HINT}. Where torch broadcasts: {HINT[0].lower()}{HINT[1:]}.",
    thresholds=(FAILED_LIMIT, LIMIT),
    exemptions=(
        "Adds of a bias, a position, a mask or any other tensor that is no branch of the stream.",
        "Broadcasting along the batch: a state or a token shared by all samples.",
        "Any other add that fails: two towers, two inputs, a mask. The model's own error is shown as it is.",
    ),
    sources=(
        "He et al., Deep residual learning for image recognition, CVPR 2016 (projection shortcuts, section 3.3)",
        "The broadcasting semantics of the PyTorch documentation",
    ),
    phase="both",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x):
        branch = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(branch)))


model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Block(16, 16, 1), Block(16, 32, 2))
example_inputs = torch.randn(8, 3, 16, 16)
""",
    healthy_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x):
        branch = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.shortcut(x) + self.norm2(self.conv2(branch)))


model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Block(16, 16, 1), Block(16, 32, 2))
example_inputs = torch.randn(8, 3, 16, 16)
""",
    check=check,
)
