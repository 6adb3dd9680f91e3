"""GF103: parameters that no gradient reaches, each cause told apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from gradflow.config import Config
from gradflow.findings import Finding, Location, Severity
from gradflow.rules.places import ancestry, parameter_runs
from gradflow.rules.rule import Rule, Threshold
from gradflow.trace_model import Coverage, GraphCut, ParameterRecord, Trace

SIBLINGS = 4
"""This many like siblings that ran make a numbered layer that did not look like one drawn at random."""


class Cause(StrEnum):
    """Why a parameter is not trained; the first that applies."""

    FROZEN = "frozen"
    CUT = "graph cut"
    NOTHING = "no gradient anywhere"
    ZERO = "zero gradient everywhere"
    NEVER_CALLED = "never called"
    DRAWN = "drawn at random"
    NOT_CONSUMED = "not consumed"
    UNUSED_OUTPUT = "output not used by the loss"
    NOT_IN_OPTIMIZER = "not in the optimizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What to say about a cause; ``what`` follows the place and the number of its parameters."""

    severity: Severity
    what: str
    why: str
    hint: str


WORDS: dict[Cause, Words] = {
    Cause.FROZEN: Words(
        severity=Severity.INFO,
        what="frozen (requires_grad=False)",
        why="Frozen parameters stay as they are, which is usually meant",
        hint="If it is not meant, call requires_grad_(True) on them before the optimizer is made",
    ),
    Cause.CUT: Words(
        severity=Severity.ERROR,
        what="without a gradient",
        why="Everything before the cut stays at its initial values, however long the training runs",
        hint="",
    ),
    Cause.NOTHING: Words(
        severity=Severity.ERROR,
        what="without a gradient (0 allowed), and so is every other one",
        why="Nothing in the model can be trained by this loss",
        hint=(
            "Check that the loss is computed from the outputs of this forward, with gradients enabled, and "
            "not from numbers (.item(), numpy) or detached tensors"
        ),
    ),
    Cause.ZERO: Words(
        severity=Severity.ERROR,
        what="with a gradient of exactly 0 (0 allowed), and so is every other one",
        why="Nothing in the model can be trained by this loss: it does not depend on the outputs",
        hint=(
            "Look at what stands between the last layer and the loss: a softmax over one output is always 1, a clamp "
            "or a saturated activation is flat, a mask over everything or a product with 0 leaves nothing"
        ),
    ),
    Cause.NEVER_CALLED: Words(
        severity=Severity.WARNING,
        what="without a gradient (0 allowed): the module never ran",
        why="It takes memory, is not trained, and stops DistributedDataParallel with an error",
        hint="Call it in forward, or remove it; if it runs only sometimes, set find_unused_parameters=True",
    ),
    Cause.DRAWN: Words(
        severity=Severity.INFO,
        what="without a gradient: the layer did not run, while at least 4 layers like it did",
        why="Layer drop leaves layers out at random while training; one that is always missing is a fault",
        hint="Run again with --eval, where no layer is left out",
    ),
    Cause.NOT_CONSUMED: Words(
        severity=Severity.INFO,
        what="unused in this forward: the module ran, and no op consumed it",
        why="Batches like this one do not train them, as is meant for a mask token or an optional input",
        hint="If it is not meant, use them in forward or remove them",
    ),
    Cause.UNUSED_OUTPUT: Words(
        severity=Severity.WARNING,
        what="without a gradient (0 allowed): what it computes does not reach the loss",
        why="It costs time and memory, is not trained, and stops DistributedDataParallel with an error",
        hint=(
            "Use that output in the loss, or switch it off (an unused pooler: add_pooling_layer=False); "
            "nothing is wrong where another loss uses it"
        ),
    ),
    Cause.NOT_IN_OPTIMIZER: Words(
        severity=Severity.ERROR,
        what="missing from the optimizer's parameters (0 allowed)",
        why="They receive a gradient, and no step ever applies it",
        hint=(
            "Hand model.parameters() to the optimizer after the whole model is built and moved; modules in a "
            "plain list or dict are not registered: use nn.ModuleList or nn.ModuleDict"
        ),
    ),
}

CUT_HINTS = {
    "detach": "Remove the detach(), or freeze what comes before it with requires_grad_(False) if it is meant",
    "data": "Use the tensor itself instead of its .data",
    "no_grad": (
        "Run it outside torch.no_grad() / inference_mode(), or freeze it with requires_grad_(False) if it is "
        "meant"
    ),
    "item": "Keep tensors in the loss: item() makes a number without a history",
    "numpy": "Keep to torch ops: numpy() makes an array without a history",
    "tolist": "Keep to torch ops: tolist() makes numbers without a history",
    "argmax": "Replace argmax by softmax, Gumbel-softmax or a straight-through estimator",
}
CUT_HINT = "Replace it by a differentiable op, or use a straight-through estimator"

