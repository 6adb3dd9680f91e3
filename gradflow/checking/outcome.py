"""What a check comes to: ignores, baseline and gates applied to the runs, and one exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gradflow import baseline, trace_file
from gradflow.baseline import KnownFinding
from gradflow.checking.module_ignores import IgnoredFinding, ModuleIgnore, set_aside, unused
from gradflow.checking.plan import CheckPlan, TargetPlan
from gradflow.checking.target_runs import TargetFailure, TargetRun
from gradflow.errors import GradflowError
from gradflow.findings import Finding
from gradflow.metric_gates import GATE_RULE, GateResult, gate, gate_finding
from gradflow.report import Report
from gradflow.rules import select_rules

FINDINGS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedTarget:
    """One target, judged; or why it could not be."""

    name: str
    target: str
    """As it was given, or as its table says: "model.py:NAME"."""
    report: Report | None = None
    """With the findings that stand: new ones, known ones marked, failed gates; no ignored ones."""
    failure: TargetFailure | None = None
    ignored: tuple[IgnoredFinding, ...] = ()
    gone: tuple[KnownFinding, ...] = ()
    """What the baseline holds and nothing says any more."""
    gates: tuple[GateResult, ...] = ()

    @property
    def exit_code(self) -> int:
        """Of this target alone."""
        if self.failure is not None:
            return self.failure.exit_code
        return FINDINGS if self.report is not None and self.report.fails(self.report.config.fail_on) else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOutcome:
    """All targets of a check."""

    targets: tuple[CheckedTarget, ...]
    unused_ignores: tuple[ModuleIgnore, ...] = ()
    strict_ignores: bool = False
    stale: tuple[KnownFinding, ...] = ()
    """Lines of the baseline that name targets which are no longer configured."""

    @property
    def exit_code(self) -> int:
        """The highest of the targets' codes: a bug before a model that raised, usage, findings."""
        unused_counts = FINDINGS if self.strict_ignores and self.unused_ignores else 0
        return max((unused_counts, *(target.exit_code for target in self.targets)))

    @property
    def reports(self) -> tuple[Report, ...]:
        """Those of the targets that ran."""
        return tuple(target.report for target in self.targets if target.report is not None)


def judge(plan: CheckPlan, runs: Sequence[TargetRun], known: Sequence[KnownFinding]) -> CheckOutcome:
    """Apply ignores, baseline and gates.

    Args:
        plan: What was to be done.
        runs: What came of each target of the plan, in its order.
        known: Lines of the baseline; empty without one.
    """
    pairs = list(zip(plan.targets, runs, strict=True))
    names = {target.name for target in plan.targets}
    return CheckOutcome(
        targets=tuple(_checked(target, run, known) for target, run in pairs),
        unused_ignores=_unused_ignores(plan, runs),
        strict_ignores=plan.strict_ignores,
        stale=tuple(line for line in known if line.target not in names) if plan.whole else (),
    )


def _checked(plan: TargetPlan, run: TargetRun, known: Sequence[KnownFinding]) -> CheckedTarget:
    if run.report is None:
        return CheckedTarget(name=run.name, target=plan.target, failure=run.failure)
    kept, ignored = set_aside(run.report.findings, plan.ignores)
    compared = baseline.compare(plan.name, kept, run.report.trace, known, codes=_codes(plan))
    try:
        gates = _gates(plan, run.report)
    except GradflowError as error:
        failure = TargetFailure(exit_code=error.exit_code, message=str(error))
        return CheckedTarget(name=run.name, target=plan.target, failure=failure)
    failed = tuple(gate_finding(result, run.report.trace) for result in gates if result.fails)
    return CheckedTarget(
        name=run.name,
        target=plan.target,
        report=replace(run.report, findings=(*compared.findings, *failed), name=_own_name(plan)),
        ignored=ignored,
        gone=compared.gone,
        gates=gates,
    )


def _own_name(plan: TargetPlan) -> str:
    """The name in pyproject.toml; empty where the target of the command line stands in for one."""
    return "" if plan.name == plan.target else plan.name


def _codes(plan: TargetPlan) -> frozenset[str]:
    return frozenset(rule.code for rule in select_rules(plan.config.select, plan.config.ignore))


def _gates(plan: TargetPlan, report: Report) -> tuple[GateResult, ...]:
    if not plan.limits or plan.reference is None:
        return ()
    reference = trace_file.load(Path(plan.folder) / plan.reference)
    return gate(plan.limits, report.trace, reference, name=plan.reference)


def _unused_ignores(plan: CheckPlan, runs: Sequence[TargetRun]) -> tuple[ModuleIgnore, ...]:
    """Those that had their chance: every target they are for was run, and by the rules they are about."""
    ran = {run.name: run.report for run in runs if run.report is not None}
    all_ran = plan.whole and len(ran) == len(runs)
    found: list[ModuleIgnore] = []
    for ignore in dict.fromkeys(ignore for target in plan.targets for ignore in target.ignores):
        theirs = [target for target in plan.targets if ignore in target.ignores]
        had_its_chance = ignore.scope in ran if ignore.scope else all_ran
        if not had_its_chance:
            continue
        findings = [f for target in theirs for f in ran[target.name].findings]
        codes = frozenset(code for target in theirs for code in _codes(target))
        found += unused((ignore,), findings, codes)
    return tuple(found)


def renewed_baseline(
    plan: CheckPlan, outcome: CheckOutcome, known: Sequence[KnownFinding]
) -> tuple[KnownFinding, ...]:
    """The baseline that accepts everything found now; what was not looked at stays as it was."""
    pairs = list(zip(plan.targets, outcome.targets, strict=True))
    new = [
        line
        for target, checked in pairs
        if checked.report is not None
        for line in baseline.known_findings(target.name, _from_rules(checked.report), checked.report.trace)
    ]
    judged = {
        (target.name, code)
        for target, checked in pairs
        if checked.report is not None
        for code in _codes(target)
    }
    unjudged = {target.name for target, checked in pairs if checked.report is None}
    return baseline.renewed(known, new, judged=judged, unjudged=unjudged, whole=plan.whole)


def _from_rules(report: Report) -> list[Finding]:
    """A gate is met or moved, never accepted."""
    return [finding for finding in report.findings if finding.rule != GATE_RULE]
