"""What the rules about the optimizer's step share: which parameters to judge, and one finding for neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gradflow.findings import Finding, Location, Severity
from gradflow.rules.gain import Evidence
from gradflow.rules.places import fold, place_of, runs
from gradflow.rules.rule import Rule
from gradflow.trace_model import ParameterRecord, Trace

ENOUGH_STEPS = 10
"""Before so many steps of the optimizer an update is that of its start, not of the training."""
PROBE = "probe"
"""The loss of a run without one: its gradients have no scale of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedUpdate:
    """One parameter and the clause that was exceeded."""

    parameter: ParameterRecord
    severity: Severity
    clause: str
    value: float
    threshold: float
    words: str
    why: str
    hint: str
    badness: float
    """Larger is worse, within one clause."""


def matrices(trace: Trace) -> list[ParameterRecord]:
    """Return the parameters to judge: of two dimensions or more, not zero, with a gradient that is not.

    Without a loss the gradient has no scale, so only optimizers like Adam, which have none either, are judged.
    """
    probe = trace.run.loss == PROBE
    return [
        p
        for p in trace.parameters
        if len(p.shape) > 1 and p.norm and p.gradient_norm and not (probe and p.gradient_to_eps is None)
    ]


def grouped(rule: Rule, judged: Sequence[JudgedUpdate], trace: Trace) -> Iterator[Finding]:
    """Yield one finding for each clause and run of neighbouring modules of one severity."""
    everything = list(dict.fromkeys(_unit(p) for p in trace.parameters if len(p.shape) > 1))
    for clause, severity in dict.fromkeys((item.clause, item.severity) for item in judged):
        mine = [item for item in judged if (item.clause, item.severity) == (clause, severity)]
        for run in fold(runs({_unit(item.parameter) for item in mine}, everything)):
            members = [item for item in mine if _unit(item.parameter) in run]
            yield _finding(rule, place_of(run, everything), members, trace)


def _unit(parameter: ParameterRecord) -> str:
    """What a parameter is reported as: its module; those of the model itself by their own names."""
    return parameter.module or parameter.name


def _finding(rule: Rule, place: Location, members: Sequence[JudgedUpdate], trace: Trace) -> Finding:
    worst = max(members, key=lambda item: item.badness)
    many = f"{len(members)} weights, at worst {worst.parameter.name}: " if len(members) > 1 else ""
    return Finding(
        rule=rule.code,
        slug=rule.slug,
        severity=worst.severity,
        location=place,
        message=many + worst.words,
        why=worst.why,
        hint=worst.hint,
        value=worst.value,
        threshold=worst.threshold,
        evidence=_evidence(worst, len(members), trace),
    )


def _evidence(worst: JudgedUpdate, count: int, trace: Trace) -> Evidence:
    parameter = worst.parameter
    facts = (
        ("cause", worst.clause),
        ("parameter", parameter.name),
        ("parameters", count),
        ("dtype", parameter.dtype),
        ("optimizer", trace.run.optimizer),
        ("optimizer_steps", trace.run.optimizer_steps),
        ("update_ratio", parameter.update_ratio),
        ("update_lost", parameter.update_lost),
        ("gradient_to_eps", parameter.gradient_to_eps),
    )
    return tuple((name, fact) for name, fact in facts if fact is not None)
