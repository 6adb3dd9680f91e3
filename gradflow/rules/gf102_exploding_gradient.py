"""GF102: the gradient grows on its way back along the trunk."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradflow.config import Config
from gradflow.findings import Finding, Location, Severity
from gradflow.rules.gain import (
    along_every_trunk,
    between,
    evidence,
    exceeded,
    half,
    is_noise,
    labels,
    module_types,
    number,
    per_layer,
    trunk_range,
)
from gradflow.rules.rule import Limits, Rule, Threshold, in_force
from gradflow.trace_model import Trace, Trunk
from gradflow.trunk_profile import TrunkProfile, drops, gradient_ends, profile

LIMITS = (
    Threshold(
        key="gain",
        name="gain J above",
        value=20.0,
        severity=Severity.INFO,
        source="measured: of 32 small nets that both Adam and SGD trained the largest J is 35",
    ),
    Threshold(
        key="gain",
        name="gain J above",
        value=1e2,
        severity=Severity.WARNING,
        source="AutoTrainer's beta_3 is 70 (ICSE 2021), there a ratio of parameter gradients",
    ),
    Threshold(
        key="gain",
        name="gain J above",
        value=1e5,
        severity=Severity.ERROR,
        source="measured: un-normalised residual nets at 2e4 to 5e4 still train with Adam",
    ),
)

NORMALISED_RESIDUAL = Threshold(
    key="normalised-gain",
    name="gain J of batch-normalised residual blocks before training above",
    value=1e4,
    severity=Severity.WARNING,
    source="measured: ResNet-50, -101 and -152 as torchvision initialises them have 96, 503 and 1904, and J is "
    "below 1 after 20 steps",
)
"""Stands in for the warning of LIMITS there."""

PLAIN = Threshold(
    key="plain-gain",
    name="gain J of layers without skips and without batch normalisation above",
    value=1e4,
    severity=Severity.ERROR,
    source="calibration on 88 small nets: all above it failed with Adam and with SGD; gradflow's trainability grid, "
    "tuned half: the same for one at 1.0e4, while one at 2.2e3 trains with Adam",
)
"""Stands in for the error of LIMITS there: batch normalisation relaxes in a few steps, and skips help Adam."""

CHAOTIC = Threshold(
    key="chaotic-gain",
    name="gain J of layers without skips before training, where samples lose what they had in common, above",
    value=40.0,
    severity=Severity.WARNING,
    source="gradflow's trainability grid, tuned half: two nets of 48 layer-normalised layers at 50 and 54 fail with "
    "both optimizers, one at 29 that keeps it trains with both",
)
DECORRELATED = Threshold(
    key="decorrelated",
    name="common mode of the last tensor over that of the first (which is above 0.2), below",
    value=0.1,
    severity=Severity.WARNING,
    source="gradflow's trainability grid, tuned half: 0.04 in those two nets, 0.85 in the same of 24 layers, which "
    "trains",
)
COMMON_AT_FIRST = 0.2
"""Inputs with less in common have nothing to lose: centred data, and all behind a batch normalisation."""

WHY = (
    "One learning rate cannot serve both ends: steps small enough for the layers near the input leave the "
    "layers near the loss where they are, and larger ones diverge"
)
BATCH_NORM_HINT = (
    "Measure again after 20 training steps (--checkpoint): batch normalisation without skips explodes 1.21 a "
    "layer at initialisation and relaxes in the first steps; residual connections remove it for good"
)
TRAINED_BATCH_NORM_HINT = (
    "Add residual connections: batch normalisation without skips multiplies the gradient"
)
RESIDUAL_HINT = (
    "Normalise the input of each branch (pre-norm), scale each branch by 1/sqrt(number of blocks), or start "
    "its last layer at zero: un-normalised adds double the variance block by block"
)
FORWARD_HINT = (
    "Lower the initial weights: nn.init.kaiming_normal_ for ReLU, nn.init.xavier_normal_ for tanh and linear "
    "layers, or add a normalisation; clip the gradient norm meanwhile"
)
BACKWARD_HINT = (
    "Lower the weights' standard deviation towards 1/sqrt(fan_in): the activations hide the excess going "
    "forward and the backward shows it (chaotic regime); residual connections help too"
)


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield at most one finding of the trace's trunk, at the rise where one explains the growth."""
    trunk, summary = trace.trunk, profile(trace.trunk)
    limit = exceeded(_limits(trace, in_force(RULE, config)), summary.gain, below=False)
    if limit is None or _last_is_zero(trunk):
        return
    if limit.severity is not Severity.ERROR and is_noise(trunk, summary.gain):
        return
    first, last = labels(trunk, *(gradient_ends(trunk) or (0, 0)))
    yield Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=limit.severity,
        location=_place(trunk, summary),
        message=(
            f"The gradient grows {number(summary.gain)}-fold from {last} back to {first} "
            f"({limit.severity} above {number(limit.value)}){per_layer(summary)}"
            + _cause_in_words(trunk, summary)
        ),
        why=WHY,
        hint=_hint(trace, summary),
        value=summary.gain,
        threshold=limit.value,
        evidence=(*evidence(trunk, summary), ("batch_norm", int(trunk.batch_norm))),
    )


def _limits(trace: Trace, limits: Limits) -> tuple[Threshold, ...]:
    trunk, usual = trace.trunk, limits["gain"]
    if trunk.kind == "residual" and trunk.batch_norm and not trace.run.trained:
        return _replaced(usual, limits.only("normalised-gain"))
    if trunk.kind != "weights" or trunk.batch_norm:
        return usual
    plain = _replaced(usual, limits.only("plain-gain"))
    chaotic = not trace.run.trained and _is_chaotic(trunk, limits.only("decorrelated").value)
    return (*plain, limits.only("chaotic-gain")) if chaotic else plain


