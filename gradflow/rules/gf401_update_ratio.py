"""GF401: a step of the optimizer that moves a weight far too little or too much, or an eps that swallows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules.gain import exceeded, number
from gradflow.rules.rule import Limits, Rule, Threshold, in_force
from gradflow.rules.updates import ENOUGH_STEPS, PROBE, JudgedUpdate, grouped, matrices
from gradflow.trace_model import ParameterRecord, Trace

SMALL = (
    Threshold(
        key="small",
        name="update ratio below",
        value=1e-4,
        severity=Severity.WARNING,
        source="TheDeepChecker (log10 of -4 to -1); CS231n asks for about 1e-3",
    ),
    Threshold(
        key="small",
        name="update ratio below",
        value=1e-8,
        severity=Severity.ERROR,
        source="SageMaker Debugger's UpdateTooSmall",
    ),
)
LARGE = (
    Threshold(
        key="large",
        name="update ratio above",
        value=0.1,
        severity=Severity.WARNING,
        source="TheDeepChecker (log10 of -4 to -1); CS231n asks for about 1e-3",
    ),
    Threshold(
        key="large",
        name="update ratio above",
        value=10.0,
        severity=Severity.ERROR,
        source="SageMaker Debugger's WeightUpdateRatio",
    ),
)
SWALLOWED = (
    Threshold(
        key="eps",
        name="RMS of the gradient over eps, below",
        value=10.0,
        severity=Severity.WARNING,
        source="r/(1 + r) = 91% of the step is left; Wortsman et al. 2023, Molybog et al. 2023",
    ),
    Threshold(
        key="eps",
        name="RMS of the gradient over eps, below",
        value=1.0,
        severity=Severity.ERROR,
        source="less than half of the step is left, and what is left grows and shrinks with the gradient",
    ),
)

SMALL_WHY = "At this rate the weight moves by its own size only after more than ten thousand steps"
LARGE_WHY = "A step as large as this throws away most of what the weight had learnt"
SWALLOWED_WHY = (
    "Where eps is larger than the gradient, Adam no longer scales its step by the gradient's size: layers with "
    "small gradients stop"
)
SMALL_HINT = (
    "Raise the learning rate, or that of this group; see whether its gradient is lost on the way (GF101)"
)
LARGE_HINT = "Lower the learning rate, warm it up, or clip the gradient"
SWALLOWED_HINT = (
    "Lower eps (1e-8 is the default; 1e-15 does no harm in float32), or average the loss over less"
)


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield one finding for each clause and run of neighbouring weights of one severity."""
    limits = in_force(RULE, config)
    found = (_by_eps(p, trace, limits["eps"]) or _by_ratio(p, trace, limits) for p in matrices(trace))
    judged = [item for item in found if item is not None]
    yield from grouped(RULE, judged, trace)


def _by_eps(parameter: ParameterRecord, trace: Trace, limits: Sequence[Threshold]) -> JudgedUpdate | None:
    r = parameter.gradient_to_eps
    limit = None if r is None or trace.run.loss == PROBE else exceeded(limits, r, below=True)
    if r is None or limit is None:
        return None
    return JudgedUpdate(
        parameter=parameter,
        severity=limit.severity,
        clause="eps",
        value=r,
        threshold=limit.value,
        words=(
            f"the gradient is {number(r)} times {trace.run.optimizer}'s eps ({limit.severity} below "
            f"{limit.value:g}): {number(100 * r / (1 + r))}% of the step is left"
        ),
        why=SWALLOWED_WHY,
        hint=SWALLOWED_HINT,
        badness=-r,
    )


def _by_ratio(parameter: ParameterRecord, trace: Trace, limits: Limits) -> JudgedUpdate | None:
    ratio = parameter.update_ratio
    if ratio is None:
        return None
    small = exceeded(limits["small"], ratio, below=True)
    large = exceeded(limits["large"], ratio, below=False)
    limit = small or large
    if limit is None:
        return None
    side = "below" if small else "above"
    severity, because = limit.severity, ""
    if not trace.run.trained and (trace.run.optimizer_steps or 0) < ENOUGH_STEPS:
        severity = Severity.INFO
        because = (
            f"; after {trace.run.optimizer_steps or 0} steps that says little, --steps {ENOUGH_STEPS} more"
        )
    return JudgedUpdate(
        parameter=parameter,
        severity=severity,
        clause=f"{side} range",
        value=ratio,
        threshold=limit.value,
        words=(
            f"one step of {trace.run.optimizer} changes the weight by {number(ratio)} of its size "
            f"({limit.severity} {side} {limit.value:g}){because}"
        ),
        why=SMALL_WHY if small else LARGE_WHY,
        hint=SMALL_HINT if small else LARGE_HINT,
        badness=-ratio if small else ratio,
    )


RULE = Rule(
    code="GF401",
    slug="update-ratio",
    summary="A step of the optimizer changes a weight far too little or too much, or eps swallows it.",
    meaning=(
        "Runs one true step of the optimizer, on a model and an optimizer that are put back afterwards, and "
        "compares each weight with what it was: a healthy step changes it by about a thousandth of its size. With "
        f"--steps {ENOUGH_STEPS} or more, as many steps come before the one that is measured: the first of Adam "
        "is its learning rate, whatever the gradient, lr·sqrt(3n) for nn.Linear(n, n).\n\n"
        "Adam divides by the gradient's size plus eps. With r the RMS of the gradient over eps, r/(1 + r) of "
        "the step is left.\n\n"
        "Without an optimizer (make_optimizer(model) in the file, optimizer= in Python) this is not checked."
    ),
    formula="U = ‖W_{t+1} - W_t‖ / ‖W_t‖, measured;\nr = RMS(g) / eps over the elements with a gradient",
    why=f"{SMALL_WHY}. {LARGE_WHY}. {SWALLOWED_WHY}.",
    hint=f"{SMALL_HINT}. {LARGE_HINT}. {SWALLOWED_HINT}.",
    thresholds=(*SMALL, *LARGE, *SWALLOWED),
    exemptions=(
        "Parameters of one dimension (biases, norms), those that start at zero, and groups with a learning rate of 0.",
        f"Before {ENOUGH_STEPS} steps of the optimizer the update ratio is info at most, unless --trained says that "
        "the weights come from training; eps is judged at once.",
        "Without a loss (the probe) the gradient has no scale: eps is not judged, nor the update of an optimizer "
        "that scales with it.",
        "An optimizer whose step needs a closure, or that keeps tensors outside its state: not checked, with a note.",
    ),
    sources=(
        "Karpathy et al., CS231n, 2015: ratio of weights to updates",
        "Ben Braiek and Khomh, Testing feedforward neural networks training programs, TOSEM 2023",
        "Rauschmayr et al., Amazon SageMaker Debugger, MLSys 2021",
        "Wortsman et al., Small-scale proxies for large-scale transformer training instabilities, 2023: eps",
        "Molybog et al., A theory on Adam instability in large-scale machine learning, 2023",
    ),
    phase="both",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
example_inputs = torch.randn(64, 64)


def loss(outputs, inputs):
    return (outputs - inputs[:, :10]).square().mean()


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-2)
""",
    healthy_example="""\
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
example_inputs = torch.randn(64, 64)


def loss(outputs, inputs):
    return (outputs - inputs[:, :10]).square().mean()


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)
""",
    check=check,
)
