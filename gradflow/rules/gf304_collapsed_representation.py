"""GF304: samples, or tokens, become alike on their way through the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules.gain import Evidence, between, exceeded, labels, number
from gradflow.rules.rule import Limits, Rule, Threshold, in_force
from gradflow.rules.units import percent
from gradflow.trace_model import ParameterRecord, Trace, TrunkPoint

COLLAPSE = "collapse"
"""The ``kind`` in the evidence of all but mixed tokens: those are lost whatever becomes of the gradient."""
FEWEST_SAMPLES = 8
"""Of fewer samples the mean itself holds more than a tenth of what they are."""

LIMITS = (
    Threshold(
        key="common-mode",
        name="common-mode fraction above",
        value=0.95,
        severity=Severity.INFO,
        source="measured: a He-initialised ReLU net of 48 layers is at 0.96",
    ),
    Threshold(
        key="common-mode",
        name="signal lost, and common-mode fraction above",
        value=0.99,
        severity=Severity.WARNING,
        source="measured: residual sigmoid nets sit at 0.994 to 0.9996 with their signal kept, and train",
    ),
)
LOST_SIGNAL = Threshold(
    key="lost-signal",
    name="common-mode fraction above its warning limit, and signal gain c_K/c_0 below",
    value=1e-2,
    severity=Severity.WARNING,
    source="engineering choice: a normalisation no longer tells it from rounding in half precision",
)
CONSTANT = Threshold(
    key="constant",
    name="signal over size, c/f, at most",
    value=1e-6,
    severity=Severity.WARNING,
    source="rounding of float32",
)
MIXED = Threshold(
    key="mixed-tokens",
    name="similarity of the tokens at the last tensor and at the first, where each token is asked, below",
    value=0.01,
    severity=Severity.ERROR,
    source="gradflow's trainability grid, tuned half: the eight text models below it from all three seeds fail with "
    "both optimizers (so do all thirteen of the other half); with skips it is above 0.3, but for the largest weights",
)
ZERO = Threshold(
    name="largest activation, at most",
    value=0.0,
    severity=Severity.ERROR,
    source="exact",
)

WHY = "What has become alike cannot be told apart again: the layers behind see one input, whatever comes in"
HINT = (
    "Add residual connections or normalisation before the nonlinearity, or raise the initial weights "
    "(nn.init.kaiming_normal_ for ReLU): each layer now keeps more of the mean than of the differences"
)
TOKEN_HINT = (
    "Restore the skips around attention, or lower its share of the stream (pre-norm, smaller value and output "
    "weights): attention averages tokens, and only the skip keeps them apart"
)
MIXED_WHY = (
    "Each token is asked for an answer of its own, and what it was is not there to answer from: an output like that "
    "is learnt from averages alone"
)
MIXED_HINT = (
    "Restore the skips around attention (x + attention(norm(x))), or make them weigh more: without one each attention "
    "replaces a token by an average of all it sees"
)
CONSTANT_HINT = "Find what makes it so from here on: zero weights, units that are all dead or saturated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One number a tensor, along the trunk, over samples or over tokens."""

    over: str
    """"samples" or "tokens"."""
    points: tuple[int, ...]
    """Positions on the trunk that were measured."""
    common: tuple[float, ...]
    signal: tuple[float, ...]

    @property
    def kept(self) -> float:
        """c_K / c_0; 1 where there was nothing to lose."""
        return self.signal[-1] / self.signal[0] if self.signal[0] > 0 else 1.0


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield at most one finding: a dead end before lost tokens before a collapse, the worse axis of two."""
    limits = in_force(RULE, config)
    ended = _zero(trace) or _constant(trace, limits.only("constant"))
    if ended is not None:
        yield ended
        return
    found = _mixed(trace, limits.only("mixed-tokens")) or [
        finding for axis in axes(trace) if (finding := _collapse(trace, axis, limits)) is not None
    ]
    if found:
        yield max(found, key=lambda finding: (finding.severity.rank, finding.value or 0.0))


def axes(trace: Trace) -> tuple[Axis, ...]:
    """The trunk seen over samples and over tokens; without those that were not measured or too few."""
    points = trace.trunk.points
    found = []
    if trace.run.batch_size >= FEWEST_SAMPLES:
        found.append(_axis("samples", [_over_samples(point) for point in points]))
    found.append(_axis("tokens", [(point.token_common_mode, point.token_signal) for point in points]))
    return tuple(axis for axis in found if len(axis.points) > 1)


def _over_samples(point: TrunkPoint) -> tuple[float | None, float | None]:
    return (point.activation.common_mode, point.activation.signal) if point.activation else (None, None)


def _axis(over: str, numbers: Sequence[tuple[float | None, float | None]]) -> Axis:
    known = [
        (k, c, s) for k, (c, s) in enumerate(numbers) if c is not None and s is not None and c == c and s == s
    ]
    return Axis(
        over=over,
        points=tuple(k for k, _, _ in known),
        common=tuple(c for _, c, _ in known),
        signal=tuple(s for _, _, s in known),
    )


def _collapse(trace: Trace, axis: Axis, limits: Limits) -> Finding | None:
    common, kept, lost = axis.common[-1], axis.kept, limits.only("lost-signal").value
    some, most = sorted(limits["common-mode"], key=lambda limit: limit.severity.rank)
    limit = exceeded((some, most), common, below=False)
    if limit is not None and limit.severity is Severity.WARNING and kept >= lost:
        limit = some
    if limit is None or axis.common[0] > some.value:
        return None
    start = next(k for k, c in zip(axis.points, axis.common, strict=True) if c > some.value)
    first, _ = labels(trace.trunk, axis.points[0], axis.points[-1])
    return Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=Severity.INFO if trace.run.trained else limit.severity,
        location=between(trace.trunk, start, axis.points[-1]),
        message=(
            f"{percent(common)} of the last tensor is common to all {axis.over} ({limit.severity} above "
            f"{percent(limit.value)}{' where the signal is lost' if limit is most else ''}); what "
            f"differs is {number(kept)} times what it was at {first} (lost below {number(lost)})"
        ),
        why=WHY,
        hint=TOKEN_HINT if axis.over == "tokens" else HINT,
        value=common,
        threshold=limit.value,
        evidence=_evidence(axis),
    )


def _evidence(axis: Axis) -> Evidence:
    return (
        ("kind", COLLAPSE),
        ("over", axis.over),
        ("common_mode", axis.common[-1]),
        ("first_common_mode", axis.common[0]),
        ("signal_gain", axis.kept),
        ("tensors", len(axis.points)),
    )


def _mixed(trace: Trace, limit: Threshold) -> list[Finding]:
    """What was told of tokens at the beginning and is not at the end, though they may well differ."""
    kept, trunk = trace.trunk.token_geometry, trace.trunk
    if kept is None or kept >= limit.value or not _asks_each_token(trace):
        return []
    first, last = labels(trunk, 0, len(trunk.points) - 1)
    return [
        Finding(
            rule=RULE.code,
            slug=RULE.slug,
            severity=Severity.INFO if trace.run.trained else limit.severity,
            location=between(trunk, 0, len(trunk.points) - 1),
            message=(
                f"Which token is which is lost from {first} to {last}: tokens that are alike at the one are not at "
                f"the other (agreement {number(max(kept, 0.0))} of 1; {limit.severity} below {number(limit.value)}), "
                "and the output has one answer for each token"
            ),
            why=MIXED_WHY,
            hint=MIXED_HINT,
            value=kept,
            threshold=limit.value,
            evidence=(("over", "tokens"), ("token_geometry", kept), ("tensors", len(trunk.points))),
        )
    ]


def _asks_each_token(trace: Trace) -> bool:
    """Tell whether the tokens of the trunk's first tensor are those that the output has an answer for.

    Of two token streams, as an encoder's and a decoder's, nobody said that they are the same tokens; and a model that
    squeezes a sequence into one vector and writes it out again means to.
    """
    tokens = {point.shape[:2] for point in trace.trunk.points}
    outputs = {row.shape[:2] for row in trace.layers if row.name == "" and len(row.shape) > 2}
    return not trace.side_trunks and len(tokens) == 1 and tokens <= outputs


def _zero(trace: Trace) -> Finding | None:
    points = trace.trunk.points
    for k, point in enumerate(points):
        if point.activation is None or point.activation.absmax != 0 or 0 in point.shape:
            continue
        opened = _opens_by(point, trace.parameters)
        opening = f"; {opened} starts at zero and gets a gradient, so it will open" if opened else ""
        return _ended(
            trace,
            k,
            ZERO,
            f"Every element of what {_name(trace, k)} carries is exactly 0{opening}",
            Severity.INFO if opened else Severity.ERROR,
        )
    return None


def _opens_by(point: TrunkPoint, parameters: Sequence[ParameterRecord]) -> str:
    """The zero-initialised weight that makes a tensor zero and is going to change, or ""."""
    own = (p for p in parameters if p.module == point.name and len(p.shape) > 1)
    return next((p.name for p in own if p.norm == 0 and p.gradient_norm), "")


def _constant(trace: Trace, limit: Threshold) -> Finding | None:
    """The first tensor that all samples share although those before it differed."""
    if trace.run.batch_size < FEWEST_SAMPLES:
        return None
    shares = [_signal_share(point) for point in trace.trunk.points]
    if not shares or shares[0] is None or shares[0] <= limit.value:
        return None
    for k, share in enumerate(shares):
        if share is not None and share <= limit.value:
            severity = Severity.INFO if trace.run.trained else Severity.WARNING
            count = trace.run.batch_size
            what = f"{_name(trace, k)} carries the same for all {count} samples: c/f is {number(share)}"
            return _ended(trace, k, limit, what, severity, share)
    return None


def _signal_share(point: TrunkPoint) -> float | None:
    found = point.activation
    return found.signal / found.rms if found and found.signal is not None and found.rms else None


def _name(trace: Trace, k: int) -> str:
    return labels(trace.trunk, k, k)[0].partition("#")[0]


def _ended(
    trace: Trace, k: int, limit: Threshold, what: str, severity: Severity, value: float = 0.0
) -> Finding:
    return Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=severity,
        location=between(trace.trunk, k, len(trace.trunk.points) - 1),
        message=f"{what} ({limit.severity} at {number(limit.value)} and below)",
        why=WHY,
        hint=CONSTANT_HINT,
        value=value,
        threshold=limit.value,
        evidence=(
            ("kind", COLLAPSE),
            ("over", "samples"),
            ("tensor", k),
            ("tensors", len(trace.trunk.points)),
        ),
    )


RULE = Rule(
    code="GF304",
    slug="collapsed-representation",
    summary="Samples, or tokens, become alike on their way through the model.",
    meaning=(
        "Looks at each tensor of the trunk and asks how much of it is common to all samples, and, where it "
        "is shaped (batch, tokens, features), to all tokens of a sample. What is left is the signal: all "
        "that later layers can tell inputs apart by.\n\n"
        "A large common part alone is no fault: sigmoid nets and trained language models live with it. It "
        "is one where the signal has gone as well, to less than a hundredth of what it was at the first "
        "tensor.\n\n"
        "Tokens can also be lost while they still differ: attention without skips gives each an average of all "
        "it sees, and soon none is told by what it was. Where the output has an answer for each token, gradflow "
        "compares which tokens are alike at the last tensor with which were at the first, and says error where "
        "the two have nothing in common.\n\n"
        "Where the gradient is lost too (GF101), that is the cause named first: the two are one fault seen "
        "from both sides."
    ),
    formula=(
        "common-mode fraction = ‖mean_i h‖² / mean_i ‖h‖², i over samples or tokens; "
        "signal c = RMS over units of the standard deviation over i; signal gain = c_K / c_0; f = RMS of h; "
        "similarity = linear CKA of T_0 and T_K over tokens, each place centred over the samples, by the unbiased "
        "estimate of HSIC from up to 1024 tokens"
    ),
    why=WHY + ".",
    hint=f"{HINT}. {TOKEN_HINT}. {MIXED_HINT}. {CONSTANT_HINT}.",
    thresholds=(*LIMITS, LOST_SIGNAL, CONSTANT, MIXED, ZERO),
    exemptions=(
        "After training (--trained) all but an exact zero is info: trained language models are anisotropic.",
        "A common-mode fraction above 0.99 whose signal is kept: info.",
        "Inputs that are alike already at the first tensor.",
        "Fewer than 8 samples, for samples; fewer than 8 tokens, for tokens.",
        "Mixed tokens: one answer for the whole sequence; more than one token stream (encoder and decoder); a "
        "sequence that is squeezed into one vector on the way; fewer than 128 tokens or 4 samples in all.",
        "A tensor that is zero because its own weight starts at zero and gets a gradient: info.",
        "Tensors off the trunk: a positional embedding is the same for all samples.",
    ),
    sources=(
        "Poole et al., Exponential expressivity in deep neural networks through transient chaos, 2016",
        "Dong et al., Attention is not all you need: pure attention loses rank doubly exponentially, ICML 2021",
        "Noci et al., Signal propagation in transformers: theoretical perspectives and the role of rank "
        "collapse, NeurIPS 2022",
        "Kornblith et al., Similarity of neural network representations revisited, ICML 2019: linear CKA",
        "Song et al., Supervised feature selection via dependence estimation, ICML 2007: the unbiased estimate",
    ),
    phase="both",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = (64, 64, 64, 10)
        linears = [nn.Linear(a, b, bias=False) for a, b in zip(sizes, sizes[1:])]
        self.first, self.second, self.head = linears
        for linear in linears:
            nn.init.xavier_normal_(linear.weight)

    def forward(self, x):
        x = x.to(torch.uint8).float()  # pixels in 0..1 become 0
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


model = Net()
example_inputs = torch.rand(64, 64)
""",
    healthy_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = (64, 64, 64, 10)
        linears = [nn.Linear(a, b, bias=False) for a, b in zip(sizes, sizes[1:])]
        self.first, self.second, self.head = linears
        for linear in linears:
            nn.init.xavier_normal_(linear.weight)

    def forward(self, x):
        x = 2 * x - 1
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


model = Net()
example_inputs = torch.rand(64, 64)
""",
    check=check,
)
