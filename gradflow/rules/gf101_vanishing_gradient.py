"""GF101: the gradient is lost on its way back along the trunk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gradflow.config import Config
from gradflow.findings import Finding, Location, Severity
from gradflow.rules.gain import (
    LARGEST_LOG,
    Verdict,
    along_every_trunk,
    between,
    evidence,
    exceeded,
    half,
    is_noise,
    labels,
    layer_gain,
    module_types,
    number,
    per_layer,
    positions,
    runs_along_time,
    trunk_range,
)
from gradflow.rules.rule import Limits, Rule, Threshold, in_force
from gradflow.trace_model import Trace, Trunk
from gradflow.trunk_profile import (
    TrunkProfile,
    drops,
    gradient_ends,
    log_gradients,
    profile,
    theil_sen,
)

SLOPE_TENSORS = 3

GAIN_LIMITS = (
    Threshold(
        key="gain",
        name="gain J below",
        value=0.02,
        severity=Severity.INFO,
        source="measured: the smallest J of 32 small nets that both Adam and SGD trained is 0.012",
    ),
    Threshold(
        key="gain",
        name="gain J below",
        value=1e-3,
        severity=Severity.WARNING,
        source="AutoTrainer's beta_1 (ICSE 2021), there a ratio of parameter gradients; "
        "measured: 31 of 31 nets below it fail with Adam or with SGD",
    ),
    Threshold(
        key="gain",
        name="gain J below",
        value=1e-5,
        severity=Severity.ERROR,
        source="measured: all nets below it fail with both Adam and SGD",
    ),
)
LOST_GAIN = Threshold(
    key="lost-gain",
    name="gain J, where the signal is lost too, below",
    value=3e-5,
    severity=Severity.ERROR,
    source="gradflow's trainability grid, tuned half: with 600 steps Adam still trains a net at 1e-4 whose signal is "
    "lost, and nothing those at 2e-6 and below",
)
LOST_SIGNAL = Threshold(
    key="lost-signal",
    name="signal over size of the last tensor, c/f, below",
    value=1e-3,
    severity=Severity.ERROR,
    source="nets outside the grid: of five that lose the gradient, those whose c/f is 1.3e-3 and 3e-3 train with Adam",
)
"""Both must be exceeded."""
SLOPE_LIMIT = Threshold(
    key="slope",
    name=f"gain of one layer exp(s), over at least {SLOPE_TENSORS} tensors, below",
    value=0.27,
    severity=Severity.WARNING,
    source="between the bound of the sigmoid, 0.25, and a default-initialised GELU net, 0.289",
)
DROP_LIMITS = (
    Threshold(
        key="drop",
        name="drop in one layer D above",
        value=10.0,
        severity=Severity.WARNING,
        source="engineering choice; the largest drop seen in a healthy net is 2.8",
    ),
    Threshold(
        key="drop",
        name="drop in one layer D above",
        value=1e3,
        severity=Severity.ERROR,
        source="engineering choice",
    ),
)

WHY = (
    "The layers near the input learn from what is left, far slower than the layers near the loss; "
    "SGD does not move them, and Adam moves them by noise"
)
RELU_HINT = (
    "Initialise with nn.init.kaiming_normal_(weight, nonlinearity='relu') (the default of nn.Linear keeps "
    "0.41 a layer), add a normalisation, or give the layers residual connections"
)
SIGMOID_HINT = (
    "Replace the sigmoids between layers by ReLU or GELU with He initialisation "
    "(nn.init.kaiming_normal_), or add residual connections: a sigmoid passes at most 0.25 of the gradient"
)
TANH_HINT = (
    "Initialise with nn.init.xavier_normal_(weight, gain=5/3), keep the inputs near unit variance so tanh "
    "does not saturate, or add a normalisation or residual connections"
)
RESIDUAL_HINT = (
    "Keep the skip path free of anything that shrinks it: normalise inside the branch (pre-norm) instead of "
    "after the add, and take factors below 1 and activations off the skip"
)
TIME_HINT = (
    "Time is a separate axis from depth, and a recurrent net loses long-range gradient by default: if it "
    "must remember that far, start the forget gate's bias at 1 or more, or shorten the sequence"
)
TIME_WORDS = "; along time, over repeated calls of one module, where this is usual"
LOST_WORDS = " where samples have become alike"
ZERO_HINT = (
    "Find what returns zeros there: an activation that is dead for every sample, an all-zero weight, "
    "a product with 0, a mask over everything, or an underflow of the dtype"
)


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield at most one finding of the trunk: the worst of three clauses, at the drop where one explains the loss."""
    trunk, summary, limits = trace.trunk, profile(trace.trunk), in_force(RULE, config)
    drop = _worst_drop(trunk)
    clauses = (
        _zero(trace, drop),
        _gain(trunk, summary, _gain_limits(trunk, limits)),
        _slope(trunk, summary, limits.only("slope")),
        _drop(trunk, drop, limits["drop"]),
    )
    verdicts = [verdict for verdict in clauses if verdict is not None]
    if not verdicts:
        return
    worst = max(verdicts, key=lambda verdict: verdict.severity.rank)
    along_time = runs_along_time(trace)
    zero_weight = math.isinf(drop[0]) and _starts_at_zero(trace, trunk.points[drop[2]].name)
    severity = Severity.INFO if along_time or zero_weight else worst.severity
    place = between(trunk, *drop[1:]) if _explains(drop, worst, summary) else trunk_range(trunk)
    yield Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=severity,
        location=place,
        message=worst.words + (TIME_WORDS if along_time else _half_in_words(trunk, summary)),
        why=WHY,
        hint=TIME_HINT if along_time else _hint(trace, summary, place, drop),
        value=worst.value,
        threshold=worst.threshold,
        evidence=evidence(trunk, summary) + ((("axis", "time"),) if along_time else ()),
    )


