"""The rows of the ablation table: one a site whose branch was left out."""

from __future__ import annotations

from gradflow.ablation_profile import Effect, effect
from gradflow.trace_file import Row
from gradflow.trace_model import Ablation, BranchAblation, ResidualRecord, Trace

_NOTHING = Effect(change=None, interval=None, relative=None, output_change=None)


def ablation_rows(trace: Trace) -> list[Row]:
    """One row a branch, in execution order; columns: :data:`gradflow.columns.ABLATION_COLUMNS`."""
    if trace.ablation is None:
        return []
    sites = {site.order: site for site in trace.residuals}
    return [_row(branch, sites[branch.order], trace.ablation) for branch in trace.ablation.branches]


def _row(branch: BranchAblation, site: ResidualRecord, ablation: Ablation) -> Row:
    alone = effect(branch, ablation)
    low, high = alone.interval or (None, None)
    place = {removal.order: at for at, removal in enumerate(ablation.removals, 1)}.get(branch.order)
    gone = _NOTHING if place is None else effect(ablation.removals[place - 1], ablation)
    return {
        "order": branch.order,
        "name": site.name,
        "index": site.index,
        "call": site.call,
        "kind": site.kind,
        "samples": max(len(branch.changes), len(branch.output_changes)),
        "loss_change": alone.change,
        "loss_change_low": low,
        "loss_change_high": high,
        "relative_change": alone.relative,
        "output_change": alone.output_change,
        "verdict": alone.verdict,
        "removal": place,
        "removal_loss_change": gone.change,
        "removal_output_change": gone.output_change,
        "note": branch.note,
    }
