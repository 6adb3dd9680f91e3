"""GF106: inputs that lie side by side get gradients that have nothing to do with one another."""

from __future__ import annotations

from collections.abc import Iterator

from gradflow.config import Config
from gradflow.findings import Finding, Location, Severity
from gradflow.rules.gain import exceeded, number, trunk_range
from gradflow.rules.rule import Rule, Threshold, in_force
from gradflow.trace_model import Trace

WHY = (
    "A gradient that changes from one input to the next like noise points nowhere: steps taken on one batch say "
    "little about the next, and momentum averages them away"
)
HINT = "Add skips around the layers (x + F(norm(x))), or make the network shallower"


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield one finding for the model, where the second pass was asked for."""
    value = trace.gradient_correlation
    limit = None if value is None else exceeded(in_force(RULE, config)["correlation"], value, below=True)
    if value is None or limit is None:
        return
    yield Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=limit.severity,
        location=trunk_range(trace.trunk) if trace.trunk.points else Location(first=""),
        message=(
            f"the gradients at an input and beside it (noise of a tenth of its RMS) have a cosine of "
            f"{number(value)} ({limit.severity} below {limit.value:g})"
        ),
        why=WHY,
        hint=HINT,
        value=value,
        threshold=limit.value,
        evidence=(("gradient_correlation", value), ("tensors", len(trace.trunk.points))),
    )


RULE = Rule(
    code="GF106",
    slug="shattered-gradient",
    summary="Inputs side by side get gradients that have nothing to do with one another (--shattered).",
    meaning=(
        "With --shattered (shattered=True in Python) the model is run twice more: at its input and at the input "
        "plus noise of a tenth of its RMS, backward from the same random cotangent. C is the mean over samples of "
        "the cosine between the two gradients of the input. Where the input is token numbers, it is what the "
        "embeddings return that is moved.\n\n"
        "Measured at 24 and 50 layers: linear 1 and 1; pre-norm residual .91 and .88; batch-normalised residual "
        ".64 and .56; He-initialised ReLU .57 and .32; plain batch-normalised -.16 and -.06; tanh with weights of "
        "standard deviation 3 .01 and -.03. C depends on the size of the noise: other sizes cannot be compared."
    ),
    formula="C = mean_i cos(dL/dx_i at x, dL/dx_i at x'), x' = x + 0.1·rms(x)·N(0, 1)",
    why=WHY + ".",
    hint=HINT + ".",
    thresholds=(
        Threshold(
            name="gradient correlation C below",
            value=0.5,
            severity=Severity.INFO,
            source="measured: residual nets of 50 layers have 0.56 and more",
            key="correlation",
        ),
        Threshold(
            name="gradient correlation C below",
            value=0.25,
            severity=Severity.WARNING,
            source="measured: He-initialised ReLU nets of 50 layers have 0.32",
            key="correlation",
        ),
    ),
    exemptions=("Without --shattered it is not checked.", "Samples whose gradient is zero or not finite."),
    sources=("Balduzzi et al., The shattered gradients problem, ICML 2017",),
    phase="initialisation",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)
layers = []
for _ in range(16):
    layers += [nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU()]
model = nn.Sequential(*layers, nn.Linear(128, 10))
example_inputs = torch.randn(128, 128)
shattered = True
""",
    healthy_example="""\
import torch
from torch import nn

torch.manual_seed(0)
layers = []
for _ in range(2):
    layers += [nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU()]
model = nn.Sequential(*layers, nn.Linear(128, 10))
example_inputs = torch.randn(128, 128)
shattered = True
""",
    check=check,
)
