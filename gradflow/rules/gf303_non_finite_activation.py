"""GF303: the forward, or a parameter, holds a NaN or Inf; the first producer is blamed."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradflow.config import Config
from gradflow.findings import Finding, Location, Severity
from gradflow.rules.nonfinite import (
    DIVISION_HINT,
    LOG_HINT,
    OVERFLOW_HINT,
    innermost,
    loss_is_finite,
    neighbours,
    nonfinite_activations,
    nonfinite_gradients,
    op_hint,
    origin_of,
    producer,
)
from gradflow.rules.places import parameter_runs
from gradflow.rules.rule import Rule, Threshold
from gradflow.trace_model import LayerRecord, NonFiniteOrigin, Trace

ALLOWED = Threshold(
    name="non-finite elements above",
    value=0.0,
    severity=Severity.ERROR,
    source="by definition; smdebug's ExplodingTensor uses the same",
)
WHY = (
    "Every number computed from a NaN is NaN: the loss, every gradient, and after one step every parameter; "
    "an Inf becomes a NaN at the next subtraction or division"
)
PARAMETER_HINT = (
    "Load a checkpoint from before the divergence or fix the initialisation; if training did it, lower the "
    "learning rate, clip the gradient norm, or skip steps whose gradient is not finite"
)
INPUT_OP = "input"
INPUT_HINT = (
    "Clean the batch before the model sees it: look for missing values, or a division by a zero deviation"
)
LOSS_HINT = (
    "Look into the loss: a log of 0, a division by an empty count, or targets outside the outputs' range"
)


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield the parameters that hold such a value, then the first producer of the forward."""
    yield from _parameters(trace)
    origin = origin_of(trace, "forward") or _first_row(trace)
    if origin is not None:
        if not _absorbed(trace, origin):
            yield _producer(trace, origin)
    elif not loss_is_finite(trace) and not _bad_parameters(trace):
        yield _loss(trace)


def _bad_parameters(trace: Trace) -> bool:
    return any(p.value_nonfinite for p in trace.parameters) or origin_of(trace, "parameter") is not None


def _parameters(trace: Trace) -> Iterator[Finding]:
    groups = parameter_runs(trace, {p.name for p in trace.parameters if p.value_nonfinite}, few=True)
    for place, group in groups:
        count = sum(p.value_nonfinite or 0 for p in group)
        names = ", ".join(p.name for p in group[:3]) + (" …" if len(group) > 3 else "")
        where = Location(first=group[0].name) if len(group) == 1 else place
        yield _finding(where, _holds(names, count), PARAMETER_HINT, count, (("parameters", len(group)),))
    origin = origin_of(trace, "parameter")
    if origin is not None and not groups:
        words = _holds(origin.name, origin.count, origin.value)
        yield _finding(Location(first=origin.name), words, PARAMETER_HINT, origin.count, ())


def _holds(names: str, count: int, value: str = "NaN or Inf") -> str:
    return f"Before anything ran, {names} already held {count} {value} elements (0 allowed)"


def _first_row(trace: Trace) -> NonFiniteOrigin | None:
    """Blame the first module whose output is not finite, where no origin was recorded."""
    rows = innermost(nonfinite_activations(trace))
    if not rows or origin_of(trace, "parameter") or any(p.value_nonfinite for p in trace.parameters):
        return None
    row = rows[0]
    count = row.activation.nonfinite if row.activation and row.activation.nonfinite else 0
    return NonFiniteOrigin(
        phase="forward", name=row.name, op="", source="", value=_value_of(row), count=count
    )


def _value_of(row: LayerRecord) -> str:
    """Tell -inf from inf by the mean: only one sign keeps its sign, anything else makes NaN."""
    mean = row.activation.mean if row.activation else None
    return str(mean) if mean is not None and math.isinf(mean) else "nan or inf"