def _gain_limits(trunk: Trunk, limits: Limits) -> tuple[Threshold, ...]:
    """The limits of J; where biases hold up what no longer differs between samples, Adam cannot amplify either."""
    last = trunk.points[-1].activation if trunk.points else None
    lost = (
        last is not None
        and last.signal is not None
        and last.rms
        and last.signal / last.rms < limits.only("lost-signal").value
    )
    return (*limits["gain"], limits.only("lost-gain")) if lost else limits["gain"]


def _gain(trunk: Trunk, summary: TrunkProfile, limits: Sequence[Threshold]) -> Verdict | None:
    limit = exceeded(limits, summary.gain, below=True)
    if limit is None or (limit.severity is not Severity.ERROR and is_noise(trunk, summary.gain)):
        return None
    first, last = labels(trunk, *(gradient_ends(trunk) or (0, 0)))
    words = (
        f"Of the gradient at {last}, {number(summary.gain)} is left at {first} ({limit.severity} below "
        f"{number(limit.value)}{LOST_WORDS if limit.key == LOST_GAIN.key else ''}){per_layer(summary)}"
    )
    return Verdict(severity=limit.severity, value=summary.gain, threshold=limit.value, words=words)


def _slope(trunk: Trunk, summary: TrunkProfile, limit: Threshold) -> Verdict | None:
    logs = log_gradients(trunk)
    if len(logs) < SLOPE_TENSORS or is_noise(trunk, summary.gain):
        return None
    # Averaging over positions divides the L2 norm by sqrt(positions) by itself: such layers get that back.
    pooled = -theil_sen([(k, y + 0.5 * math.log(positions(trunk.points[k]))) for k, y in logs])
    gain = math.exp(min(max(summary.slope, pooled), LARGEST_LOG))
    if gain >= limit.value:
        return None
    first, last = labels(trunk, logs[0][0], logs[-1][0])
    words = (
        f"Each layer from {last} back to {first} keeps {number(gain)} of the gradient "
        f"({limit.severity} below {number(limit.value)}), {number(summary.gain)} in all"
    )
    return Verdict(severity=limit.severity, value=gain, threshold=limit.value, words=words)