ALLOWED = 0.0


def cause_of(parameter: ParameterRecord) -> Cause | None:
    """Return why a parameter is not trained, or None where it is."""
    if 0 in parameter.shape:
        return None
    if not parameter.requires_grad:
        return Cause.FROZEN
    if parameter.gradient_norm is None and parameter.coverage is not Coverage.MEASURED:
        return _without_gradient(parameter)
    return Cause.NOT_IN_OPTIMIZER if parameter.in_optimizer is False else None


def _without_gradient(parameter: ParameterRecord) -> Cause:
    if parameter.coverage is Coverage.NEVER_CALLED:
        return Cause.NEVER_CALLED
    if parameter.coverage is Coverage.UNUSED:
        return Cause.NOT_CONSUMED
    return Cause.CUT if parameter.cut is not None and parameter.cut.op else Cause.UNUSED_OUTPUT


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield one finding for each cut, and one for each run of neighbouring modules with the same cause."""
    causes = {p.name: _in_context(trace, p, cause_of(p)) for p in trace.parameters}
    if _nothing_arrives(trace.parameters):
        causes = {name: cause and _all_lost(cause) for name, cause in causes.items()}
    if _all_zero(trace):
        measured = {p.name for p in trace.parameters if p.requires_grad and p.gradient_norm == 0}
        causes = {name: Cause.ZERO if name in measured else cause for name, cause in causes.items()}
    yield from _cuts(trace, [p for p in trace.parameters if causes[p.name] is Cause.CUT])
    for cause in Cause:
        if cause is Cause.CUT:
            continue
        few = WORDS[cause].severity is Severity.INFO or cause in (Cause.NOTHING, Cause.ZERO)
        wanted = {name for name, found in causes.items() if found is cause}
        for place, group in parameter_runs(trace, wanted, few=few):
            yield _finding(cause, place, group)


def _nothing_arrives(parameters: Sequence[ParameterRecord]) -> bool:
    """All trainable parameters are without a gradient, and no cut says why."""
    causes = [cause_of(p) for p in parameters if p.requires_grad and 0 not in p.shape]
    lost = {Cause.NEVER_CALLED, Cause.NOT_CONSUMED, Cause.UNUSED_OUTPUT}
    return bool(causes) and lost.issuperset(causes)


def _all_zero(trace: Trace) -> bool:
    """Every gradient that arrived is exactly 0, the loss is not, and no layer of zeros says why."""
    norms = [p.gradient_norm for p in trace.parameters if p.requires_grad and p.gradient_norm is not None]
    learnt = bool(trace.run.loss_values) and not any(trace.run.loss_values)
    silent = any(record.inactive == 1 for record in trace.activations) or any(
        layer.activation is not None and layer.activation.absmax == 0 for layer in trace.layers
    )
    return bool(norms) and not any(norms) and not learnt and not silent


def _all_lost(cause: Cause) -> Cause:
    return cause if cause is Cause.FROZEN else Cause.NOTHING


def _in_context(trace: Trace, parameter: ParameterRecord, cause: Cause | None) -> Cause | None:
    """Tell a layer that was left out at random from one that is never called."""
    if cause is Cause.NEVER_CALLED and trace.run.mode != "eval" and _looks_drawn(trace, parameter):
        return Cause.DRAWN
    return cause


def _looks_drawn(trace: Trace, parameter: ParameterRecord) -> bool:
    """``layers.3.fc.weight`` looks drawn at random if four of ``layers.*.fc.weight``, as large, did run."""
    for name in ancestry(parameter.name):
        holder, _, last = name.rpartition(".")
        if last.isdigit():
            inside = parameter.name.removeprefix(name)
            like = [p for p in trace.parameters if _is_sibling(p, holder, inside, parameter.shape)]
            return sum(p.coverage is not Coverage.NEVER_CALLED for p in like) >= SIBLINGS
    return False


def _is_sibling(parameter: ParameterRecord, holder: str, inside: str, shape: tuple[int, ...]) -> bool:
    start = f"{holder}." if holder else ""
    middle = parameter.name.removeprefix(start).removesuffix(inside)
    return middle.isdigit() and parameter.name == f"{start}{middle}{inside}" and parameter.shape == shape


def _cuts(trace: Trace, parameters: Sequence[ParameterRecord]) -> Iterator[Finding]:
    """Yield one finding a cut; under ``no_grad`` every op is one, so neighbours are one finding there."""
    for cut in dict.fromkeys(p.cut for p in parameters):
        if cut is not None and cut.op != "no_grad":
            yield _cut(cut, Location(first=cut.module), [p for p in parameters if p.cut == cut])
    without = {p.name for p in parameters if p.cut is not None and p.cut.op == "no_grad"}
    for place, group in parameter_runs(trace, without):
        cuts = [p.cut for p in group if p.cut is not None]
        place = Location(first=cuts[0].module) if len(set(cuts)) == 1 else place
        yield _cut(cuts[-1], place, group)


def _cut(cut: GraphCut, location: Location, group: Sequence[ParameterRecord]) -> Finding:
    place = f"in {cut.where}" if cut.where else "in the model's own forward"
    source = f" ({cut.source})" if cut.source else ""
    message = (
        f"The graph is cut after {cut.module or 'the input'} by {cut.op} {place}{source}: "
        f"{_amount(group)} before it without a gradient (0 allowed)"
    )
    facts = (
        ("cause", Cause.CUT.value),
        ("op", cut.op),
        ("where", cut.where),
        ("source", cut.source),
        ("first_parameter", group[0].name),
        ("last_parameter", group[-1].name),
    )
    words = WORDS[Cause.CUT]
    return Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=words.severity,
        location=location,
        message=message,
        why=words.why,
        hint=CUT_HINTS.get(cut.op, CUT_HINT),
        value=float(len(group)),
        threshold=ALLOWED,
        evidence=(*((name, fact) for name, fact in facts if fact), *_counts(group)),
    )


def _finding(cause: Cause, place: Location, group: Sequence[ParameterRecord]) -> Finding:
    words = WORDS[cause]
    judged = words.severity is not Severity.INFO
    return Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=words.severity,
        location=place,
        message=f"{place}: {_amount(group)} {words.what}",
        why=words.why,
        hint=words.hint,
        value=float(len(group)),
        threshold=ALLOWED if judged else None,
        evidence=(("cause", cause.value), *_counts(group)),
    )


def _amount(group: Sequence[ParameterRecord]) -> str:
    noun = "parameter" if len(group) == 1 else "parameters"
    return f"{len(group)} {noun} ({_elements(group)} elements)"


def _elements(group: Sequence[ParameterRecord]) -> int:
    return sum(math.prod(p.shape) for p in group)


def _counts(group: Sequence[ParameterRecord]) -> tuple[tuple[str, int], ...]:
    return ("parameters", len(group)), ("elements", _elements(group))


RULE = Rule(
    code="GF103",
    slug="no-gradient",
    summary="Parameters that are not trained: cut off, unused, never called, frozen, not in the optimizer.",
    meaning=(
        "Wants every parameter that asks for a gradient to get one, and an optimizer that applies it. Each "
        "cause is told apart, by this list:\n\n"
        "1. requires_grad is False: info, frozen.\n"
        "2. The module never ran: warning, unused; info where at least 4 layers like it did run in train "
        "mode (layer drop).\n"
        "3. The module ran and no op consumed the parameter: info (a mask token in a batch without masks).\n"
        "4. It was consumed, its values flow on to the loss, and the path for the gradient is cut: error, "
        "at the last module before the cut, naming the op (detach, no_grad, argmax ...).\n"
        "5. It was consumed and its values do not reach the loss at all: warning, an unused output (a pooler "
        "under a loss that ignores it).\n"
        "6. No trainable parameter gets a gradient and no cut says why, or every one gets exactly 0: error.\n"
        "7. It has a gradient and is not among the optimizer's parameters: error. Without a known optimizer "
        "this is not checked.\n\n"
        "Neighbouring modules with the same cause are one finding."
    ),
    formula="number of parameters with requires_grad whose .grad is None after backward",
    why="A parameter without a gradient stays at its initial value, however long the training runs.",
    hint=f"{CUT_HINTS['detach']}. {WORDS[Cause.NEVER_CALLED].hint}. {WORDS[Cause.NOT_IN_OPTIMIZER].hint}.",
    thresholds=tuple(
        Threshold(
            name=f"parameters: {cause}, above", value=ALLOWED, severity=words.severity, source="by definition"
        )
        for cause, words in WORDS.items()
    ),
    exemptions=(
        "A gradient that is exactly zero is a gradient, unless every one is: dead units, zero-initialised branches "
        "and masked rows have rules of their own, and a bias before a normalisation truly has gradient 0.",
        "Zeros everywhere under a loss of exactly 0 (nothing left to learn from this batch), or where a layer "
        "returns only zeros, which GF301 and GF304 report.",
        "Tied parameters count once.",
        "Parameters with no elements.",
    ),
    sources=("PyTorch, DistributedDataParallel: find_unused_parameters",),
    phase="both",
    failing_example="""\
import torch
from torch import nn


class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.encoder(x).detach())


torch.manual_seed(0)
model = Cut()
example_inputs = torch.randn(8, 16)
""",
    healthy_example="""\
import torch
from torch import nn


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.encoder(x))


torch.manual_seed(0)
model = Whole()
example_inputs = torch.randn(8, 16)
""",
    check=check,
)