def _absorbed(trace: Trace, origin: NonFiniteOrigin) -> bool:
    """Tell whether it is a mask: only -inf, and neither the loss nor any gradient carries it.

    An op that was named as the producer is no mask if what it made is still there in the model's outputs.
    """
    in_outputs = any(row.name == "" for row in nonfinite_activations(trace))
    clean = not (origin.op and in_outputs) and not nonfinite_gradients(trace) and loss_is_finite(trace)
    return origin.value == "-inf" and clean and not any(p.gradient_nonfinite for p in trace.parameters)


def _producer(trace: Trace, origin: NonFiniteOrigin) -> Finding:
    carriers = len({row.name for row in nonfinite_activations(trace)} - {origin.name, ""})
    given = origin.op == INPUT_OP
    made = (
        f"The input itself holds {origin.count} {origin.value} elements"
        if given
        else f"{producer(origin)} makes {origin.count} elements {origin.value} from finite inputs"
    )
    words = f"{made} (0 allowed){neighbours(origin, carriers, 'it is carried on by')}"
    evidence = (
        ("op", origin.op),
        ("source", origin.source),
        ("value", origin.value),
        ("last_finite", origin.last_finite),
        ("modules_after", carriers),
    )
    known = tuple((name, fact) for name, fact in evidence if fact != "")
    return _finding(
        Location(first=origin.name), words, INPUT_HINT if given else op_hint(origin.op), origin.count, known
    )


def _loss(trace: Trace) -> Finding:
    bad = [value for value in trace.run.loss_values if not math.isfinite(value)]
    words = (
        f"The loss is {bad[0]} in {len(bad)} of {len(trace.run.loss_values)} steps (0 allowed), although "
        "every module's output is finite: the loss itself makes it"
    )
    return _finding(Location(first=""), words, LOSS_HINT, len(bad), (("loss", bad[0]),))


def _finding(
    place: Location, words: str, hint: str, count: int, evidence: tuple[tuple[str, float | int | str], ...]
) -> Finding:
    return Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=Severity.ERROR,
        location=place,
        message=words,
        why=WHY,
        hint=hint,
        value=float(count),
        threshold=ALLOWED.value,
        evidence=evidence,
    )


RULE = Rule(
    code="GF303",
    slug="non-finite-activation",
    summary="The forward or a parameter holds a NaN or Inf; the first producer is named.",
    meaning=(
        "Wants every activation and every parameter to be finite. It blames the first producer in execution "
        "order whose own inputs are finite, functional calls included; everything after it only carries the "
        "value on and is not reported again.\n\n"
        "Parameters that already hold such a value are named instead of the layers they poison. Where every "
        "module's output is finite and the loss is not, the loss itself is named."
    ),
    formula="number of elements x with x != x or |x| = Inf, exact, over activations and parameters",
    why=WHY + ".",
    hint=f"{LOG_HINT}. {DIVISION_HINT}. {OVERFLOW_HINT}.",
    thresholds=(ALLOWED,),
    exemptions=(
        "A mask: only -inf, and neither the loss nor any gradient carries it (a softmax has absorbed it).",
        "What comes after the first producer: it is counted in the message, not reported again.",
    ),
    sources=(
        "Amazon SageMaker Debugger, ExplodingTensor (non-finite values only)",
        "Wardat et al., DeepLocalize, ICSE 2021 (the first layer with a numerical error)",
    ),
    phase="both",
    failing_example="""\
import torch
from torch import nn


class LogOfZero(nn.Module):
    def forward(self, x):
        return torch.log(torch.relu(x))  # -inf wherever x is not positive


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 16), LogOfZero(), nn.Linear(16, 4))
example_inputs = torch.randn(8, 16)
""",
    healthy_example="""\
import torch
from torch import nn


class LogOfPositive(nn.Module):
    def forward(self, x):
        return torch.log1p(torch.relu(x))


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 16), LogOfPositive(), nn.Linear(16, 4))
example_inputs = torch.randn(8, 16)
""",
    check=check,
)
