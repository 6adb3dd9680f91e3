"""GF403: a batch normalisation whose batch is too small, too uniform, or not what it was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules.gain import Evidence, exceeded, number
from gradflow.rules.places import fold, place_of, runs
from gradflow.rules.rule import Limits, Rule, Threshold, in_force
from gradflow.rules.units import percent
from gradflow.trace_model import ENOUGH_UPDATES, BatchNormRecord, Trace

TOO_FEW_VALUES = "too few values"
"""The ``cause`` in the evidence of a finding that explains a gradient lost in front of it."""

DRIFTS = ("shifted", "narrow", "wide")
DRAWN_INPUTS = ("inferred", "--input")
"""Where the inputs are random numbers, their statistics are not those of any data."""

FEW = (
    Threshold(
        key="values",
        name="values a channel below",
        value=16,
        severity=Severity.WARNING,
        source="the share (m - 2)/m of the gradient's energy that is left is below 88%, and the batch's "
        "statistics are off by 1/sqrt(m) = 25%; Wu and He 2018 measure the loss of accuracy",
    ),
    Threshold(
        key="values",
        name="values a channel below",
        value=3,
        severity=Severity.ERROR,
        source="two values become -1 and 1 whatever they are: (m - 2)/m = 0 of the gradient is left",
    ),
)
LOW_VARIANCE = (
    Threshold(
        key="low-variance",
        name="share of channels with a variance below eps, above",
        value=0.1,
        severity=Severity.INFO,
        source="engineering choice, as for dead units (GF301)",
    ),
    Threshold(
        key="low-variance",
        name="share of channels with a variance below eps, above",
        value=0.5,
        severity=Severity.WARNING,
        source="engineering choice, as for dead units (GF301)",
    ),
)
SHIFTED = Threshold(
    key="shift",
    name="shift of the running mean, in running standard deviations, above",
    value=1.0,
    severity=Severity.WARNING,
    source="engineering choice: half of the channels are then off by as much as they vary",
)
NARROW = Threshold(
    key="narrow",
    name="running over batch standard deviation below",
    value=0.5,
    severity=Severity.WARNING,
    source="engineering choice: a factor of two",
)
WIDE = Threshold(
    key="wide",
    name="running over batch standard deviation above",
    value=2.0,
    severity=Severity.WARNING,
    source="engineering choice: a factor of two",
)
GAP = Threshold(
    key="loss-gap",
    name="loss with running statistics over that with the batch's, less 1, above",
    value=0.5,
    severity=Severity.WARNING,
    source="TheDeepChecker (TOSEM 2023), there a relative gap of either sign between train and eval mode",
)

FEW_WHY = (
    "The batch's own mean and deviation take most of what so few values say, going forward, and the share "
    "2/m of the gradient's energy going back"
)
LOW_WHY = (
    "A channel that does not vary carries no signal, and the normalisation multiplies its noise and its "
    "gradient by up to 1/sqrt(eps)"
)
DRIFT_WHY = "In eval mode the model computes something else than it was trained to"
FROZEN_WHY = "Frozen statistics are usual in fine-tuning; elsewhere a module was left in eval mode"

FEW_HINT = (
    "Give it a larger batch (--batch-size, or in training a larger one for each device), or use nn.GroupNorm or "
    "nn.LayerNorm, which do not look across samples"
)
LOW_HINT = (
    "Find what makes these channels constant: dead units, a zero weight, or an input that does not vary"
)
DRIFT_HINT = (
    "Normalise these inputs as those of the training; else run some training batches in train mode to renew the "
    "running statistics, or raise momentum"
)
FROZEN_HINT = "Call model.train() if it was not meant"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    record: BatchNormRecord
    clause: str
    severity: Severity
    value: float | None
    threshold: float | None
    words: str
    why: str
    hint: str


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield one finding for each clause and run of batch normalisations of one severity."""
    limits = in_force(RULE, config)
    judged = [item for record in trace.batch_norms if (item := _judge(record, trace, limits)) is not None]
    everything = list(dict.fromkeys(record.name for record in trace.batch_norms))
    for clause, severity in dict.fromkeys((item.clause, item.severity) for item in judged):
        mine = [item for item in judged if (item.clause, item.severity) == (clause, severity)]
        found = runs({item.record.name for item in mine}, everything)
        for run in fold(found) if severity is Severity.INFO else found:
            members = [item for item in mine if item.record.name in run]
            yield _finding(run, everything, members)
    if not any(item.clause in DRIFTS for item in judged):
        yield from _gap(trace, everything, limits.only("loss-gap"))


