"""The residual skeleton as rows: a block a row, repeats folded where there are many."""

from __future__ import annotations

from collections.abc import Sequence

from gradflow.ablation_profile import Effect, effect
from gradflow.report import Report
from gradflow.reporters.columns_text import TextRow
from gradflow.reporters.number_text import middle, number_text, range_text, share_text
from gradflow.reporters.op_text import branch_text
from gradflow.reporters.site_rows import bars, chosen_folds, measured_text
from gradflow.reporters.text_lines import one_line
from gradflow.trace_model import ResidualRecord

ONE_BY_ONE = 32
"""Up to this many sites stand one a row."""
_BARS = 16


def skeleton_rows(report: Report, *, show_all: bool = False) -> tuple[list[TextRow], int, bool]:
    """The rows, how many more there are, and whether some row stands for several sites."""
    sites = report.trace.residuals
    chosen = chosen_folds(report, show_all=show_all or len(sites) <= ONE_BY_ONE)
    effects = site_effects(report)
    rows = [
        TextRow(
            cells=_cells(found.label, [sites[at] for at in found.members], effects),
            mark=chosen.marks.get(sites[found.members[0]].order),
        )
        for found in chosen.folds
    ]
    return rows, chosen.left_out, chosen.folded


def site_effects(report: Report) -> dict[int, Effect]:
    """What leaving each branch out changes, by the ``order`` of its site; empty without an ablation."""
    ablation = report.trace.ablation
    if ablation is None:
        return {}
    return {branch.order: effect(branch, ablation) for branch in ablation.branches}


def _cells(label: str, members: Sequence[ResidualRecord], effects: dict[int, Effect]) -> dict[str, str]:
    first = members[0]
    rhos = [site.rho for site in members]
    return {
        "name": ("└ " if first.parent is not None else "") + one_line(label),
        "kind": kind_text(first),
        "branch": branch_text(first.branch_ops),
        "norm": first.norm_placement,
        "rho": measured_text(range_text(rhos), rhos),
        "bars": bars(rhos, _BARS) if any(rho is not None for rho in rhos) else "",
        "cosine": _median([site.cosine for site in members]),
        "influence": _median([site.block_influence for site in members]),
        "share": _shares([site.path_share for site in members]),
        "turn": _median([site.gradient_cosine for site in members]),
        "growth": _factor([_growth(site) for site in members]),
        "scale": _median([site.branch_scale for site in members]),
        "without": harm_text([effects.get(site.order) for site in members]),
    }


def kind_text(site: ResidualRecord) -> str:
    """ "identity", "2 parallel", "projection"."""
    return f"{site.branches} parallel" if site.branches > 1 else site.kind


def _growth(site: ResidualRecord) -> float | None:
    if not site.source_variance or site.variance is None or site.kind == "concat":
        return None
    return site.variance / site.source_variance


def _median(values: Sequence[float | None]) -> str:
    return measured_text(number_text(middle(values), 2), values)


def _shares(values: Sequence[float | None]) -> str:
    return measured_text(share_text(middle(values)), values)


def _factor(values: Sequence[float | None]) -> str:
    return measured_text(f"×{number_text(middle(values))}", values)


def harm_text(effects: Sequence[Effect | None]) -> str:
    """What leaving the branch out does: the median change of the loss, without one that of the output."""
    losses = [found.change for found in effects if found is not None]
    if middle(losses) is not None:
        return signed(middle(losses))
    outputs = [found.output_change for found in effects if found is not None]
    return measured_text(share_text(middle(outputs)), outputs)


def signed(value: float | None) -> str:
    """+0.012, -3.1e-05, 0: a change with its sign; a dash for not measured."""
    text = number_text(value, 2)
    return f"+{text}" if value is not None and value > 0 else text
