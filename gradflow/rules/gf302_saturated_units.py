"""GF302: a tanh or a sigmoid that is driven to its ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules.gain import Evidence, exceeded
from gradflow.rules.rule import Rule, Threshold, in_force
from gradflow.rules.units import LOSS_OF_GRADIENT, Judged, explains_loss, grouped, percent, subject
from gradflow.trace_model import ActivationRecord, ResidualRecord, Trace

LIMITS = (
    Threshold(
        key="saturated",
        name="share of saturated elements above",
        value=0.25,
        severity=Severity.INFO,
        source="engineering choice: pre-activations of standard deviation 2.2 under a tanh",
    ),
    Threshold(
        key="saturated",
        name="share of saturated elements above",
        value=0.5,
        severity=Severity.WARNING,
        source="DeepDiagnosis (ICSE 2022): half of the elements",
    ),
    Threshold(
        key="saturated",
        name="share of saturated elements above",
        value=0.9,
        severity=Severity.ERROR,
        source="engineering choice: standard deviation 20 under a tanh",
    ),
)

EDGES = {"tanh": "2.5", "sigmoid": "5"}

WHY = (
    "Where it is saturated an activation passes less than 2.7% of its largest slope: the layers before it "
    "learn from the few elements in between"
)
HINT = (
    "Scale the input to unit variance, lower the weights in front of it (nn.init.xavier_normal_ with the gain of "
    "the activation), or put a normalisation before it"
)


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield one finding for each run of activations of one severity."""
    limits = in_force(RULE, config)["saturated"]
    judged = [item for record in trace.activations if (item := _judge(record, limits, trace)) is not None]
    for location, members in grouped(judged, trace):
        worst = max(members, key=lambda item: item.share)
        stuck = worst.record.stuck or 0.0
        yield Finding(
            rule=RULE.code,
            slug=RULE.slug,
            severity=worst.severity,
            location=location,
            message=(
                f"{percent(worst.share)} of the elements are saturated{_edge(worst.record)} in "
                f"{subject(members)} {str(location) or 'the model'}{' at worst' if len(members) > 1 else ''} "
                f"({worst.limit.severity} above {percent(worst.limit.value)})"
                + (f"; {percent(stuck)} of the units never leave one side" if stuck else "")
                + worst.because
            ),
            why=WHY,
            hint=HINT,
            value=worst.share,
            threshold=worst.limit.value,
            evidence=_evidence(worst.record, members, trace),
        )


PASSED_BY = {Severity.ERROR: Severity.WARNING, Severity.WARNING: Severity.INFO, Severity.INFO: Severity.INFO}
"""Of what a bare skip leads past."""


def _judge(record: ActivationRecord, limits: Sequence[Threshold], trace: Trace) -> Judged | None:
    share = record.saturated
    limit = None if share is None else exceeded(limits, share, below=False)
    if share is None or limit is None:
        return None
    if record.is_gate:
        because = "; it is a gate or the model's output, and may be sure of itself"
        return Judged(record=record, share=share, limit=limit, severity=Severity.INFO, because=because)
    if limit.severity is not Severity.INFO and _is_passed_by(record, trace.residuals):
        because = "; it is in a branch, and the skip carries signal and gradient past it"
        severity = PASSED_BY[limit.severity]
        return Judged(record=record, share=share, limit=limit, severity=severity, because=because)
    return Judged(record=record, share=share, limit=limit, severity=limit.severity)


def _is_passed_by(record: ActivationRecord, sites: Sequence[ResidualRecord]) -> bool:
    """Tell whether an activation stands in the branch of a bare skip, and not on the sum."""
    return any(
        site.kind == "identity"
        and bool(site.name)
        and record.op in site.branch_ops
        and record.op != site.activation_after
        and f"{record.name}.".startswith(f"{site.name}.")
        for site in sites
    )


def _edge(record: ActivationRecord) -> str:
    edge = EDGES.get(record.op, EDGES["sigmoid"])
    return f" (|z| above {edge})"


def _evidence(record: ActivationRecord, members: Sequence[Judged], trace: Trace) -> Evidence:
    facts = (
        ("op", record.op),
        ("cause", LOSS_OF_GRADIENT if explains_loss(trace, members) else None),
        ("activations", len(members)),
        ("units", record.units),
        ("observations", record.observations),
        ("stuck", record.stuck),
        ("is_gate", int(record.is_gate)),
    )
    return tuple((name, fact) for name, fact in facts if fact is not None)


RULE = Rule(
    code="GF302",
    slug="saturated-units",
    summary="A tanh or a sigmoid is driven to its flat ends.",
    meaning=(
        "Looks at the elements of every tanh and sigmoid whose slope is below 2.7% of the largest: |z| above "
        "2.5 under a tanh, above 5 under a sigmoid (tanh z = 2·sigmoid(2z) - 1, so these are the same "
        "place).\n\n"
        "Elements are counted, not units: pre-activations of mean zero and large variance make each unit "
        "flip between its ends, and no single unit looks stuck. How many units never leave one side is told "
        "beside it.\n\n"
        "For pre-activations N(0, s²) the share is 2(1 - Phi(2.5/s)) under a tanh: 41% at s = 3, 75% at "
        "s = 8."
    ),
    formula="share of elements with |z| > 2.5 (tanh) or |z| > 5 (sigmoid)",
    why=WHY + ".",
    hint=HINT + ".",
    thresholds=LIMITS,
    exemptions=(
        "Gates (what multiplies another stream: GLU, squeeze-and-excitation, highway, tanh-form GELU) and "
        "the model's output: info at most.",
        "In a branch beside a bare skip: a severity less. On gradflow's trainability grid (tuned half) the three "
        "residual tanh nets with more than half of the elements saturated train with Adam and with SGD.",
        "The gates inside nn.LSTM and nn.GRU, which run in one fused op.",
    ),
    sources=(
        "Glorot and Bengio, Understanding the difficulty of training deep feedforward neural networks, 2010",
        "Wardat et al., DeepDiagnosis, ICSE 2022",
        "Rakitianskaia and Engelbrecht, Measuring saturation in neural networks, 2015",
    ),
    phase="both",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
for linear in model[::2]:
    nn.init.xavier_normal_(linear.weight)
example_inputs = 40 * torch.randn(256, 64)
""",
    healthy_example="""\
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
for linear in model[::2]:
    nn.init.xavier_normal_(linear.weight)
example_inputs = torch.randn(256, 64)
""",
    check=check,
)
