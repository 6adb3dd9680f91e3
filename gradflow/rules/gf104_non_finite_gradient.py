"""GF104: the backward makes a NaN or Inf; the first producer, going back from the loss, is blamed."""

from __future__ import annotations

from collections.abc import Iterator

from gradflow.config import Config
from gradflow.findings import Finding, Location, Severity
from gradflow.rules.nonfinite import (
    DIVISION_HINT,
    ROOT_HINT,
    innermost,
    neighbours,
    nonfinite_gradients,
    op_hint,
    origin_of,
    producer,
)
from gradflow.rules.places import parameter_runs
from gradflow.rules.rule import Rule, Threshold
from gradflow.trace_model import NonFiniteOrigin, Trace

ALLOWED = Threshold(
    name="non-finite gradient elements above",
    value=0.0,
    severity=Severity.ERROR,
    source="by definition; smdebug's ExplodingTensor uses the same",
)
WHY = (
    "One optimizer step writes the NaN into every parameter before this place, and training cannot recover "
    "from it"
)


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield the first producer of the backward, else the parameters whose gradient is not finite."""
    origin = origin_of(trace, "backward") or _last_row(trace)
    if origin is not None:
        yield _producer(trace, origin)
        return
    bad = {p.name for p in trace.parameters if p.gradient_nonfinite}
    for place, group in parameter_runs(trace, bad, few=True):
        count = sum(p.gradient_nonfinite or 0 for p in group)
        words = (
            f"The gradients of {len(group)} parameters hold {count} NaN or Inf elements (0 allowed), "
            "although those of all activations are finite"
        )
        yield _finding(place, words, op_hint(""), count, (("parameters", len(group)),))


def _last_row(trace: Trace) -> NonFiniteOrigin | None:
    """Blame what follows the last module whose output's gradient is not finite, where no origin is known."""
    rows = innermost(nonfinite_gradients(trace))
    if not rows:
        return None
    row = rows[-1]
    return NonFiniteOrigin(
        phase="backward",
        name=row.name,
        op="",
        source="",
        value="nan or inf",
        count=row.gradient_nonfinite or 0,
        last_finite=_consumer(trace, row.order),
    )


def _consumer(trace: Trace, order: int) -> str:
    """The next module in execution order whose output's gradient is finite; "" after the last one."""
    after = [row for row in trace.layers if row.order > order and row.gradient_nonfinite == 0 and row.name]
    return min(after, key=lambda row: row.order).name if after else ""


def _producer(trace: Trace, origin: NonFiniteOrigin) -> Finding:
    carriers = len({row.name for row in nonfinite_gradients(trace)} - {origin.name, ""})
    words = (
        f"The backward of {producer(origin)} makes {origin.count} elements {origin.value} (0 allowed)"
        if origin.op
        else f"The gradient that reaches {producer(origin)} holds {origin.count} {origin.value} elements "
        "(0 allowed), the first one going back from the loss"
    )
    evidence = (
        ("op", origin.op),
        ("source", origin.source),
        ("value", origin.value),
        ("last_finite", origin.last_finite),
        ("modules_before", carriers),
    )
    known = tuple((name, fact) for name, fact in evidence if fact != "")
    place = Location(first=origin.name)
    return _finding(
        place,
        words + neighbours(origin, carriers, "it is passed on to"),
        op_hint(origin.op),
        origin.count,
        known,
    )


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
    code="GF104",
    slug="non-finite-gradient",
    summary="The backward makes a NaN or Inf; the first producer is named.",
    meaning=(
        "Wants every gradient to be finite. It blames the first producer going back from the loss whose "
        "incoming gradient is finite; everything before it in the model only receives the value and is not "
        "reported again.\n\n"
        "A forward can be finite where its backward is not: the root at 0 has an infinite slope, and "
        "infinity times the 0 of a square's slope is NaN. Where the forward is not finite itself, GF303 is "
        "the root cause and this finding its consequence."
    ),
    formula="number of elements x with x != x or |x| = Inf, exact, over dL/dh of every output and dL/dW",
    why=WHY + ".",
    hint=f"{ROOT_HINT}. {DIVISION_HINT}.",
    thresholds=(ALLOWED,),
    exemptions=("What comes before the first producer: it is counted in the message, not reported again.",),
    sources=("Amazon SageMaker Debugger, ExplodingTensor (non-finite values only)",),
    phase="both",
    failing_example="""\
import torch
from torch import nn


class Distances(nn.Module):
    def forward(self, x):
        squares = (x[:, None] - x[None]).square().sum(-1)
        return torch.sqrt(squares)  # 0 on the diagonal, where the root has an infinite slope


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 16), Distances(), nn.Linear(8, 4))
example_inputs = torch.randn(8, 16)
""",
    healthy_example="""\
import torch
from torch import nn


class Distances(nn.Module):
    def forward(self, x):
        squares = (x[:, None] - x[None]).square().sum(-1)
        return torch.sqrt(squares + 1e-3)


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 16), Distances(), nn.Linear(8, 4))
example_inputs = torch.randn(8, 16)
""",
    check=check,
)
