"""The residual stream in numbers: how it grows, how deep the gradient sees it, which blocks matter least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from rich.text import Text

from gradflow.report import Report
from gradflow.reporters.anatomy_rows import harm_text, signed, site_effects
from gradflow.reporters.columns_text import TextColumn, TextRow, column_lines, column_widths
from gradflow.reporters.number_text import count_text, number_text, share_text
from gradflow.reporters.screen import Screen
from gradflow.reporters.severity_style import COLOURS, HEADING, LABEL
from gradflow.reporters.text_lines import hanging, one_line
from gradflow.stream_profile import Growth, StreamProfile
from gradflow.trace_model import ResidualRecord

FEWEST_RANKED = 3
"""Of fewer blocks none is the least useful."""
MOST_RANKED = 5
_MOST_STREAMS = 3
_MOST_LAWS = 4
_TAIL = 0.005
"""Path lengths rarer than this at either end are not drawn."""
_ROWS, _COLUMN, _MARGIN = 4, 3, 9
_AXIS = "  branches"
_BLOCKS = " ▁▂▃▄▅▆▇█"


def stream_lines(report: Report, screen: Screen) -> list[Text]:
    """A paragraph and a chart a stream, the longest first."""
    streams = shown_streams(report, show_all=True)
    shown = shown_streams(report, show_all=screen.show_all)
    lines: list[Text] = []
    for at, stream in enumerate(shown):
        lines += [Text("")] if lines else []
        lines += _stream(report, stream, screen, chart=at == 0 or screen.show_all)
    if report.trace.paths_note:
        note = f"not measured: {one_line(report.trace.paths_note)}"
        lines += hanging(Text.assemble("  ", ("exact   ", LABEL)), note, screen.width)
    if len(streams) > len(shown):
        lines.append(Text(f"  … {count_text(len(streams) - len(shown), 'shorter stream')}: --all"))
    return lines


def shown_streams(report: Report, *, show_all: bool = False) -> list[StreamProfile]:
    """Streams of more than one site, the longest first; a few of them but for ``show_all``."""
    streams = [stream for stream in report.streams if len(stream.sites) > 1]
    return streams if show_all else streams[:_MOST_STREAMS]


def stream_facts(report: Report, stream: StreamProfile) -> list[tuple[str, str]]:
    """A label and a sentence each: growth, depth, paths."""
    sites = {site.order: site for site in report.trace.residuals}
    laws = [_law(law, stream, sites) for law in stream.growth[:_MOST_LAWS]]
    more = len(stream.growth) - len(laws)
    laws += [f"and {count_text(more, 'more stretch')}"] if more > 0 else []
    found = [("growth", "; ".join(laws))]
    if stream.effective_depth is not None:
        found.append(("depth", _depth(stream)))
    if stream.path_lengths:
        found.append(("paths", _paths(stream)))
    if stream.exact is not None:
        found.append(("exact", _exact(stream)))
    return [(label, sentence) for label, sentence in found if sentence]


def stream_name(report: Report, stream: StreamProfile) -> str:
    """ "24 sites, h.0 to h.11"."""
    sites = {site.order: site for site in report.trace.residuals}
    ends = [one_line(sites[order].name) or "(model)" for order in (stream.sites[0], stream.sites[-1])]
    inside = f", in a branch of {one_line(sites[stream.parent].name)}" if stream.parent in sites else ""
    span = ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
    return f"{count_text(len(stream.sites), 'site')}, {span}{inside}"


def _stream(report: Report, stream: StreamProfile, screen: Screen, *, chart: bool) -> list[Text]:
    lines = hanging(Text.assemble(("Stream", HEADING), "  "), stream_name(report, stream), screen.width)
    for label, sentence in stream_facts(report, stream):
        lines += hanging(Text.assemble("  ", (f"{label:<8}", LABEL)), sentence, screen.width)
        if label == "paths" and chart:
            lines += path_chart(stream.path_lengths, screen.width)
    return lines


def _law(law: Growth, stream: StreamProfile, sites: dict[int, ResidualRecord]) -> str:
    ends = [one_line(sites[order].name) for order in (law.first, law.last)]
    whole = (law.first, law.last) == (stream.sites[0], stream.sites[-1])
    span = "" if whole else f" from {ends[0]} to {ends[1]}"
    what = {
        "constant": f"variance stays at {number_text(law.start)}",
        "linear": f"variance {number_text(law.start)}, then {signed(law.rate)} a site",
        "exponential": f"variance {number_text(law.start)}, then ×{number_text(law.rate)} a site",
    }[law.law]
    explained = "" if law.r_squared is None else f", R² {number_text(law.r_squared, 2)}"
    fit = f"within {share_text(law.deviation).lstrip('<')}{explained}"
    return f"{law.law}{span}: {what} ({fit})"


def _depth(stream: StreamProfile) -> str:
    share = "" if stream.depth_share is None else f" ({share_text(stream.depth_share)})"
    return (
        f"D_eff, the branches that a path of the gradient takes on average: {number_text(stream.effective_depth)} of "
        f"{count_text(stream.measured, 'site')}{share}; branches of unit variance behind a norm would give "
        f"{number_text(stream.normalised_depth)}, branches as large as their skip "
        f"{number_text(stream.unnormalised_depth)}"
    )


def _paths(stream: StreamProfile) -> str:
    low, high = _middle_range(stream.path_lengths)
    cosine = ""
    if stream.largest_cosine is not None and stream.largest_cosine > 0.1:
        cosine = (
            f"; an estimate: what skip and branch bring back has a cosine of up to "
            f"{number_text(stream.largest_cosine, 2)}"
        )
    span = f"{low} to {high} branches" if low != high else count_text(low, "branch", "branches")
    return f"at least 90% of the gradient's energy passes {span}{cosine}"


def _middle_range(shares: Sequence[float]) -> tuple[int, int]:
    """The path lengths between which all but 5% at either end lies."""
    sums = list(accumulate(shares))
    low = next((at for at, total in enumerate(sums) if total > 0.05), 0)
    high = next((at for at, total in enumerate(sums) if total >= 0.95 * sums[-1]), len(sums) - 1)
    return low, high


def _exact(stream: StreamProfile) -> str:
    if stream.exact is None:
        return ""
    parts = [
        f"{order} {_percent(share)}"
        for order, share in enumerate(stream.exact.inner_products)
        if abs(share) >= _TAIL
    ]
    return f"share of the gradient by branches passed, measured: {', '.join(parts)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if math.isfinite(share) else number_text(share)


def path_chart(shares: Sequence[float], width: int) -> list[Text]:
    """Vertical bars: how much of the gradient's energy passes 0, 1, 2 ... branches."""
    kept = [at for at, share in enumerate(shares) if share >= _TAIL]
    if len(kept) < 2:
        return []
    first, last = (0 if kept[0] <= 3 else kept[0]), kept[-1]
    drawn = list(shares[first : last + 1])
    room = width - _MARGIN - len(_AXIS) - 2
    column = _COLUMN if len(drawn) * _COLUMN <= room else 1
    drawn = drawn[: room // column]
    top = max(drawn)
    lines = []
    for row in range(_ROWS):
        cells = "".join(_bar(share / top, _ROWS - 1 - row, column) for share in drawn)
        label = share_text(top) if row == 0 else ""
        lines.append(Text.assemble(f"  {label:>5} {'┤' if label else '│'}", (cells, COLOURS[None])))
    lines.append(Text(f"        └{'─' * (column * len(drawn))}"))
    lines.append(Text(f"{' ' * _MARGIN}{_axis(first, len(drawn), column)}{_AXIS}"))
    return lines


def _bar(share: float, row: int, column: int) -> str:
    eighths = max(1, round(share * _ROWS * 8)) if share > 0 else 0
    return (_BLOCKS[max(0, min(8, eighths - 8 * row))] * max(1, column - 1)).ljust(column)


def _axis(first: int, count: int, column: int) -> str:
    each = 1 if column > 1 and first + count <= 100 else 5
    cells = [" "] * (count * column + 2)
    for at in range(0, count):
        if (first + at) % each == 0:
            for offset, char in enumerate(str(first + at)):
                cells[at * column + offset] = char
    return "".join(cells).rstrip()


def ranking_lines(report: Report, screen: Screen) -> list[Text]:
    """The blocks of the longest stream that do least, by the cheap measures, beside their ablation."""
    stream, rows = report.stream, ranking_rows(report, show_all=screen.show_all)
    if stream is None or not rows:
        return []
    of = f"{len(rows)} of {count_text(len(stream.ranking), 'site')}, by block influence; in brackets the other ranks"
    angle = ANGLE if "angle" in column_widths(rows, RANKING_COLUMNS, _RANKING_GIVES_WAY, screen.width) else ""
    return [
        *hanging(Text.assemble(("Least useful", HEADING), "  "), f"{of}{angle}", screen.width),
        *column_lines(rows, RANKING_COLUMNS, _RANKING_GIVES_WAY, screen.width),
    ]


ANGLE = "; angle: between x and x + F, in half turns"
_RANKING_GIVES_WAY = ("angle",)


RANKING_COLUMNS = {
    "name": TextColumn(heading="block", left=True),
    "influence": TextColumn(heading="influence"),
    "rho": TextColumn(heading="ρ"),
    "angle": TextColumn(heading="angle"),
    "share": TextColumn(heading="∂branch"),
    "without": TextColumn(heading="without"),
}


def ranking_rows(report: Report, *, show_all: bool = False) -> list[TextRow]:
    """Least useful first, a few of them but for ``show_all``; none where no block stands out from another."""
    stream = report.stream
    if stream is None or len(stream.ranking) < FEWEST_RANKED:
        return []
    if len({block.block_influence for block in stream.ranking}) == 1:
        return []
    most = len(stream.ranking) if show_all else MOST_RANKED
    effects = site_effects(report)
    several = {(site.name, site.call) for site in report.trace.residuals if site.index > 0}
    sites = {site.order: site for site in report.trace.residuals}
    rows = []
    for block in stream.ranking[:most]:
        site, found = sites[block.order], effects.get(block.order)
        part = f"[{site.index}]" if (site.name, site.call) in several else ""
        rows.append(
            TextRow(
                cells={
                    "name": f"{one_line(site.name) or '(model)'}{part}",
                    "influence": number_text(block.block_influence),
                    "rho": _ranked(number_text(block.rho), block.rho_rank),
                    "angle": _ranked(number_text(block.angular_distance), block.angular_rank),
                    "share": _ranked(share_text(block.path_share), block.path_rank),
                    "without": harm_text([found]),
                }
            )
        )
    return rows


def _ranked(text: str, rank: int | None) -> str:
    return "" if rank is None else f"{text} ({rank})"
