"""GF301: units of an activation that are never active, or hardly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules.gain import Evidence, exceeded
from gradflow.rules.rule import Rule, Threshold, in_force
from gradflow.rules.units import LOSS_OF_GRADIENT, Judged, explains_loss, grouped, output_of, percent, subject
from gradflow.trace_model import ActivationRecord, LayerRecord, Trace

ENOUGH_OBSERVATIONS = 298
"""ln 0.05 / ln 0.99."""

ALIGNED = 0.9
"""Above this common-mode fraction units are off because all samples look alike, not because of themselves."""

LIMITS = (
    Threshold(
        key="dead",
        name="share of dead units above",
        value=0.1,
        severity=Severity.INFO,
        source="engineering choice: well-initialised nets have below 5%",
    ),
    Threshold(
        key="dead",
        name="share of dead units above",
        value=0.5,
        severity=Severity.WARNING,
        source="SageMaker Debugger's DeadRelu (50% of the units), TheDeepChecker (0.5)",
    ),
    Threshold(
        key="dead",
        name="share of dead units above",
        value=0.95,
        severity=Severity.ERROR,
        source="engineering choice: what is left cannot carry a layer",
    ),
)

WHY = "A dead unit passes no gradient, so nothing brings it back: its weights stay as they are for good"
SHIFTED_HINT = (
    "Start the biases in front of it at 0 (or slightly above), lower the learning rate if it died in training, "
    "or use nn.LeakyReLU or nn.GELU, whose units can come back"
)
DORMANT_HINT = (
    "Check the initialisation of the layer in front of it: some rows of its weight are far smaller than the "
    "others; normalise its input, or reinitialise the dormant units"
)


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield one finding for each run of activations of one severity."""
    limits = in_force(RULE, config)["dead"]
    found = (_judge(record, trace.layers, limits) for record in trace.activations)
    judged = [item for item in found if item is not None]
    for location, members in grouped(judged, trace):
        worst = max(members, key=lambda item: item.share)
        few = worst.record.inactive is not None and worst.record.observations < ENOUGH_OBSERVATIONS
        yield Finding(
            rule=RULE.code,
            slug=RULE.slug,
            severity=worst.severity,
            location=location,
            message=(
                f"{percent(worst.share)} of the {worst.record.units} units are {_state(worst.record)} in "
                f"{subject(members)} {str(location) or 'the model'}{' at worst' if len(members) > 1 else ''} "
                f"({worst.limit.severity} above {percent(worst.limit.value)})"
                + (_bound(worst.record) if few else "")
                + worst.because
            ),
            why=WHY,
            hint=DORMANT_HINT if worst.record.inactive is None else SHIFTED_HINT,
            value=worst.share,
            threshold=worst.limit.value,
            evidence=_evidence(worst.record, members, trace),
        )


def dead_share(record: ActivationRecord) -> float | None:
    """Return the share of dead units, or None where it cannot be told.

    Of a rectifier with 298 observations or more it is the inactive units, with fewer the sunk ones; of
    another activation the dormant ones. One that saturates on both sides is GF302's, except for units that
    hardly move at all.
    """
    if record.inactive is not None:
        return record.inactive if record.observations >= ENOUGH_OBSERVATIONS else record.sunk
    return record.dormant


def _judge(
    record: ActivationRecord, layers: Sequence[LayerRecord], limits: Sequence[Threshold]
) -> Judged | None:
    share = dead_share(record)
    limit = None if share is None else exceeded(limits, share, below=False)
    if share is None or limit is None:
        return None
    severity, because = limit.severity, ""
    if severity is not Severity.ERROR and _is_aligned(record, layers):
        severity = Severity.INFO
        because = "; the samples look alike here, so what is off for one is off for all"
    elif record.inactive is None and record.is_gate:
        severity, because = Severity.INFO, "; it is a gate, and a gate may be shut"
    return Judged(record=record, share=share, limit=limit, severity=severity, because=because)


def _is_aligned(record: ActivationRecord, layers: Sequence[LayerRecord]) -> bool:
    """Tell whether the samples agree so much that a unit is off for all or for none.

    Where the output has no row of its own, as many units that are always on as are off say the same.
    """
    if record.inactive is None:
        return False
    statistics = output_of(record, layers)
    if statistics is not None and statistics.common_mode is not None:
        return statistics.common_mode > ALIGNED
    return record.always_active is not None and record.always_active >= 0.5 * record.inactive


