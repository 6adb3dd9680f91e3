"""GF204: a residual branch that returns exactly zero, waiting to open or dead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.rules.gain import Evidence
from gradflow.rules.places import ancestry
from gradflow.rules.rule import Rule, Threshold
from gradflow.rules.sites import Sites, by, in_order, inside, joined, neighbours, place, subject
from gradflow.trace_model import ParameterRecord, ResidualRecord, Trace

KINDS = ("identity", "projection", "scaled", "low_rank", "gated")
RANDOM_DEPTH = ("DropPath", "StochasticDepth")
"""Ends of the class names of modules that drop whole branches at random."""
SHOWN = 3
"""Names of parameters in one sentence."""


class State(StrEnum):
    """What an exactly zero branch is; each is the end of a sentence."""

    OPENS = "zero-initialised gate"
    NEVER_OPENED = "still exactly zero after training"
    DEAD = "dead"
    FROZEN = "frozen"
    DRAWN = "left out at random"
    UNREACHED = "no gradient arrives"
    UNKNOWN = "no gradient measured"


LIMITS = (
    Threshold(
        name="zero branches that some multiplying parameter will open, above",
        value=0,
        severity=Severity.INFO,
        source="what ReZero, SkipInit, Fixup, zero-gamma and LoRA look like at their first step",
    ),
    Threshold(
        name="zero branches with parameters, of which no multiplying one gets a gradient, above",
        value=0,
        severity=Severity.ERROR,
        source="the product rule: a zero times a zero factor passes no gradient to either",
    ),
    Threshold(
        name="after training, branches that are still exactly zero, above",
        value=0,
        severity=Severity.ERROR,
        source="an opening gate moves at the first step",
    ),
)
SEVERITIES: Mapping[State, Severity] = {State.DEAD: Severity.ERROR, State.NEVER_OPENED: Severity.ERROR}
"""All others are info."""

WHY = (
    "The branch adds nothing, and no gradient can change that: its parameters take memory and time, and the "
    "block will be an identity for ever"
)
WHY_OPENS = "The block starts as an identity, and the first step opens it: a common and sound initialisation"
WHY_UNKNOWN = "A branch that returns zeros does nothing in this step"
HINTS: Mapping[State, str] = {
    State.OPENS: "Nothing needs to be done; measure again with --trained, where a zero branch is an error",
    State.NEVER_OPENED: (
        "Check that the gate is among the optimizer's parameters, is not clamped or decayed to zero, and "
        "has a learning rate"
    ),
    State.DEAD: (
        "Find the zero factor: a product with 0, an activation that is dead for every sample in front of a "
        "zero weight, two zero-initialised layers in one branch; only one factor may start at zero"
    ),
    State.FROZEN: "Nothing needs to be done where the branch is meant to stay shut; otherwise unfreeze it",
    State.DRAWN: "Run again with --eval, where no branch is left out, or with a larger batch",
    State.UNREACHED: "Measure again after the first step: a zero-initialised head passes no gradient back yet",
    State.UNKNOWN: "Look at GF103 for what keeps the gradient from the branch's parameters",
}


def check(trace: Trace, config: Config) -> Iterator[Finding]:
    """Yield one finding for the zero branches of each state; dead ones by runs of neighbours."""
    everything = in_order(trace)
    parameters = {name: p for p in trace.parameters for name in (p.name, *p.aliases)}
    random = _drops_branches(trace)
    zero = [site for site in everything if site.kind in KINDS and site.branch_norm == 0]
    states = {site.order: _state(trace, site, parameters, random) for site in zero}
    for group in by(lambda site: (states[site.order], _opens_by(site)), zero):
        state = states[group[0].order]
        found = neighbours(group, everything)
        one = [tuple(group)] if state is State.OPENS else joined(found)
        for run in found if state in SEVERITIES else one:
            yield _finding(state, run, everything)


def _state(
    trace: Trace, site: ResidualRecord, parameters: Mapping[str, ParameterRecord], random: frozenset[str]
) -> State:
    if site.name in random:
        return State.DRAWN
    if site.opened_by:
        return State.NEVER_OPENED if trace.run.trained else State.OPENS
    own = [parameters[name] for name in site.branch_parameters if name in parameters]
    if own and not any(parameter.requires_grad for parameter in own):
        return State.FROZEN
    if site.gradient_norm == 0:
        return State.UNREACHED
    return State.DEAD if any(parameter.gradient_norm is not None for parameter in own) else State.UNKNOWN


def _drops_branches(trace: Trace) -> frozenset[str]:
    """The modules that hold one which leaves out whole branches at random; none outside training mode."""
    if trace.run.mode == "eval":
        return frozenset()
    dropping = (layer.name for layer in trace.layers if layer.type.endswith(RANDOM_DEPTH))
    return frozenset(holder for name in dropping for holder in ancestry(name))


def _opens_by(site: ResidualRecord) -> tuple[str, ...]:
    return tuple(inside(site, parameter) for parameter in site.opened_by)


def _finding(state: State, run: Sites, everything: Sites) -> Finding:
    severity = SEVERITIES.get(state, Severity.INFO)
    verb = "returns" if len(run) == 1 else "return"
    return Finding(
        rule=RULE.code,
        slug=RULE.slug,
        severity=severity,
        location=place(run),
        message=f"{subject('branch', run, everything)} {verb} exactly 0, {_says(state, run)}",
        why=WHY if severity is Severity.ERROR else WHY_OPENS if state is State.OPENS else WHY_UNKNOWN,
        hint=HINTS[state],
        value=0.0,
        threshold=0.0,
        evidence=_evidence(state, run),
    )


def _says(state: State, run: Sites) -> str:
    if state is State.OPENS:
        return f"not reported: {_gate(run)}"
    if state is State.NEVER_OPENED:
        return f"and still does after training, though {_some(_opens_by(run[0]))} gets a gradient (error)"
    return {
        State.DEAD: "and no parameter multiplies there and gets a gradient (error): dead, nothing can open it",
        State.FROZEN: "and its parameters are frozen: it stays shut",
        State.DRAWN: "as a branch does that is left out at random while training",
        State.UNREACHED: "and no gradient arrives at the add, so whether it can open is not known",
        State.UNKNOWN: "and no gradient was measured at its parameters, so whether it can open is not known",
    }[state]


def _gate(run: Sites) -> str:
    return f"zero-initialised gate, opens by {_some(_opens_by(run[0]))}"


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _evidence(state: State, run: Sites) -> Evidence:
    facts: Evidence = (("sites", len(run)), ("state", state.value))
    if state is State.OPENS:
        facts += (("not_reported", _gate(run)),)
    return facts + tuple(("branch_op", op) for op in run[0].branch_ops)


RULE = Rule(
    code="GF204",
    slug="dead-branch",
    summary="A residual branch returns exactly zero: it waits to open, or it is dead.",
    meaning=(
        "Looks at every residual site whose branch brings exactly zero to the add. That is how ReZero, "
        "SkipInit, Fixup, zero-gamma and LoRA start, and it is sound where some parameter that multiplies "
        "(a weight, a scale, a gate) gets a gradient: the first step opens the branch. This is info, and "
        "it says by which parameter.\n\n"
        "Where no multiplying parameter gets one the branch is dead. A bias does not count: behind a zero "
        "weight it can shift the sum and never makes it depend on the input.\n\n"
        "After training (--checkpoint, --trained) a branch that is still exactly zero is an error in any "
        "case."
    ),
    formula="‖F‖ = 0, and dL/dp = 0 for every parameter p of the branch but additive biases",
    why=WHY + ".",
    hint=HINTS[State.DEAD] + ".",
    thresholds=LIMITS,
    exemptions=(
        'A zero-initialised branch that can open is not reported as a fault: "not reported: zero-initialised '
        'gate, opens by bn2.weight" is info.',
        "A branch whose parameters are all frozen, and one whose gradient was not measured (a detached one "
        "is GF103's): info.",
        "A branch at whose add no gradient arrives, as under Fixup's zero-initialised head: info.",
        "A branch under DropPath or StochasticDepth in training mode, which is left out at random: info.",
    ),
    sources=(
        "Bachlechner et al., ReZero is all you need, 2020",
        "Zhang et al., Fixup initialization, ICLR 2019",
        "De and Smith, Batch normalization biases residual blocks towards the identity function, 2020 "
        "(SkipInit)",
        "Goyal et al., Accurate, large minibatch SGD, 2017 (zero-gamma)",
        "Hu et al., LoRA, ICLR 2022",
    ),
    phase="both",
    failing_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.branch = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x):
        return x + self.factor * self.branch(x)


model = nn.Sequential(*[Block(factor=0.0 if index == 3 else 0.5) for index in range(8)], nn.Linear(64, 10))
example_inputs = torch.randn(64, 64)
""",
    healthy_example="""\
import torch
from torch import nn

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.branch = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x):
        return x + self.factor * self.branch(x)


model = nn.Sequential(*[Block(factor=0.5) for _ in range(8)], nn.Linear(64, 10))
example_inputs = torch.randn(64, 64)
""",
    check=check,
)