def _worst_drop(trunk: Trunk) -> tuple[float, int, int]:
    """The largest drop that averaging over positions does not explain; (NaN, 0, 0) where there is none."""
    found = [(drop * _pooling(trunk, k, after), k, after) for drop, k, after in drops(trunk)]
    # A gradient that is zero at one tensor and not before it took another way: nothing was lost there.
    alive = [k for k, point in enumerate(trunk.points) if point.gradient_norm]
    lost = [drop for drop in found if math.isfinite(drop[0]) or drop[1] < min(alive, default=0)]
    return max(lost, key=lambda drop: drop[0], default=(math.nan, 0, 0))


def _pooling(trunk: Trunk, before: int, after: int) -> float:
    return min(1.0, math.sqrt(positions(trunk.points[after]) / positions(trunk.points[before])))


def _drop(trunk: Trunk, drop: tuple[float, int, int], limits: Sequence[Threshold]) -> Verdict | None:
    limit = exceeded(limits, drop[0], below=False)
    if limit is None or math.isinf(drop[0]):
        return None
    if limit.severity is not Severity.ERROR and is_noise(trunk, profile(trunk).gain):
        return None
    before, after = labels(trunk, *drop[1:])
    words = (
        f"The gradient falls {number(drop[0])}-fold from {after} back to {before} "
        f"({limit.severity} above {number(limit.value)} in one layer)"
    )
    return Verdict(severity=limit.severity, value=drop[0], threshold=limit.value, words=words)


def _zero(trace: Trace, drop: tuple[float, int, int]) -> Verdict | None:
    """The clause of a gradient that ends in exact zeros: J is 0 and D infinite."""
    if not math.isinf(drop[0]):
        return None
    before, after = labels(trace.trunk, *drop[1:])
    limit = GAIN_LIMITS[-1]
    words = f"The gradient is exactly 0 at {before} and before it, while {after} still receives one"
    if _starts_at_zero(trace, trace.trunk.points[drop[2]].name):
        words += f": the weight of {after} is all zeros, and the first step may wake it"
    else:
        words += f" ({limit.severity} below {number(limit.value)})"
    return Verdict(severity=limit.severity, value=0.0, threshold=limit.value, words=words)


def _starts_at_zero(trace: Trace, module: str) -> bool:
    weights = [p.norm for p in trace.parameters if p.module == module and len(p.shape) > 1]
    return bool(weights) and all(norm == 0 for norm in weights)


def _explains(drop: tuple[float, int, int], worst: Verdict, summary: TrunkProfile) -> bool:
    """Tell whether one drop is at least half of the whole loss, so that it is the place to look at."""
    if math.isinf(drop[0]) or worst.value == drop[0]:
        return True
    if not 0 < summary.gain < math.inf:
        return False
    return drop[0] > DROP_LIMITS[0].value and math.log(drop[0]) >= 0.5 * abs(math.log(summary.gain))


def _half_in_words(trunk: Trunk, summary: TrunkProfile) -> str:
    if summary.gain >= 1:
        return ""
    kept = "" if math.isnan(summary.signal_gain) else f" (×{number(summary.signal_gain)})"
    return {
        "forward": f"; the signal fades alike going forward{kept}: the layers' own gain is too small",
        "backward": f"; the signal survives going forward{kept}: the loss is in the backward alone",
        "": "",
    }[half(trunk, summary.gain)]


