"""Which layer rows matter, and which findings they carry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gradflow.findings import Finding
from gradflow.report import Report
from gradflow.reporters.folding import Marks
from gradflow.reporters.layer_folding import LayerGroup, fold_layers
from gradflow.reporters.terminal_chart import drop_position
from gradflow.trace_model import Coverage, LayerRecord

SHORT = 20
"""Tables of up to this many rows are shown whole; longer ones are brought down to about as many."""
_MOST_NAMED = 24


def severity_marks(layers: Sequence[LayerRecord], findings: Iterable[Finding]) -> Marks:
    """The severity of the finding about each row, by the row's ``order``; a range marks all between its ends.

    A finding about one place goes before a range that covers it, and then the worse before the milder.
    """
    marks: Marks = {}
    for finding in sorted(
        findings, key=lambda finding: (bool(finding.location.last), -finding.severity.rank)
    ):
        for order in located(layers, finding):
            marks.setdefault(order, finding.severity)
    return marks


def located(layers: Sequence[LayerRecord], finding: Finding) -> list[int]:
    """``order`` of the rows a finding is about: its module's, or all between the ends of its range.

    Modules that were never called stand last whatever they are part of, so they are no end of a range of others.
    """
    first = _rows_of(layers, finding.location.first)
    if not finding.location.last:
        return first
    within = {*first, *_rows_of(layers, finding.location.last)}
    called = {row.order for row in layers if row.coverage is not Coverage.NEVER_CALLED}
    ends = within & called or within
    return [row.order for row in layers if min(ends) <= row.order <= max(ends)] if ends else []


def _rows_of(layers: Sequence[LayerRecord], place: str) -> list[int]:
    """Rows of a module, else of all within it, else of the module that owns a parameter of that name."""
    owner = place.rpartition(".")[0]
    return (
        [row.order for row in layers if row.name == place]
        or [row.order for row in layers if row.name.startswith(f"{place}.")]
        or [row.order for row in layers if row.name == owner]
    )


def shown(report: Report) -> tuple[list[LayerGroup], list[LayerGroup]]:
    """All rows of the folded table, and those of them that matter."""
    layers = report.trace.layers
    groups = fold_layers(layers, severity_marks(layers, report.findings))
    return groups, choose(groups, report)


def choose(groups: Sequence[LayerGroup], report: Report) -> list[LayerGroup]:
    """The groups that matter, in their order.

    All of a short table; else the first and the last, those that findings name, the two around the largest
    drop, and the trunk, thinned evenly until about :data:`SHORT` rows are left.
    """
    if len(groups) <= SHORT:
        return list(groups)
    at = {member.order: index for index, group in enumerate(groups) for member in group.members}
    layers = report.trace.layers
    chosen = {0, len(groups) - 1}
    chosen |= {at[order] for order in _around_drop(report)}
    for finding in _by_severity(report.findings):
        orders = located(layers, finding)
        if orders and len(chosen) < _MOST_NAMED:
            chosen |= {at[orders[0]], at[orders[-1]]}
    trunk = [at[point.layer] for point in report.trace.trunk.points if point.layer in at]
    chosen |= set(_thinned(list(dict.fromkeys(trunk)), SHORT - len(chosen)))
    spare = [index for index in range(len(groups)) if index not in chosen]
    return [groups[index] for index in sorted(chosen | set(_thinned(spare, SHORT // 2 - len(chosen))))]


def _by_severity(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: -finding.severity.rank)


def _around_drop(report: Report) -> list[int]:
    points = report.trace.trunk.points
    before = drop_position(report.trace.trunk)
    ends = () if before is None else points[before : before + 2]
    known = {layer.order for layer in report.trace.layers}
    return [point.layer for point in ends if point.layer is not None and point.layer in known]


def _thinned(items: list[int], limit: int) -> list[int]:
    """At most ``limit`` items, evenly spaced, with both ends."""
    if len(items) <= max(limit, 0):
        return items
    if limit < 2:
        return []
    return [items[round(step * (len(items) - 1) / (limit - 1))] for step in range(limit)]
