"""GF402: updates that are rounded away, because the weight is kept in half precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules.gain import exceeded
from gradflow.rules.rule import Rule, Threshold, in_force
from gradflow.rules.units import percent
from gradflow.rules.updates import JudgedUpdate, grouped, matrices
from gradflow.trace_model import ParameterRecord, Trace

LIMITS = (
    Threshold(
        key="lost",
        name="share of lost updates above",
        value=0.5,
        severity=Severity.WARNING,
        source="engineering choice: most of the weight does not move",
    ),
    Threshold(
        key="lost",
        name="share of lost updates above",
        value=0.99,
        severity=Severity.ERROR,
        source="engineering choice: the weight does not learn; in bfloat16 it is all of it at a relative "
        "update of 1e-3, which is what one aims for",
    ),
)

WHY = (
    "An update that is smaller than half the distance to the next number is rounded away, in this step and in "
    "every one after it: the weight stays where it is although its gradient is not zero"
)
HINT = (
    "Keep the weights in float32 and compute in half precision (torch.autocast), use an optimizer with a float32 "
    "copy or with stochastic rounding, or raise the learning rate"
)


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield one finding for each run of neighbouring weights of one severity."""
    limits = in_force(RULE, config)["lost"]
    judged = [item for p in matrices(trace) if (item := _judge(p, limits)) is not None]
    yield from grouped(RULE, judged, trace)


def _judge(parameter: ParameterRecord, limits: Sequence[Threshold]) -> JudgedUpdate | None:
    share = parameter.update_lost
    limit = None if share is None else exceeded(limits, share, below=False)
    if share is None or limit is None:
        return None
    return JudgedUpdate(
        parameter=parameter,
        severity=limit.severity,
        clause="lost",
        value=share,
        threshold=limit.value,
        words=(
            f"{percent(share)} of the elements with a gradient are the same after a step, rounded back to what "
            f"they were in {parameter.dtype} ({limit.severity} above {percent(limit.value)})"
        ),
        why=WHY,
        hint=HINT,
        badness=share,
    )


RULE = Rule(
    code="GF402",
    slug="lost-update",
    summary="Weights in half precision stay as they are: their updates are rounded away.",
    meaning=(
        "Runs one true step of the optimizer, on a model and an optimizer that are put back afterwards, and "
        "counts the elements of each float16 and bfloat16 weight that have a gradient and did not change.\n\n"
        "A sum is rounded back to w when |dw| <= 2^-9·|w| in bfloat16 and 2^-12·|w| in float16 (for w at the "
        "lower end of its binade half of that again).\n\n"
        "Without an optimizer (make_optimizer(model) in the file, optimizer= in Python) this is not checked."
    ),
    formula="lost = #{j: g_j != 0 and w'_j == w_j} / #{j: g_j != 0}",
    why=WHY + ".",
    hint=HINT + ".",
    thresholds=LIMITS,
    exemptions=(
        "Weights in float32 or float64, those under torch.autocast among them.",
        "Parameters of one dimension, those that start at zero, and groups with a learning rate of 0.",
        "Without a loss (the probe) the gradient has no scale: only optimizers that do not scale with it are judged.",
    ),
    sources=(
        "Micikevicius et al., Mixed precision training, ICLR 2018: a float32 copy of the weights",
        "Zamirai et al., Revisiting BFloat16 training, 2020: lost updates, stochastic rounding",
    ),
    phase="both",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
for linear in model[::2]:
    signs = linear.weight.detach().sign()
    linear.weight.data = signs * torch.empty(64, 64).uniform_(0.08, 0.2)
model.bfloat16()
example_inputs = torch.randn(64, 64).bfloat16()


def loss(outputs, inputs):
    return (outputs - inputs).square().mean()


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=2e-5)
""",
    healthy_example="""\
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
for linear in model[::2]:
    signs = linear.weight.detach().sign()
    linear.weight.data = signs * torch.empty(64, 64).uniform_(0.08, 0.2)
example_inputs = torch.randn(64, 64)


def loss(outputs, inputs):
    return (outputs - inputs).square().mean()


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=2e-5)
""",
    check=check,
)