def _finding(run: Sequence[str], everything: Sequence[str], members: Sequence[_Judged]) -> Finding:
    worst = min(members, key=lambda item: _distance(item))
    place = place_of(run, everything)
    many = f"{len(members)} batch normalisations, at worst in {worst.record.name}: " if len(run) > 1 else ""
    return Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=worst.severity,
        location=place,
        message=many + worst.words,
        why=worst.why,
        hint=worst.hint,
        value=worst.value,
        threshold=worst.threshold,
        evidence=_evidence(worst, len(members)),
    )


def loss_gap(trace: Trace) -> float | None:
    """By how much the loss grows where running statistics stand in for the batch's, as a share of it."""
    run = trace.run
    if run.running_loss is None or not run.loss_values or run.inputs_from in DRAWN_INPUTS:
        return None
    loss = run.loss_values[0]
    return (run.running_loss - loss) / abs(loss) if loss else None


def _gap(trace: Trace, everything: Sequence[str], limit: Threshold) -> Iterator[Finding]:
    """No layer is far off alone, and yet the loss is: small errors add up along the depth."""
    gap, running = loss_gap(trace), trace.run.running_loss
    if gap is None or running is None or gap <= limit.value:
        return
    yield Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=limit.severity,
        location=place_of(everything, everything),
        message=(
            f"The loss is {number(running)} with the running statistics and {number(trace.run.loss_values[0])} with "
            f"the batch's: {percent(gap)} more ({limit.severity} above {percent(limit.value)})"
        ),
        why=DRIFT_WHY,
        hint=DRIFT_HINT,
        value=gap,
        threshold=limit.value,
        evidence=(("cause", "loss gap"), ("loss_gap", gap), ("running_loss", running)),
    )


def _distance(item: _Judged) -> float:
    """Smaller is worse, within one clause."""
    value = item.value or 0.0
    return value if item.clause in (TOO_FEW_VALUES, "narrow") else -value


def _judge(record: BatchNormRecord, trace: Trace, limits: Limits) -> _Judged | None:
    if not record.batch_statistics:
        return _frozen(record) if trace.run.mode == "mixed" else None
    few, low = limits["values"], limits["low-variance"]
    return _few(record, trace, few) or _low(record, low) or _drifted(record, trace, limits)


def _frozen(record: BatchNormRecord) -> _Judged:
    return _Judged(
        record=record,
        clause="frozen",
        severity=Severity.INFO,
        value=None,
        threshold=None,
        words="normalises with its running statistics while other parts of the model are in train mode",
        why=FROZEN_WHY,
        hint=FROZEN_HINT,
    )


def _few(record: BatchNormRecord, trace: Trace, limits: Sequence[Threshold]) -> _Judged | None:
    limit = exceeded(limits, record.values, below=True)
    if limit is None:
        return None
    severity, because = limit.severity, ""
    if severity is Severity.WARNING and trace.run.inputs_from == "inferred":
        severity, because = Severity.INFO, "; the batch was inferred, and is not that of the training"
    share = _share_left(record.values)
    return _Judged(
        record=record,
        clause=TOO_FEW_VALUES,
        severity=severity,
        value=record.values,
        threshold=limit.value,
        words=(
            f"each channel is normalised over {record.values} values ({limit.severity} below "
            f"{limit.value:g}), which leaves {percent(share)} of the gradient's energy{because}"
        ),
        why=FEW_WHY,
        hint=FEW_HINT,
    )


def _share_left(values: int) -> float:
    return max(0, values - 2) / values


def _low(record: BatchNormRecord, limits: Sequence[Threshold]) -> _Judged | None:
    share = record.low_variance
    limit = None if share is None else exceeded(limits, share, below=False)
    if share is None or limit is None:
        return None
    return _Judged(
        record=record,
        clause="low variance",
        severity=limit.severity,
        value=share,
        threshold=limit.value,
        words=(
            f"{percent(share)} of the {record.channels} channels vary less than eps = {record.eps:g} "
            f"({limit.severity} above {percent(limit.value)}): what is left is multiplied by up to "
            f"{number(record.eps**-0.5)}"
        ),
        why=LOW_WHY,
        hint=LOW_HINT,
    )


