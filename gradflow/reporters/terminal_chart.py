"""The gradient's profile along the trunk as a small bar chart, on a logarithmic scale.

:func:`shape_chart` decides what stands where; :func:`chart_lines` only draws it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from rich.cells import cell_len
from rich.text import Text

from gradflow.findings import Severity
from gradflow.report import Report
from gradflow.reporters.number_text import count_text, number_text
from gradflow.reporters.severity_style import COLOURS, HEADING
from gradflow.reporters.text_lines import hanging, one_line, shorten
from gradflow.trace_model import Trunk
from gradflow.trunk_profile import drops

_FLOW_RULES = ("GF101", "GF102", "GF104")
_BLOCKS = " ▁▂▃▄▅▆▇█"
_MARGIN = 9
_WIDEST_BAR, _WIDEST_CHART = 6, 110
_TRUNK_WORDS = {"residual": "outputs of residual adds", "weights": "outputs of weight layers"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A profile laid out: one bar for one tensor or for a few neighbours."""

    bars: tuple[float | None, ...]
    """Gain of each bar: 0, NaN and Inf are drawn as signs, None (not measured) as a gap."""
    bar_width: int
    tensors_per_bar: int
    top: int
    """Power of ten at the upper edge."""
    step: int
    """Powers of ten between two labels."""
    intervals: int
    """0 where no bar has a height: then there is one row, for the signs."""
    rows_per_interval: int
    drop_bar: int | None
    """The bar on the far side of the largest drop, going back."""

    @property
    def height(self) -> int:
        return max(1, self.intervals * self.rows_per_interval)

    def eighths(self, gain: float) -> int:
        """How high a bar is, in eighths of a row; at least one."""
        bottom = self.top - self.intervals * self.step
        share = (math.log10(gain) - bottom) / (self.top - bottom)
        return max(1, round(share * self.height * 8))


def relative_gradients(trunk: Trunk) -> tuple[tuple[float | None, ...], bool]:
    """g_k / g_K of each tensor and True; the bare g_k and False where the last one gives no scale."""
    norms = tuple(point.gradient_norm for point in trunk.points)
    last = last_gradient(trunk)
    if last is None:
        return norms, False
    return tuple(None if norm is None else norm / last for norm in norms), True


def last_gradient(trunk: Trunk) -> float | None:
    """g_K, which gains are relative to; None where it is missing, zero or not finite."""
    last = trunk.points[-1].gradient_norm if trunk.points else None
    return last if last is not None and math.isfinite(last) and last > 0 else None


