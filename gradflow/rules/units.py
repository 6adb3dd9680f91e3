"""What the rules about units share: which activations to judge together, and how to name them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from gradflow.findings import Location, Severity
from gradflow.rules.places import Span, fold, place_of, runs, spans
from gradflow.rules.rule import Threshold
from gradflow.trace_model import ActivationRecord, LayerRecord, TensorStatistics, Trace

WHOLE_LOSS = 0.8
"""Activations that lose this share of ln J explain all of it: layers in between add a little of their own."""
LOSS_OF_GRADIENT = "loss of gradient"
"""The ``cause`` in the evidence of a finding that explains the whole loss of gradient along the trunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One activation with the share that was judged, and the limit it is beyond."""

    record: ActivationRecord
    share: float
    limit: Threshold
    severity: Severity
    """The limit's, or less where something else explains the share."""
    because: str = ""
    """Why less, in words."""


def grouped(judged: Sequence[Judged], trace: Trace) -> list[tuple[Location, tuple[Judged, ...]]]:
    """Group activations of one severity that follow one another, with the location of each group."""
    everything = list(dict.fromkeys(record.name for record in trace.activations))
    found = []
    for severity in sorted({item.severity for item in judged}, key=lambda severity: -severity.rank):
        mine = [item for item in judged if item.severity is severity]
        names = {item.record.name for item in mine}
        separate = runs(names, everything)
        for run in fold(separate) if severity is Severity.INFO else separate:
            members = tuple(item for item in mine if item.record.name in run)
            found.append((place_of(run, everything), members))
    return found


def subject(members: Sequence[Judged]) -> str:
    """Name an activation, or how many of them there are: "the relu of", "3 activations (relu) in"."""
    ops = ", ".join(dict.fromkeys(item.record.op for item in members))
    return f"the {ops} of" if len(members) == 1 else f"{len(members)} activations ({ops}) in"


def percent(share: float) -> str:
    """Two digits at least, and never 100% for less than all."""
    text = f"{100 * share:.3g}"
    return f"{min(float(text), 99.9) if share < 1 else 100:g}%"


def output_of(record: ActivationRecord, layers: Sequence[LayerRecord]) -> TensorStatistics | None:
    """Statistics of an activation's output, where a layer row is this very tensor."""
    if record.layer is None:
        return None
    return next((layer.activation for layer in layers if layer.order == record.layer), None)


def explains_loss(trace: Trace, members: Sequence[Judged]) -> bool:
    """Tell whether the gradient that the trunk loses is lost at these activations."""
    where = _positions(trace, members)
    points = [(p.layer, p.gradient_norm) for p in trace.trunk.points]
    known = [
        (position, g) for position, g in points if position is not None and g is not None and math.isfinite(g)
    ]
    if len(known) < 2 or not known[-1][1]:
        return False
    zeros = [k for k, (_, g) in enumerate(known) if g == 0]
    if zeros:
        return _between(known[zeros[-1]][0], known[zeros[-1] + 1][0], where)
    total = math.log(known[-1][1]) - math.log(known[0][1])
    here = sum(
        math.log(after) - math.log(before)
        for (start, before), (end, after) in pairwise(known)
        if _between(start, end, where)
    )
    return total > 0 and here >= WHOLE_LOSS * total


def _positions(trace: Trace, members: Sequence[Judged]) -> tuple[Span, ...]:
    known = spans(trace)
    records = [item.record for item in members]
    own = [(r.layer, r.layer) if r.layer is not None else known.get(r.name) for r in records]
    return tuple(span for span in own if span is not None)


def _between(start: int, end: int, where: Sequence[Span]) -> bool:
    return any(first < end and last > start for first, last in where)