def _hint(trace: Trace, summary: TrunkProfile, place: Location, drop: tuple[float, int, int]) -> str:
    if math.isinf(drop[0]):
        return ZERO_HINT
    if place != trunk_range(trace.trunk):
        return (
            f"Look at what stands between {place.first or 'the model'} and {place.last or 'the model'}: "
            "a saturated activation, a far too small weight, a constant factor, or an average over positions"
        )
    if trace.trunk.kind == "residual":
        return RESIDUAL_HINT
    types = module_types(trace)
    if "Sigmoid" in types or (not types & {"ReLU", "GELU", "Tanh"} and layer_gain(summary) < 0.25):
        return SIGMOID_HINT
    return TANH_HINT if "Tanh" in types else RELU_HINT


RULE = Rule(
    code="GF101",
    slug="vanishing-gradient",
    summary="The gradient is lost on its way back along the trunk.",
    meaning=(
        "Looks at the gradient along the trunk: the tensors that carry it from the loss back to the input "
        "(outputs of residual adds, or of weight layers where the model has no residual adds). It wants the "
        "first tensor to receive a fair share of what the last one gets.\n\n"
        "Three clauses, the worst one speaks: what is left in all (J, judged more strictly where samples have "
        "become alike too), what one layer keeps (exp(s)), and "
        "the largest loss in one layer (D). Where one drop makes up at least half of the loss, the finding "
        "is there; otherwise it covers the trunk.\n\n"
        "The message names the half that is responsible. Where the signal fades alike going forward, the "
        "layers' own gain (the initialisation) is too small; where it survives, the loss is in the backward "
        "alone: saturation."
    ),
    formula=(
        "g_k = sqrt(mean over samples of ‖dL/dh_k‖²), L2 over everything but the batch; "
        "J = g_0 / g_K; s = minus the Theil-Sen slope of ln g_k in k; D = max_k g_{k+1} / g_k; "
        "ln J = ln(phi_0 / phi_K) + ln(‖h_K‖ / ‖h_0‖), phi = ‖h‖·‖dL/dh‖"
    ),
    why=WHY + ".",
    hint=f"{SIGMOID_HINT}. {RELU_HINT}.",
    thresholds=(*GAIN_LIMITS, LOST_GAIN, LOST_SIGNAL, SLOPE_LIMIT, *DROP_LIMITS),
    exemptions=(
        "A net whose |ln J| is below 3 standard deviations of finite-width noise, 0.5·sqrt(5·sum 1/n_k): "
        "no info and no warning, only an error stays.",
        "What averaging over positions explains by itself: a layer after which the positions shrink P-fold "
        "gets sqrt(P) back in the slope and drop clauses.",
        "The time axis: where most tensors are repeated calls of one module, the finding is info; a default "
        "LSTM over 100 steps keeps 6e-21.",
        "An exact zero behind an all-zero weight (a zero-initialised head): info, the first step ends it.",
        "A tensor with a zero gradient where an earlier one still receives some: the gradient took another "
        "way.",
        "Tensors without a measured gradient are stepped over; NaN and Inf are left to GF104.",
    ),
    sources=(
        "Hanin and Nica, Products of many large random matrices and gradients in deep neural networks, 2019",
        "Schoenholz et al., Deep information propagation, ICLR 2017",
        "Zhang et al., AutoTrainer, ICSE 2021 (beta_1)",
        "He et al., Delving deep into rectifiers, ICCV 2015",
    ),
    phase="both",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)
layers = []
for _ in range(12):
    linear = nn.Linear(128, 128)
    nn.init.xavier_normal_(linear.weight)
    layers += [linear, nn.Sigmoid()]
model = nn.Sequential(*layers, nn.Linear(128, 10))
example_inputs = torch.randn(64, 128)
""",
    healthy_example="""\
import torch
from torch import nn

torch.manual_seed(0)
layers = []
for _ in range(12):
    linear = nn.Linear(128, 128)
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    nn.init.zeros_(linear.bias)
    layers += [linear, nn.ReLU()]
model = nn.Sequential(*layers, nn.Linear(128, 10))
example_inputs = torch.randn(64, 128)
""",
    check=along_every_trunk(check),
)
