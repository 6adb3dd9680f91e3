"""``--try-fixes``: candidate repairs applied in memory, measured again, ranked by what they did."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from gradflow.analyzer import analyze
from gradflow.errors import GradflowError
from gradflow.findings import Finding, Location, Severity
from gradflow.repair_outcomes import Measure, RepairOutcome
from gradflow.report import Report
from gradflow.rules.places import Span, span_of, spans
from gradflow.rules.precedence import BESIDE
from gradflow.rules.sites import ADDING_KINDS, alike
from gradflow.trace_model import ResidualRecord, Trace

if TYPE_CHECKING:
    from gradflow.recording.repairs import Branch, Ground, Repair
    from gradflow.recording.target import Target

HEALTHY_LOG_GAIN = math.log(20)
"""|ln J| up to here is as good as 1: the largest that GF102 says nothing about."""


def try_repairs(
    target: Target, report: Report, *, mode: str | None = None, progress: Callable[[str], None] | None = None
) -> Report:
    """Try every repair that answers a finding of the report.

    The model is left as it was found, whatever a repair does to it.

    Args:
        target: What the report was made of.
        report: The analysis of its recording.
        mode: As it was given to the recording.
        progress: Told in a few words what is going on.

    Returns:
        The report with its ``repairs``, the best first; the same report where no finding has a candidate.
    """
    from gradflow.recording.repairs import REPAIRS

    faults = root_causes(report)
    wanted = [repair for repair in REPAIRS if _answered(repair, faults)]
    if not wanted:
        return report
    trial = _Trial(target=target, report=report, faults=faults, mode=mode)
    outcomes = []
    for repair in wanted:
        if progress is not None:
            progress(f"trying {repair.words}")
        outcome = _outcome(trial, repair)
        outcomes += [outcome] if outcome is not None else []
    return replace(report, repairs=tuple(sorted(outcomes, key=_rank)))


def root_causes(report: Report) -> tuple[Finding, ...]:
    """The findings of severity warning or error that nothing else explains."""
    return tuple(
        finding
        for finding in report.findings
        if finding.consequence_of is None and finding.severity is not Severity.INFO
    )


def measure(report: Report) -> Measure:
    """A report in the numbers that repairs are compared by."""
    severities = [finding.severity for finding in root_causes(report)]
    return Measure(
        gain=report.profile.gain,
        signal_gain=report.profile.signal_gain,
        errors=severities.count(Severity.ERROR),
        warnings=severities.count(Severity.WARNING),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """What every repair is tried on."""

    target: Target
    report: Report
    faults: tuple[Finding, ...]
    mode: str | None


def _answered(repair: Repair, faults: Collection[Finding]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(fault.rule for fault in faults if fault.rule in repair.answers))


def _rank(outcome: RepairOutcome) -> tuple[float, ...]:
    """Fewest root causes first, then the gain nearest 1; equals stay in the order of the registry."""
    if outcome.after is None:
        return (math.inf,)
    return outcome.after.errors, outcome.after.warnings, _distance(outcome.after)


def _distance(after: Measure) -> float:
    """How far the gain is from a healthy one, in logarithms; a gain that is not defined is no distance."""
    if math.isnan(after.gain):
        return 0.0
    log_gain = abs(math.log(after.gain)) if 0 < after.gain < math.inf else math.inf
    return max(0.0, log_gain - HEALTHY_LOG_GAIN)


def _outcome(trial: _Trial, repair: Repair) -> RepairOutcome | None:
    """Try one repair; None where it has nothing to act on."""
    from gradflow.recording.repairs import NothingToRepair

    said = RepairOutcome(
        name=repair.name,
        words=repair.words,
        where=_where(trial, repair),
        code=repair.code,
        answers=_answered(repair, trial.faults),
        before=measure(trial.report),
        after=None,
    )
    try:
        after = _repaired(trial, repair)
    except NothingToRepair:
        return None
    except GradflowError as error:
        return replace(said, note=str(error))
    left = root_causes(after)
    codes = tuple(dict.fromkeys(finding.rule for finding in left))
    return replace(
        said,
        after=measure(after),
        solved=tuple(code for code in said.answers if code not in codes),
        remaining=codes,
        value_before=_value(trial.faults, said.answers[0]),
        value_after=_value(left, said.answers[0]),
    )


def _value(findings: Collection[Finding], code: str) -> float | None:
    return next((finding.value for finding in findings if finding.rule == code), None)


def _repaired(trial: _Trial, repair: Repair) -> Report:
    """Apply, record, put back."""
    from gradflow.recording.execution import record
    from gradflow.recording.repair_runs import repaired

    run = trial.report.trace.run
    with repaired(trial.target, repair, ground_of(trial.report, repair), seed=run.seed) as target:
        trace = record(
            target,
            seed=run.seed,
            trained=run.trained and repair.keeps_weights,
            mode=trial.mode,
        )
    return analyze(trace, trial.report.config)


def ground_of(report: Report, repair: Repair) -> Ground:
    """What a repair acts on: the layers and branches that the root causes it answers are about."""
    from gradflow.recording.repairs import Ground

    trace = report.trace
    names = _scope(trace, [fault for fault in root_causes(report) if fault.rule in repair.answers])
    return Ground(
        parameters=frozenset(p.name for p in trace.parameters if p.module in names and p.requires_grad),
        activation=_activation(trace, names),
        branches=tuple(_branches(trace, names)),
    )


def _scope(trace: Trace, faults: Collection[Finding]) -> frozenset[str]:
    """Modules that the faults are about, and the layers that feed them."""
    known = spans(trace)
    reached = [_widened(span_of(fault.location, known)) for fault in faults]
    return frozenset(
        layer.name for layer in trace.layers if any(first <= layer.order <= last for first, last in reached)
    )


def _widened(span: Span) -> Span:
    return span[0] - BESIDE, span[1]


def _activation(trace: Trace, names: Collection[str]) -> str:
    """The commonest nonlinearity of the scope; "" for none."""
    known = spans(trace)
    inside = [known[name] for name in names if name in known]
    first, last = min((s[0] for s in inside), default=0), max((s[1] for s in inside), default=0) + BESIDE
    ops = [
        a.op.strip("_")
        for a in trace.activations
        if first <= span_of(Location(first=a.name), known)[0] <= last
    ]
    return Counter(ops).most_common(1)[0][0] if ops else ""


def _branches(trace: Trace, names: Collection[str]) -> Iterator[Branch]:
    from gradflow.recording.repairs import Branch

    owners = {parameter.name: parameter.module for parameter in trace.parameters}
    sites = [site for site in trace.residuals if site.kind in ADDING_KINDS]
    usual = _usual_rho(sites)
    for site in sites:
        if any(owners.get(name) in names for name in site.branch_parameters):
            yield Branch(parameters=site.branch_parameters, rho=site.rho, usual_rho=usual.get(site.order))


def _usual_rho(sites: Collection[ResidualRecord]) -> dict[int, float]:
    found: dict[int, float] = {}
    for group in alike(sites).values():
        known = [site.rho for site in group if site.rho is not None and math.isfinite(site.rho)]
        found |= {site.order: median(known) for site in group} if known else {}
    return found


def _where(trial: _Trial, repair: Repair) -> str:
    known = spans(trial.report.trace)
    places = [f.location for f in trial.faults if f.rule in repair.answers]
    places.sort(key=lambda place: span_of(place, known))
    last = max(places, key=lambda place: span_of(place, known)[1])
    return str(Location(first=places[0].first, last=last.last or last.first)) or "the model"