def _state(record: ActivationRecord) -> str:
    if record.inactive is None:
        return "dormant (at most a tenth of the layer's mean size)"
    if record.observations >= ENOUGH_OBSERVATIONS:
        return "dead (active in less than 1% of what they see)"
    return "dead (never active, and 4 standard deviations below)"


def _bound(record: ActivationRecord) -> str:
    return (
        f"; with {record.observations} observations an activity above {percent(3 / record.observations)} "
        "is ruled out, one of 1% only from 298"
    )


def _evidence(record: ActivationRecord, members: Sequence[Judged], trace: Trace) -> Evidence:
    facts = (
        ("op", record.op),
        ("cause", LOSS_OF_GRADIENT if explains_loss(trace, members) else None),
        ("activations", len(members)),
        ("units", record.units),
        ("observations", record.observations),
        ("inactive", record.inactive),
        ("always_active", record.always_active),
        ("sunk", record.sunk),
        ("dormant", record.dormant),
    )
    return tuple((name, fact) for name, fact in facts if fact is not None)


RULE = Rule(
    code="GF301",
    slug="dead-units",
    summary="Units of an activation are dead: never active, or hardly.",
    meaning=(
        "Looks at every unit (channel or feature) of every nonlinearity, over all samples and positions. A "
        "unit of a rectifier (ReLU and its like) is dead when it is active in less than 1% of what it sees. "
        "That takes 298 observations to tell, so with fewer a unit counts only when it was never active and "
        "its pre-activations lie 4 of their own standard deviations below 0.\n\n"
        "Other activations have no exact zero: there a unit is dormant when its mean size is at most a tenth "
        "of the layer's.\n\n"
        "The share of zero elements is not looked at: a healthy ReLU layer is zero in half of them."
    ),
    formula=(
        "dead_j: mean over observations of [h_j > 0] < 0.01; "
        "or, below 298 observations: max z_j <= 0 and mean z_j < -4·sd z_j;\n"
        "dormant_j: E|h_j| / mean over units of E|h| <= 0.1"
    ),
    why=WHY + ".",
    hint=f"{SHIFTED_HINT}. {DORMANT_HINT}.",
    thresholds=LIMITS,
    exemptions=(
        "A layer whose samples look alike (common-mode fraction above 0.9; where it has no row of its own, as "
        "many units that are always on): a unit is then off for all or for none, as in any deep net without "
        "normalisation. Never more than info, unless more than 95% are dead.",
        "Dormant units of a gate (GLU, squeeze-and-excitation) or of the model's output: info at most.",
        "Observations that are all exactly zero before the rectifier: empty slots of an expert, padding.",
        "Rectifiers with fewer than 16 observations, and those fed by nothing with a parameter.",
    ),
    sources=(
        "Lu et al., Dying ReLU and initialization, 2019",
        "Sokar et al., The dormant neuron phenomenon in deep reinforcement learning, ICML 2023",
        "Rauschmayr et al., Amazon SageMaker Debugger, MLSys 2021",
        "Ben Braiek and Khomh, Testing feedforward neural networks training programs, TOSEM 2023",
    ),
    phase="both",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)
layers = []
for _ in range(3):
    linear = nn.Linear(128, 128)
    nn.init.kaiming_normal_(linear.weight)
    nn.init.zeros_(linear.bias)
    layers += [linear, nn.ReLU()]
nn.init.constant_(layers[2].bias[:125], -20.0)
model = nn.Sequential(*layers, nn.Linear(128, 10))
example_inputs = torch.randn(512, 128)
""",
    healthy_example="""\
import torch
from torch import nn

torch.manual_seed(0)
layers = []
for _ in range(3):
    linear = nn.Linear(128, 128)
    nn.init.kaiming_normal_(linear.weight)
    nn.init.zeros_(linear.bias)
    layers += [linear, nn.ReLU()]
model = nn.Sequential(*layers, nn.Linear(128, 10))
example_inputs = torch.randn(512, 128)
""",
    check=check,
)