def shape_chart(gains: Sequence[float | None], width: int, drop_at: int | None) -> Chart:
    """Lay a profile out in ``width`` columns.

    Args:
        gains: One a tensor, first to last.
        width: Columns of the whole screen.
        drop_at: Position in ``gains`` of the tensor just before the largest drop, or None.
    """
    room = min(width - _MARGIN, _WIDEST_CHART)
    per_bar = math.ceil(len(gains) / room)
    bars = tuple(_representative(gains[at : at + per_bar]) for at in range(0, len(gains), per_bar))
    heights = [gain for gain in gains if gain is not None and _has_height(gain)]
    top, step, intervals = _scale(heights) if heights else (0, 0, 0)
    return Chart(
        bars=bars,
        bar_width=max(1, min(_WIDEST_BAR, room // len(bars))),
        tensors_per_bar=per_bar,
        top=top,
        step=step,
        intervals=intervals,
        rows_per_interval=3 if intervals == 2 else 2,
        drop_bar=None if drop_at is None else drop_at // per_bar,
    )


def _has_height(gain: float | None) -> bool:
    return gain is not None and math.isfinite(gain) and gain > 0


def _representative(gains: Sequence[float | None]) -> float | None:
    """The gain that must not be missed: a broken one, a zero, or the one furthest from 1."""
    measured = [gain for gain in gains if gain is not None]
    for gain in measured:
        if not math.isfinite(gain):
            return gain
    if not measured or 0 in measured:
        return 0.0 if measured else None
    return max(measured, key=lambda gain: abs(math.log10(gain)))


def _scale(gains: Sequence[float]) -> tuple[int, int, int]:
    """Upper power of ten, powers between labels, and two to four intervals that hold all gains."""
    logs = [math.log10(gain) for gain in gains]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    # Two decades at least: a healthy profile must look flat.
    if high - low == 0:
        low, high = low - 1, high + 1
    elif high - low == 1:
        low, high = (low, high + 1) if high <= 0 else (low - 1, high)
    step = math.ceil((high - low) / 4)
    return high, step, max(2, math.ceil((high - low) / step))


def chart_lines(report: Report, width: int) -> list[Text]:
    """The section: a heading, the chart, and what it says in numbers."""
    trunk = report.trace.trunk
    gains, relative = relative_gradients(trunk)
    if len(gains) < 2 or not any(gain is not None for gain in gains):
        told = [Text(f"  {fact}") for fact in _side_by_side(report)]
        return [Text("Gradient along the depth", style=HEADING), *_no_chart(len(gains), width), *told]
    chart = shape_chart(gains, width, drop_position(trunk))
    colour = COLOURS[_flow_severity(report)]
    return [
        *_heading(trunk, relative, chart, width),
        *_plot(chart, colour),
        *_under(report, chart, width),
        *_beside(report, width),
    ]


def _beside(report: Report, width: int) -> list[Text]:
    """A line for each trunk beside the one that is drawn."""
    sides = zip(report.trace.side_trunks, report.side_profiles, strict=True)
    told = [
        f"{trunk.path}: {_ends(trunk)} · first / last {number_text(summary.gain)}"
        for trunk, (_, summary) in sides
    ]
    lines = hanging(Text("  "), f"drawn: {report.trace.trunk.path}", width) if told else []
    for line in told:
        lines += hanging(Text("  beside it  "), one_line(line), width)
    return lines


def _ends(trunk: Trunk) -> str:
    names = [one_line(trunk.points[k].name) or "(model)" for k in (0, -1)]
    return names[0] if names[0] == names[1] else "–".join(names)


def _no_chart(points: int, width: int) -> list[Text]:
    why = {
        0: "no trunk was found: a profile, a gain and a slope need at least two tensors",
        1: "the trunk is a single tensor: a profile, a gain and a slope need at least two",
    }
    nothing = f"no gradient was measured at any of the trunk's {points} tensors"
    return hanging(Text("  "), why.get(points, nothing), width)


def _heading(trunk: Trunk, relative: bool, chart: Chart, width: int) -> list[Text]:
    what = _TRUNK_WORDS.get(trunk.kind, trunk.kind)
    scale = "each relative to the last" if relative else "norms, for the last one gives no scale"
    each = f", {chart.tensors_per_bar} a column" if chart.tensors_per_bar > 1 else ""
    facts = f"  {count_text(len(trunk.points), 'tensor')}{each}: {what}, {scale}"
    heading = Text("Gradient along the depth", style=HEADING)
    if heading.cell_len + len(facts) <= width:
        return [Text.assemble(heading, facts)]
    return [heading, *hanging(Text("  "), facts.strip(), width)]


def _flow_severity(report: Report) -> Severity | None:
    """The colour follows the verdict on the flow, so that the chart never judges by itself."""
    found = [finding.severity for finding in report.findings if finding.rule in _FLOW_RULES]
    return max(found, key=lambda severity: severity.rank, default=None)


def drop_position(trunk: Trunk) -> int | None:
    """The position of the tensor just before the trunk's largest drop, going back to it; None without one."""
    drop, before, _ = max(drops(trunk), key=lambda drop: drop[0], default=(0.0, 0, 0))
    return before if drop > 1 else None


def _plot(chart: Chart, colour: str) -> list[Text]:
    lines = []
    for row in range(chart.height):
        label = _label(chart, row)
        edge = f"{label:>{_MARGIN - 2}} {'┤' if label else '│'}"
        cells = [_cells(chart, bar, row, colour) for bar in chart.bars]
        runs = [("".join(text for text, _ in run), style) for style, run in groupby(cells, itemgetter(1))]
        lines.append(Text.assemble(edge, *runs))
    bottom = _label(chart, chart.height)
    lines.append(Text(f"{bottom:>{_MARGIN - 2}} └{'─' * (chart.bar_width * len(chart.bars))}"))
    return lines


def _label(chart: Chart, row: int) -> str:
    """The power of ten at the upper edge of a row, where there is a tick."""
    interval, between = divmod(row, chart.rows_per_interval)
    return "" if between or not chart.intervals else _power_text(chart.top - interval * chart.step)


def _cells(chart: Chart, gain: float | None, row: int, colour: str) -> tuple[str, str]:
    """One bar's cells in one row, counted from the top; a gap of one column where there is room for it."""
    ink = chart.bar_width - 1 if chart.bar_width > 2 else chart.bar_width
    above_axis = chart.height - 1 - row
    if gain is None:
        return " " * chart.bar_width, ""
    if not _has_height(gain):
        sign = ("0" if gain == 0 else "✗") if above_axis == 0 else " "
        return sign.center(ink).ljust(chart.bar_width), "red"
    filled = max(0, min(8, chart.eighths(gain) - 8 * above_axis))
    return (_BLOCKS[filled] * ink).ljust(chart.bar_width), colour


def _power_text(power: int) -> str:
    return f"{10.0**power:g}" if -3 <= power <= 3 else f"1e{power:+03d}"


def _under(report: Report, chart: Chart, width: int) -> list[Text]:
    names = [one_line(point.name) or "(model)" for point in report.trace.trunk.points]
    span = max(chart.bar_width * len(chart.bars), 24)
    marks = _drop_mark(report, chart, width)
    lines = [*marks, *_end_names(names[0], names[-1], span, width)]
    facts = _facts(report)
    place = one_line(report.profile.largest_drop_at)
    if marks and place not in marks[0].plain:
        facts.append(f"largest drop at {place}")
    lines += hanging(Text("  "), " · ".join(facts), width)
    return lines + _legend(chart)


def _drop_mark(report: Report, chart: Chart, width: int) -> list[Text]:
    if chart.drop_bar is None:
        return []
    column = _MARGIN + chart.drop_bar * chart.bar_width
    size = f"largest drop ÷{number_text(report.profile.largest_drop)}"
    for note in (f"{size} at {one_line(report.profile.largest_drop_at)}", size):
        if column + 2 + cell_len(note) <= width:
            return [Text(f"{' ' * column}↑ {note}")]
        if cell_len(note) + 3 <= column:
            return [Text(f"{' ' * (column - cell_len(note) - 1)}{note} ↑")]
    return [Text(f"{' ' * column}↑")]


def _end_names(first: str, last: str, span: int, width: int) -> list[Text]:
    """The first and the last tensor under the ends of the axis; on two lines where one is too short."""
    margin = " " * _MARGIN
    if len(first) + len(last) + 3 <= span:
        return [Text(f"{margin}{first}{last:>{span - len(first)}}")]
    room = width - _MARGIN - 8
    return [Text(f"{margin}from {shorten(first, room)}"), Text(f"{margin}to   {shorten(last, room)}")]


def _legend(chart: Chart) -> list[Text]:
    signs = {
        "✗ NaN or Inf": any(gain is not None and not math.isfinite(gain) for gain in chart.bars),
        "0 exactly zero": 0 in chart.bars,
        "a gap: not measured": None in chart.bars,
    }
    shown = [words for words, present in signs.items() if present]
    return [Text(f"  {' · '.join(shown)}")] if shown else []


def _facts(report: Report) -> list[str]:
    profile = report.profile
    facts = [f"first / last {number_text(profile.gain)}"]
    if math.isfinite(profile.slope):
        facts.append(f"×{number_text(math.exp(min(profile.slope, 700)))} a layer")
    if math.isfinite(profile.signal_gain):
        facts.append(f"signal kept forward {number_text(profile.signal_gain)}")
    return [*facts, *_side_by_side(report)]


def _side_by_side(report: Report) -> list[str]:
    """What --shattered measured, if it was asked for: it needs no trunk."""
    value = report.trace.gradient_correlation
    return [] if value is None else [f"cosine of gradients side by side {number_text(value)}"]