def _replaced(limits: tuple[Threshold, ...], other: Threshold) -> tuple[Threshold, ...]:
    return tuple(other if limit.severity is other.severity else limit for limit in limits)


def _is_chaotic(trunk: Trunk, share: float) -> bool:
    """Tell whether like samples become unlike on their way (Poole et al., 2016): their gradients then do too."""
    modes = [point.activation.common_mode for point in trunk.points if point.activation is not None]
    known = [mode for mode in modes if mode is not None]
    return len(known) > 1 and known[0] > COMMON_AT_FIRST and known[-1] < share * known[0]


def _last_is_zero(trunk: Trunk) -> bool:
    """An infinite ratio to a zero is not growth: the last tensor is then not on the way to the loss."""
    ends = gradient_ends(trunk)
    return ends is not None and trunk.points[ends[1]].gradient_norm == 0


def _place(trunk: Trunk, summary: TrunkProfile) -> Location:
    rises = [(1 / drop, k, after) for drop, k, after in drops(trunk) if 0 < drop < math.inf]
    rise, *pair = max(rises, default=(1.0, 0, 0))
    if rise > 10 and math.log(rise) >= 0.5 * math.log(summary.gain):
        return between(trunk, *pair)
    return trunk_range(trunk)


def _plain_batch_norm(trunk: Trunk) -> bool:
    return trunk.batch_norm and trunk.kind != "residual"


def _cause_in_words(trunk: Trunk, summary: TrunkProfile) -> str:
    if _plain_batch_norm(trunk):
        return "; batch normalisation without skips multiplies it by about 1.21 a layer at initialisation"
    kept = "" if math.isnan(summary.signal_gain) else f" (×{number(summary.signal_gain)})"
    return {
        "forward": f"; the signal grows alike going forward{kept}",
        "backward": f"; the signal does not grow alike going forward{kept}: the growth is in the backward",
        "": "",
    }[half(trunk, summary.gain)]


def _hint(trace: Trace, summary: TrunkProfile) -> str:
    trunk = trace.trunk
    if _plain_batch_norm(trunk):
        return TRAINED_BATCH_NORM_HINT if trace.run.trained else BATCH_NORM_HINT
    if trunk.kind == "residual":
        return RESIDUAL_HINT
    backward = half(trunk, summary.gain) == "backward" or "Tanh" in module_types(trace)
    return BACKWARD_HINT if backward else FORWARD_HINT


RULE = Rule(
    code="GF102",
    slug="exploding-gradient",
    summary="The gradient grows on its way back along the trunk.",
    meaning=(
        "Looks at the same number as GF101 from the other side: how many times larger the gradient is at the "
        "first tensor of the trunk than at the last.\n\n"
        "The message names the half that is responsible: the signal grows alike going forward (weights too "
        "large), or only the backward grows (a chaotic tanh net, whose activations stay bounded).\n\n"
        "Plain batch-norm nets without skips are named as such: they explode 1.21 a layer at initialisation "
        "and relax after the first steps, so measure them again after 20.\n\n"
        "Layers without skips are judged more strictly: at a tenth of the usual limit they are an error where no batch "
        "normalisation relaxes them, and a warning comes sooner where samples that began alike end up unlike (the "
        "chaotic phase: gradients of neighbours then point anywhere, whatever their size)."
    ),
    formula="J = g_0 / g_K, g_k = sqrt(mean over samples of ‖dL/dh_k‖²), L2 over everything but the batch",
    why=WHY + ".",
    hint=f"{FORWARD_HINT}. {BATCH_NORM_HINT}.",
    thresholds=(*LIMITS, NORMALISED_RESIDUAL, PLAIN, CHAOTIC, DECORRELATED),
    exemptions=(
        "A net whose ln J is below 3 standard deviations of finite-width noise, 0.5·sqrt(5·sum 1/n_k): "
        "no info and no warning, only an error stays.",
        "A last tensor whose gradient is exactly zero: the ratio to it is not growth.",
        "A gradient that is NaN is left to GF104; one that is Inf exceeds every limit here.",
    ),
    sources=(
        "Yang et al., A mean field theory of batch normalization, ICLR 2019",
        "Poole et al., Exponential expressivity in deep neural networks through transient chaos, 2016",
        "Zhang et al., AutoTrainer, ICSE 2021 (beta_3)",
        "Hanin and Nica, Products of many large random matrices and gradients in deep neural networks, 2019",
    ),
    phase="both",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)
layers = []
for _ in range(30):
    linear = nn.Linear(128, 128)
    nn.init.normal_(linear.weight, std=4.0 / 128**0.5)
    layers += [linear, nn.Tanh()]
model = nn.Sequential(*layers, nn.Linear(128, 10))
example_inputs = torch.randn(64, 128)
""",
    healthy_example="""\
import torch
from torch import nn

torch.manual_seed(0)
layers = []
for _ in range(30):
    linear = nn.Linear(128, 128)
    nn.init.normal_(linear.weight, std=(1.76 / 128) ** 0.5)
    nn.init.normal_(linear.bias, std=0.05**0.5)
    layers += [linear, nn.Tanh()]
model = nn.Sequential(*layers, nn.Linear(128, 10))
example_inputs = torch.randn(64, 128)
""",
    check=along_every_trunk(check),
)
