"""Residual sites as rows: folded like layers, chosen where there are many, their cells as text.

Nothing is drawn here, but for the bars: a character a site, which every form of output may use.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gradflow.findings import Finding, Severity
from gradflow.report import Report
from gradflow.reporters.folding import Fold, Foldable, Marks, fold, unfold
from gradflow.reporters.number_text import count_text, middle, number_text, range_text
from gradflow.reporters.text_lines import one_line
from gradflow.trace_model import ResidualRecord

SHORT = 20
"""Up to this many rows are shown whole; longer tables are thinned to about as many."""
BAR_LOW, BAR_HIGH = 0.01, 3.0
"""Rho of the lowest bar and of the highest; between them a logarithmic scale."""
_BARS = "▁▂▃▄▅▆▇█"
_BLOCK_RULES = "GF2"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRow:
    """What stands in one row."""

    mark: Severity | None
    cells: dict[str, str]
    """"" for a number that no member has."""
    rhos: tuple[float | None, ...]
    """Of the members, in execution order; empty where none was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteTable:
    """The rows to show, and how many were left out."""

    rows: tuple[SiteRow, ...]
    left_out: int
    folded: bool
    """Some row stands for several sites."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenFolds:
    """Sites grouped into the rows to show."""

    folds: tuple[Fold, ...]
    marks: Marks
    """The severity of the finding about each site, by its ``order``."""
    left_out: int
    folded: bool


def site_table(report: Report, *, show_all: bool = False) -> SiteTable:
    """Shape the section: every site by itself, or folded and, beyond :data:`SHORT` rows, thinned."""
    chosen = chosen_folds(report, show_all=show_all)
    return SiteTable(
        rows=tuple(_row(found, report.trace.residuals, chosen.marks) for found in chosen.folds),
        left_out=chosen.left_out,
        folded=chosen.folded,
    )


def chosen_folds(report: Report, *, show_all: bool = False) -> ChosenFolds:
    """Which sites stand in which row; members of a fold are positions among the trace's sites."""
    sites = report.trace.residuals
    marks = site_marks(sites, report.findings)
    foldable = _foldable(sites, marks)
    folds = unfold(foldable) if show_all else fold(foldable)
    chosen = folds if show_all else _choose(folds, sites, marks)
    return ChosenFolds(
        folds=tuple(chosen),
        marks=marks,
        left_out=len(folds) - len(chosen),
        folded=len(folds) < len(sites),
    )


def site_marks(sites: Sequence[ResidualRecord], findings: Iterable[Finding]) -> Marks:
    """The severity of the finding about each site, by its ``order``; only rules about blocks judge one."""
    marks: Marks = {}
    about_blocks = [finding for finding in findings if finding.rule.startswith(_BLOCK_RULES)]
    for finding in sorted(about_blocks, key=lambda found: (bool(found.location.last), -found.severity.rank)):
        for order in _located(sites, finding):
            marks.setdefault(order, finding.severity)
    return marks


def _located(sites: Sequence[ResidualRecord], finding: Finding) -> list[int]:
    first = _sites_of(sites, finding.location.first)
    if not finding.location.last:
        return first
    ends = first + _sites_of(sites, finding.location.last)
    return [site.order for site in sites if min(ends) <= site.order <= max(ends)] if ends else []


def _sites_of(sites: Sequence[ResidualRecord], place: str) -> list[int]:
    """Sites of a module, else of all within it."""
    return [site.order for site in sites if site.name == place] or [
        site.order for site in sites if site.name.startswith(f"{place}.")
    ]


def _foldable(sites: Sequence[ResidualRecord], marks: Marks) -> list[Foldable]:
    """A site's number stands beside its module's name only where the module has several."""
    several = Counter((site.name, site.call) for site in sites)
    return [
        Foldable(
            name=site.name,
            part=str(site.index) if several[site.name, site.call] > 1 else "",
            call=site.call,
            alike=(site.kind, site.branch_ops, marks.get(site.order)),
        )
        for site in sites
    ]


def _choose(folds: Sequence[Fold], sites: Sequence[ResidualRecord], marks: Marks) -> list[Fold]:
    """All of a short table; else those with a finding, and the others thinned evenly with both ends."""
    if len(folds) <= SHORT:
        return list(folds)
    marked = [at for at, found in enumerate(folds) if sites[found.members[0]].order in marks]
    kept = set(_thinned(marked, SHORT))
    rest = [at for at in range(len(folds)) if at not in kept]
    kept |= set(_thinned(rest, max(2, SHORT - len(kept))))
    return [folds[at] for at in sorted(kept)]


def _thinned(items: list[int], limit: int) -> list[int]:
    if len(items) <= limit:
        return items
    return [items[round(step * (len(items) - 1) / (limit - 1))] for step in range(limit)]


def _row(found: Fold, sites: Sequence[ResidualRecord], marks: Marks) -> SiteRow:
    members = [sites[at] for at in found.members]
    rhos = tuple(site.rho for site in members)
    ratio = middle(site.gradient_ratio for site in members)
    cells = {
        "name": one_line(found.label),
        "kind": members[0].kind,
        "rho": measured_text(range_text(rhos), rhos),
        "cosine": _median([site.cosine for site in members]),
        "influence": _median([site.block_influence for site in members]),
        "gradient": "" if ratio is None else f"×{number_text(ratio)}",
        "scale": _median([site.branch_scale for site in members]),
    }
    measured = any(rho is not None for rho in rhos)
    return SiteRow(mark=marks.get(members[0].order), cells=cells, rhos=rhos if measured else ())


def _median(values: Sequence[float | None]) -> str:
    return measured_text(number_text(middle(values)), values)


def measured_text(text: str, values: Iterable[float | None]) -> str:
    """Nothing where nothing was measured: dashes in all cells of a concat's row would be noise."""
    return text if any(value is not None for value in values) else ""


def bars(rhos: Sequence[float | None], width: int) -> str:
    """A character a site, or a few neighbours by the one furthest from 1; at most ``width`` characters."""
    each = math.ceil(len(rhos) / width) if rhos else 1
    return "".join(_bar(_representative(rhos[at : at + each])) for at in range(0, len(rhos), each))


def _representative(rhos: Sequence[float | None]) -> float | None:
    """The rho that must not be missed: a broken one, a zero, or the one furthest from 1."""
    measured = [rho for rho in rhos if rho is not None]
    broken = [rho for rho in measured if not math.isfinite(rho)]
    if broken or not measured:
        return broken[0] if broken else None
    return 0.0 if 0.0 in measured else max(measured, key=lambda rho: abs(math.log(rho)))


def _bar(rho: float | None) -> str:
    if rho is None:
        return "·"
    if not math.isfinite(rho):
        return "✗"
    if rho == 0.0:
        return "0"
    share = math.log(rho / BAR_LOW) / math.log(BAR_HIGH / BAR_LOW)
    return _BARS[max(0, min(len(_BARS) - 1, round(share * (len(_BARS) - 1))))]


def counted(sites: Sequence[ResidualRecord]) -> str:
    """ "24 sites: 20 identity, 4 projection"."""
    kinds = Counter(site.kind for site in sites)
    if len(kinds) == 1:
        return count_text(len(sites), f"{sites[0].kind} site")
    return f"{len(sites):,} sites: {', '.join(f'{count:,} {kind}' for kind, count in kinds.items())}"
