"""GF105: gradients too small for float16, which become zero."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules.gain import exceeded
from gradflow.rules.rule import Rule, Threshold, in_force
from gradflow.rules.units import percent
from gradflow.rules.updates import PROBE, JudgedUpdate, grouped
from gradflow.trace_model import ParameterRecord, Trace

LIMITS = (
    Threshold(
        key="underflow",
        name="share of gradients that underflow, above",
        value=0.05,
        severity=Severity.WARNING,
        source="engineering choice; Micikevicius et al. 2018 lose accuracy when 5% fall below 2^-24",
    ),
    Threshold(
        key="underflow",
        name="share of gradients that underflow, above",
        value=0.5,
        severity=Severity.ERROR,
        source="engineering choice: most of the weight gets no gradient",
    ),
)

WHY = (
    "float16 has no number between 0 and 2^-24 = 6e-8: a smaller gradient becomes zero, and what it would have "
    "taught is lost without a trace"
)
HINT = (
    "Scale the loss (torch.amp.GradScaler), use bfloat16, whose range is that of float32, or sum where the loss is "
    "averaged over very many elements"
)


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield one finding for each run of neighbouring modules of one severity."""
    if trace.run.loss == PROBE:
        return
    limits = in_force(RULE, config)["underflow"]
    weights = (p for p in trace.parameters if len(p.shape) > 1)
    judged = [item for p in weights if (item := _judge(p, limits)) is not None]
    yield from grouped(RULE, judged, trace)


def _judge(parameter: ParameterRecord, limits: Sequence[Threshold]) -> JudgedUpdate | None:
    share = parameter.underflow
    limit = None if share is None else exceeded(limits, share, below=False)
    if share is None or limit is None:
        return None
    return JudgedUpdate(
        parameter=parameter,
        severity=limit.severity,
        clause="underflow",
        value=share,
        threshold=limit.value,
        words=(
            f"{percent(share)} of the gradient's elements are zero here and not when the loss is larger "
            f"({limit.severity} above {percent(limit.value)}): they are too small for float16"
        ),
        why=WHY,
        hint=HINT,
        badness=share,
    )


RULE = Rule(
    code="GF105",
    slug="low-precision-underflow",
    summary="Gradients are too small for float16 and become zero.",
    meaning=(
        "Where a model runs in float16, as a whole or under torch.autocast, the same forward and backward are run "
        "again from a loss that is 4,096 times larger (64 times where that overflows). Of the elements of each "
        "weight's gradient that are then not zero, those that were zero before had underflowed.\n\n"
        "The loss is taken as it is: scaled by the file's own loss, it is judged with that scale. An overflow, on "
        "the other side of the range, is an infinity and GF104's or GF303's. bfloat16 has the range of float32; "
        "what it loses are updates (GF402)."
    ),
    formula="underflow = #{j: g_j = 0 and g_j(2^12·L) != 0} / #{j: g_j(2^12·L) != 0}",
    why=WHY + ".",
    hint=HINT + ".",
    thresholds=LIMITS,
    exemptions=(
        "Without a loss (the probe): the gradient has no scale then.",
        "Parameters of one dimension; gradients that overflow even at 64 times the loss.",
        "Elements that are zero at any scale: dead units, unseen rows, masks.",
    ),
    sources=("Micikevicius et al., Mixed precision training, ICLR 2018",),
    phase="both",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).half()
example_inputs = (0.02 * torch.randn(64, 64)).half()


def loss(outputs, inputs):
    return 5e-4 * (outputs.float() - 1).square().mean()
""",
    healthy_example="""\
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).half()
example_inputs = (0.02 * torch.randn(64, 64)).half()


def loss(outputs, inputs):
    return (outputs.float() - 1).square().mean()
""",
    check=check,
)
