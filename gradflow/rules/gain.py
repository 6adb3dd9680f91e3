"""What the two gain rules share: the ends of J, its two halves, its noise, and the axis of the trunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from gradflow.config import Config
from gradflow.findings import Finding, Location, Severity
from gradflow.rules.rule import Threshold
from gradflow.trace_model import Coverage, Trace, Trunk, TrunkPoint
from gradflow.trunk_profile import TrunkProfile, gradient_ends, pair_labels

NOISE_DEVIATIONS = 3.0
"""|ln J| below this many standard deviations is what a finite width does by chance."""

LARGEST_LOG = 700.0
"""exp of more than this is no float."""

RECURRENT_OPS = ("lstm", "gru", "rnn")

Evidence = tuple[tuple[str, float | int | str], ...]
Check = Callable[[Trace, Config], Iterator[Finding]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One clause that was exceeded: how bad, by which number, against which limit, in words."""

    severity: Severity
    value: float
    threshold: float
    words: str


def along_every_trunk(check: Check) -> Check:
    """Ask a check of the trunk, then of each trunk beside it; a finding of those says on which path it is."""

    def check_all(trace: Trace, config: Config) -> Iterator[Finding]:
        yield from check(trace, config)
        for side in trace.side_trunks:
            for finding in check(replace(trace, trunk=side), config):
                yield replace(
                    finding,
                    message=f"{finding.message} (on the path {side.path})",
                    evidence=(*finding.evidence, ("path", side.path)),
                )

    return check_all


def number(value: float) -> str:
    """Three digits, the way a person reads them."""
    return f"{value:.3g}"


def exceeded(limits: Sequence[Threshold], value: float, *, below: bool) -> Threshold | None:
    """Return the worst limit that ``value`` is strictly beyond, or None."""
    beyond = [limit for limit in limits if (value < limit.value if below else value > limit.value)]
    return max(beyond, key=lambda limit: limit.severity.rank, default=None)


def trunk_range(trunk: Trunk) -> Location:
    """From the first measured tensor to the last."""
    first, last = gradient_ends(trunk) or (0, len(trunk.points) - 1)
    return between(trunk, first, last)


def between(trunk: Trunk, first: int, last: int) -> Location:
    """From tensor ``first`` to tensor ``last``, by their modules' fully qualified names."""
    return Location(first=trunk.points[first].name, last=trunk.points[last].name)


def labels(trunk: Trunk, first: int, last: int) -> tuple[str, str]:
    """Name two tensors for a sentence; a root without a name is "the model"."""
    start, end = pair_labels(trunk, first, last)
    return start or "the model", end or "the model"


def is_noise(trunk: Trunk, gain: float) -> bool:
    """Tell whether a finite width alone explains J.

    For a He-initialised ReLU net ln J has the standard deviation 0.5·sqrt(5·sum_k 1/n_k) (Hanin and Nica,
    2019), n_k the widths of the tensors that the gradient arrives at. Widths that are unknown add nothing.
    """
    return 0 < gain < math.inf and abs(math.log(gain)) < NOISE_DEVIATIONS * noise_deviation(trunk)


def noise_deviation(trunk: Trunk) -> float:
    """The standard deviation of ln J by finite width; 0 where no width is known."""
    ends = gradient_ends(trunk)
    arrived = trunk.points[ends[0] : ends[1]] if ends else ()
    return 0.5 * math.sqrt(5 * sum(1 / point.width for point in arrived if point.width > 0))


def positions(point: TrunkPoint) -> float:
    """How many positions (pixels, tokens) a tensor has a sample; 1 where the width is unknown."""
    if point.width <= 0 or len(point.shape) < 2 or 0 in point.shape:
        return 1.0
    return max(1.0, math.prod(point.shape) / (point.shape[0] * point.width))


def runs_along_time(trace: Trace) -> bool:
    """Tell whether most tensors are repeated calls of one module: the axis is then time, not depth."""
    calls = {layer.order: layer.call for layer in trace.layers}
    seen: set[str] = set()
    repeats = 0
    for point in trace.trunk.points:
        called_again = point.layer is not None and calls.get(point.layer, 0) > 0
        recurrent = point.op.startswith(RECURRENT_OPS) and point.name in seen
        repeats += called_again or recurrent
        seen.add(point.name)
    return 2 * repeats > len(trace.trunk.points)


def module_types(trace: Trace) -> frozenset[str]:
    """The class names of all modules that ran."""
    return frozenset(layer.type for layer in trace.layers if layer.coverage is not Coverage.NEVER_CALLED)


def per_layer(summary: TrunkProfile) -> str:
    """What one layer keeps, as the end of a sentence; nothing where no slope is defined."""
    return "" if math.isnan(summary.slope) else f", {number(layer_gain(summary))} a layer"


def layer_gain(summary: TrunkProfile) -> float:
    """The gradient's gain of one layer going back; NaN where no slope is defined."""
    return math.exp(min(summary.slope, LARGEST_LOG))


def signal_log_gain(trunk: Trunk) -> float:
    """ln of the L2 norm of the centred signal, last tensor over first; NaN where it was not measured."""
    return _log_growth(trunk, [p.activation.signal if p.activation else None for p in trunk.points])


def activation_log_gain(trunk: Trunk) -> float:
    """ln(‖h_K‖ / ‖h_0‖), the forward half of ln J; NaN where it was not measured."""
    return _log_growth(trunk, [p.activation.rms if p.activation else None for p in trunk.points])


def _log_growth(trunk: Trunk, sizes: Sequence[float | None]) -> float:
    ends = gradient_ends(trunk)
    if ends is None:
        return math.nan
    first, last = sizes[ends[0]], sizes[ends[1]]
    elements = [math.prod(trunk.points[k].shape) for k in ends]
    if first is None or last is None or not (0 < first < math.inf and 0 <= last < math.inf) or 0 in elements:
        return math.nan
    return math.log(last) - math.log(first) + 0.5 * math.log(elements[1] / elements[0]) if last else -math.inf


def half(trunk: Trunk, gain: float) -> str:
    """Name the half of ln J = ln(phi_0/phi_K) + ln(‖h_K‖/‖h_0‖), phi = ‖h‖·‖d‖, that is responsible.

    The forward half is judged by the centred signal where it was measured: biases hold ‖h‖ up after the
    signal has died.

    Returns:
        "forward", "backward", or "" where the activations were not measured or J is 0, 1 or not finite.
    """
    forward = signal_log_gain(trunk)
    if math.isnan(forward):
        forward = activation_log_gain(trunk)
    if math.isnan(forward) or gain == 1 or not 0 < gain < math.inf:
        return ""
    return "forward" if forward / math.log(gain) >= 0.5 else "backward"


def evidence(trunk: Trunk, profile: TrunkProfile) -> Evidence:
    """Every number behind a gain finding; what was not measured is left out."""
    forward = activation_log_gain(trunk)
    log_gain = math.log(profile.gain) if 0 < profile.gain < math.inf else math.nan
    facts: Evidence = (
        ("gain", profile.gain),
        ("gain_per_layer", layer_gain(profile)),
        ("largest_drop", profile.largest_drop),
        ("largest_drop_at", profile.largest_drop_at),
        ("signal_gain", profile.signal_gain),
        ("ln_forward_half", forward),
        ("ln_backward_half", log_gain - forward),
        ("responsible_half", half(trunk, profile.gain)),
        ("noise_deviation", noise_deviation(trunk)),
        ("tensors", len(trunk.points)),
    )
    return tuple((name, fact) for name, fact in facts if fact == fact and fact != "")