def _drifted(record: BatchNormRecord, trace: Trace, limits: Limits) -> _Judged | None:
    """Judge running against batch statistics, where both were taken on data."""
    if (record.updates or 0) < ENOUGH_UPDATES or trace.run.inputs_from in DRAWN_INPUTS:
        return None
    shift, ratio = record.mean_shift, record.deviation_ratio
    shifted, narrow, wide = (limits.only(key) for key in ("shift", "narrow", "wide"))
    if shift is not None and shift > shifted.value:
        words = (
            f"its running means are {number(shift)} deviations away from the batch's, at the median channel"
        )
        return _drift(record, "shifted", shift, shifted, f"{words} (warning above {shifted.value:g})")
    if ratio is not None and ratio < narrow.value:
        words = f"its running deviations are {number(ratio)} of the batch's, at the median channel"
        return _drift(record, "narrow", ratio, narrow, f"{words} (warning below {narrow.value:g})")
    if ratio is not None and ratio > wide.value:
        words = f"its running deviations are {number(ratio)} times the batch's, at the median channel"
        return _drift(record, "wide", ratio, wide, f"{words} (warning above {wide.value:g})")
    return None


def _drift(record: BatchNormRecord, clause: str, value: float, limit: Threshold, words: str) -> _Judged:
    return _Judged(
        record=record,
        clause=clause,
        severity=limit.severity,
        value=value,
        threshold=limit.value,
        words=f"after {record.updates} updates {words}",
        why=DRIFT_WHY,
        hint=DRIFT_HINT,
    )


def _evidence(worst: _Judged, count: int) -> Evidence:
    record = worst.record
    facts = (
        ("cause", worst.clause),
        ("batch_norms", count),
        ("channels", record.channels),
        ("values", record.values),
        ("gradient_energy_left", _share_left(record.values) if record.batch_statistics else None),
        ("low_variance", record.low_variance),
        ("mean_shift", record.mean_shift),
        ("deviation_ratio", record.deviation_ratio),
        ("updates", record.updates),
    )
    return tuple((name, fact) for name, fact in facts if fact is not None)


RULE = Rule(
    code="GF403",
    slug="batch-norm-batch",
    summary="A batch normalisation gets too few values, values that do not vary, or data unlike its statistics.",
    meaning=(
        "Looks at every batch normalisation that uses the statistics of its batch: at m, the number of values "
        "a channel is normalised over (samples times positions), at the channels whose variance is below eps, "
        "and, once the running statistics have been updated 100 times, at how far they are from the "
        "batch's, and at how much larger the loss is with them: the forward is run once more for that, the same "
        "but for the batch normalisations, which are in eval mode.\n\n"
        "Normalising takes two directions out of the m of each channel, its mean and its scale, so that of a "
        "gradient the share (m - 2)/m of the energy is left: none for m = 2, where the output is -1 and 1 "
        "whatever the input is. One value a channel is an error of torch's own."
    ),
    formula=(
        "m = N·H·W; E‖dL/dx‖²·var / E‖dL/dy‖² = (m - 2)/m;\n"
        "low: var_batch < eps; shift: median |mean_running - mean_batch| / sd_running;\n"
        "ratio: median sd_running / sd_batch, both sqrt(var + eps);\n"
        "loss gap: (L_running - L_batch) / |L_batch|, the same weights, samples and dropout masks"
    ),
    why=f"{FEW_WHY}. {LOW_WHY}. {DRIFT_WHY}.",
    hint=f"{FEW_HINT}. {LOW_HINT}. {DRIFT_HINT}.",
    thresholds=(*FEW, *LOW_VARIANCE, SHIFTED, NARROW, WIDE, GAP),
    exemptions=(
        "A model in eval mode; one that uses running statistics while other modules train is info.",
        "3 to 15 values a channel of a batch that was inferred: info, for the batch is gradflow's own choice.",
        "Running against batch statistics with fewer than 100 updates, or where the inputs are random numbers "
        "(inferred, --input): they have the statistics of no data.",
        "A loss gap where a layer's running statistics are reported already, and a loss that is smaller with them.",
        "Channels whose running variance is so large that a batch variance below eps cannot be told from "
        "rounding: they do not count as low.",
    ),
    sources=(
        "Ioffe and Szegedy, Batch Normalization, 2015",
        "Wu and He, Group Normalization, 2018",
        "Ben Braiek and Khomh, Testing feedforward neural networks training programs (TheDeepChecker), TOSEM 2023",
        "Santurkar et al., How does batch normalization help optimization?, 2018: the gradient's two directions",
    ),
    phase="both",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)
)
example_inputs = torch.randn(2, 64)
""",
    healthy_example="""\
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)
)
example_inputs = torch.randn(64, 64)
""",
    check=check,
)
