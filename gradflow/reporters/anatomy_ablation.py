"""What leaving branches out changes: the verdicts, the ends of the order, how well the cheap measures foretell it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

from rich.text import Text

from gradflow.ablation_profile import Agreement, Effect, agreements, effect
from gradflow.report import Report
from gradflow.reporters.anatomy_rows import signed, site_effects
from gradflow.reporters.columns_text import TextColumn, TextRow, column_lines, column_widths
from gradflow.reporters.number_text import count_text, number_text, share_text
from gradflow.reporters.screen import Screen
from gradflow.reporters.severity_style import HEADING, LABEL
from gradflow.reporters.text_lines import hanging, one_line
from gradflow.trace_model import Ablation, BranchAblation, ResidualRecord

SHORT = 10
"""Up to this many branches are all listed; else the ends of the order."""
_MOST_STEPS = 12
_NO_LOSS = "no loss: how far the output moves, ‖change of y‖ / ‖y‖, stands for it"
_MOST_NOTES = 3
COLUMNS = {
    "name": TextColumn(heading="without", left=True),
    "change": TextColumn(heading="loss"),
    "interval": TextColumn(heading="95% interval"),
    "relative": TextColumn(heading="relative"),
    "output": TextColumn(heading="output"),
    "verdict": TextColumn(heading="", left=True),
}
AGREEMENT_COLUMNS = {
    "measure": TextColumn(heading="rank correlation", left=True),
    "blocks": TextColumn(heading="blocks"),
    "loss": TextColumn(heading="loss: Spearman"),
    "loss_kendall": TextColumn(heading="Kendall"),
    "output": TextColumn(heading="output: Spearman"),
    "output_kendall": TextColumn(heading="Kendall"),
}


_GIVES_WAY = ("relative", "output", "interval")
_LEGEND = {
    "change": "loss: its change without the branch",
    "relative": "relative: that over the loss",
    "output": "output: ‖change of y‖ / ‖y‖",
}
_AGREEMENT_GIVES_WAY = ("blocks", "output_kendall", "loss_kendall")


def ablation_lines(report: Report, screen: Screen) -> list[Text]:
    """The section; nothing where no branch was left out."""
    ablation = report.trace.ablation
    if ablation is None:
        return []
    heading = Text.assemble(("Ablation", HEADING), "  ")
    rows, left_out = ablation_rows(report, show_all=screen.show_all)
    lines = hanging(heading, ablation_summary(ablation), screen.width)
    lines += _table_lines(rows, ablation, screen.width) if rows else []
    if left_out:
        lines.append(Text(f"  … {count_text(left_out, 'branch', 'branches')} between: --all"))
    found = agreements(report.trace)
    if found:
        lines += [
            Text(""),
            *column_lines(agreement_rows(found), AGREEMENT_COLUMNS, _AGREEMENT_GIVES_WAY, screen.width),
        ]
    for label, sentence in [
        ("greedy", greedy_text(report)),
        *(("note", note) for note in ablation_notes(report)),
    ]:
        if sentence:
            lines += hanging(Text.assemble("  ", (f"{label:<8}", LABEL)), sentence, screen.width)
    return lines


def _table_lines(rows: Sequence[TextRow], ablation: Ablation, width: int) -> list[Text]:
    legend = legend_text(ablation, column_widths(rows, COLUMNS, _GIVES_WAY, width))
    lines = column_lines(rows, COLUMNS, _GIVES_WAY, width)
    return [*lines, *(hanging(Text("  "), legend, width) if legend else [])]


def legend_text(ablation: Ablation, columns: Iterable[str]) -> str:
    """What the columns hold; "" without a loss, where the summary says it."""
    return "; ".join(_LEGEND[column] for column in columns if column in _LEGEND) if ablation.losses else ""


def ablation_summary(ablation: Ablation) -> str:
    """What was run, and what came of it."""
    samples = max(
        (len(branch.output_changes) or len(branch.changes) for branch in ablation.branches), default=0
    )
    on = {
        "batches": f"{samples} batches",
        "seeds": f"{samples} seeds of one batch",
        "": "one batch and seed, so no interval",
    }[ablation.varied]
    count = len(ablation.branches)
    what = f"{count:,} branches left out, one at a time" if count != 1 else "the one branch left out"
    whole = f"loss {number_text(fmean(ablation.losses))} with all" if ablation.losses else _NO_LOSS
    verdicts = Counter(effect(branch, ablation).verdict for branch in ablation.branches)
    words = {"worse": "worse without", "better": "better without", "no difference": "no difference"}
    told = [f"{verdicts[key]} {text}" for key, text in words.items() if verdicts[key]]
    return "; ".join([f"{what}, {on}", whole, *([", ".join(told)] if told else [])])


def ablation_rows(report: Report, *, show_all: bool = False) -> tuple[list[TextRow], int]:
    """Most useful first, by the loss or else the output; and how many between the ends are left out."""
    effects = site_effects(report)
    measured = {order: found for order, found in effects.items() if found.harm is not None}
    order = sorted(measured, key=lambda order: -(measured[order].harm or 0.0))
    half = SHORT // 2
    shown = order if show_all or len(order) <= SHORT else [*order[:half], *order[-half:]]
    names = site_names(report.trace.residuals)
    return [_row(names[order], effects[order]) for order in shown], len(order) - len(shown)


def site_names(sites: Sequence[ResidualRecord]) -> dict[int, str]:
    """Name of each site by its ``order``; with its index where its module has several."""
    several = {(site.name, site.call) for site in sites if site.index > 0}
    return {
        site.order: (one_line(site.name) or "(model)")
        + (f"[{site.index}]" if (site.name, site.call) in several else "")
        for site in sites
    }


def _row(name: str, found: Effect) -> TextRow:
    interval = "" if found.interval is None else " to ".join(signed(end) for end in found.interval)
    return TextRow(
        cells={
            "name": name,
            "change": "" if found.change is None else signed(found.change),
            "interval": interval,
            "relative": "" if found.relative is None else f"{100 * found.relative:+.2g}%",
            "output": share_text(found.output_change) if found.output_change is not None else "",
            "verdict": "" if found.verdict == "changed" else found.verdict,
        }
    )


def agreement_rows(found: Sequence[Agreement]) -> list[TextRow]:
    """A cheap measure a row."""
    return [
        TextRow(
            cells={
                "measure": agreement.measure.replace("rho", "ρ"),
                "blocks": str(agreement.blocks),
                "loss": _correlation(agreement.spearman),
                "loss_kendall": _correlation(agreement.kendall),
                "output": _correlation(agreement.output_spearman),
                "output_kendall": _correlation(agreement.output_kendall),
            }
        )
        for agreement in found
    ]


def _correlation(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def greedy_text(report: Report) -> str:
    """The order of removal, and what it comes to."""
    ablation = report.trace.ablation
    if ablation is None or not ablation.removals:
        return ""
    names = site_names(report.trace.residuals)
    steps = [
        f"{names[removal.order]} {signed(effect(removal, ablation).harm)}"
        for removal in ablation.removals[:_MOST_STEPS]
    ]
    more = len(ablation.removals) - len(steps)
    rest = f", and {more} more (ablation.csv)" if more > 0 else ""
    return f"least harmful first, change of the {ablation.measure} with all so far gone: {', '.join(steps)}{rest}"


def ablation_notes(report: Report) -> list[str]:
    """What could not be measured, and what to know."""
    ablation = report.trace.ablation
    if ablation is None:
        return []
    names = site_names(report.trace.residuals)
    lost = [branch for branch in ablation.branches if branch.note]
    notes = [*ablation.notes, *_grouped(lost, names)]
    more = len(notes) - _MOST_NOTES
    return [*notes[:_MOST_NOTES], *([f"and {more} more: ablation.csv"] if more > 0 else [])]


def _grouped(lost: Sequence[BranchAblation], names: dict[int, str]) -> list[str]:
    by_note: dict[str, list[str]] = {}
    for branch in lost:
        by_note.setdefault(branch.note, []).append(names[branch.order])
    return [f"not measured for {', '.join(found)}: {one_line(note)}" for note, found in by_note.items()]
