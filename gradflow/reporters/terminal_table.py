"""The layers that matter, as a table that fits its screen.

:func:`table_rows` makes the cells; :func:`table_lines` lays them out. Columns give way, the least telling
first, before a name is broken, and no name is ever cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from gradflow.findings import Severity
from gradflow.report import Report
from gradflow.reporters.layer_choice import severity_marks, shown
from gradflow.reporters.layer_folding import LayerGroup, unfolded
from gradflow.reporters.number_text import count_text, middle, number_text, range_text, share_text
from gradflow.reporters.screen import Screen
from gradflow.reporters.severity_style import COLOURS, HEADING, MARKS
from gradflow.reporters.terminal_chart import last_gradient
from gradflow.reporters.text_lines import fold_name, hanging, one_line, pad, shorten
from gradflow.trace_file import shape_text
from gradflow.trace_model import Coverage, TensorStatistics

_GAP = "  "
_NAME_FOLDS_AT = 28
_HEADINGS = {
    "name": "layer",
    "type": "type",
    "shape": "shape",
    "rms": "rms",
    "std": "std",
    "zeros": "zeros",
    "gradient": "gradient",
    "gain": "gain",
}
_LEFT = ("name", "type", "shape")
# What to leave out, and how long a type may be, until names have room.
_GIVE_WAY = (
    ((), 32),
    ((), 16),
    (("std",), 20),
    (("std",), 12),
    (("std", "shape"), 20),
    (("std", "shape"), 12),
    (("std", "shape", "zeros"), 12),
    (("std", "shape", "zeros", "type"), 12),
)
_NOTHING_MEASURED = TensorStatistics()


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """One row's cells as text."""

    mark: Severity | None
    cells: dict[str, str]
    coverage: str
    """"" where the gradient was measured, else why not: it stands in place of gradient and gain."""


def table_rows(groups: Sequence[LayerGroup], scale: float | None) -> list[TableRow]:
    """Cells of each group: medians over its members, and the range of their gains.

    Args:
        groups: What stands in one row each.
        scale: Gradient norm of the trunk's last tensor, which gains are relative to; None for none.
    """
    return [_table_row(group, scale) for group in groups]


def _table_row(group: LayerGroup, scale: float | None) -> TableRow:
    first = group.members[0]
    activations = [member.activation or _NOTHING_MEASURED for member in group.members]
    gradients = [member.gradient_norm for member in group.members]
    gains = [None if g is None or scale is None else g / scale for g in gradients]
    unmeasured = first.coverage is not Coverage.MEASURED and middle(gradients) is None
    cells = {
        "name": one_line(group.label),
        "type": one_line(first.type),
        "shape": shape_text(first.shape, first.dtype, times="×"),
        "rms": number_text(middle(activation.rms for activation in activations)),
        "std": number_text(middle(activation.std for activation in activations)),
        "zeros": share_text(middle(activation.zero_fraction for activation in activations)),
        "gradient": number_text(middle(gradients)),
        "gain": range_text(gains),
    }
    return TableRow(mark=group.mark, cells=cells, coverage=first.coverage.value if unmeasured else "")


def table_lines(report: Report, screen: Screen) -> list[Text]:
    """The section: a heading, the table, and how many rows were left out."""
    layers = report.trace.layers
    if screen.show_all:
        groups = chosen = unfolded(layers, severity_marks(layers, report.findings))
    else:
        groups, chosen = shown(report)
    if not chosen:
        return [Text("Layers", style=HEADING), Text("  no layer was recorded")]
    rows = table_rows(chosen, last_gradient(report.trace.trunk))
    return [
        *hanging(
            Text.assemble(("Layers", HEADING), "  "), _counted(report, len(groups), screen), screen.width
        ),
        *layout(rows, screen.width),
        *_left_out(len(groups) - len(chosen), screen),
    ]


def _counted(report: Report, groups: int, screen: Screen) -> str:
    rows = count_text(len(report.trace.layers), "row")
    median = ", medians of the steps" if report.trace.run.steps > 1 else ""
    folded = ", repeated blocks folded" if not screen.show_all and groups < len(report.trace.layers) else ""
    return f"{rows}{folded}{median}; gain: relative to the trunk's end"


def _left_out(count: int, screen: Screen) -> list[Text]:
    if count <= 0:
        return []
    return [Text(f"  … {count_text(count, 'more row')}: {'--all' if screen.command else 'report.layers'}")]


def layout(rows: Sequence[TableRow], width: int) -> list[Text]:
    """Lines of at most ``width`` cells: a heading and each row, on several lines where its name is long."""
    widths = _fit(rows, width)
    heading = "  " + _GAP.join(_aligned(column, _HEADINGS[column], widths) for column in widths)
    lines = [Text(heading.rstrip(), style="underline")]
    for row in rows:
        lines += _row_lines(row, widths)
    return lines


def _fit(rows: Sequence[TableRow], width: int) -> dict[str, int]:
    """Widths of the columns that are shown, in order."""
    natural = {
        column: max(cell_len(heading), *(cell_len(row.cells[column]) for row in rows))
        for column, heading in _HEADINGS.items()
    }
    for column in ("gradient", "gain"):
        shown = [row.cells[column] for row in rows if not row.coverage]
        natural[column] = max(cell_len(text) for text in (_HEADINGS[column], *shown))
    reason = max(cell_len(row.coverage) for row in rows)
    natural["gradient"] = max(natural["gradient"], reason - natural["gain"] - len(_GAP))
    wanted = min(natural["name"], _NAME_FOLDS_AT)
    for dropped, longest_type in _GIVE_WAY:
        kept = {column: size for column, size in natural.items() if column not in dropped}
        if "type" in kept:
            kept["type"] = min(natural["type"], longest_type)
        room = width - 2 - sum(kept.values()) + kept["name"] - len(_GAP) * (len(kept) - 1)
        if room >= wanted:
            break
    return kept | {"name": min(natural["name"], max(8, room))}


def _aligned(column: str, text: str, widths: dict[str, int]) -> str:
    return pad(shorten(text, widths[column]), widths[column], right=column not in _LEFT)


def _row_lines(row: TableRow, widths: dict[str, int]) -> list[Text]:
    name, *more = fold_name(row.cells["name"], widths["name"])
    colour = COLOURS[row.mark] if row.mark else ""
    mark = MARKS[row.mark] if row.mark else " "
    line = Text.assemble((mark, colour), " ", pad(name, widths["name"]))
    for column in [column for column in widths if column not in ("name", "gradient", "gain")]:
        line.append(_GAP + _aligned(column, row.cells[column], widths))
    line.append(_GAP)
    line.append(_gradient_text(row, widths), style="" if row.coverage else colour)
    return [line, *(Text(f"  {piece}") for piece in more)]


def _gradient_text(row: TableRow, widths: dict[str, int]) -> str:
    if row.coverage:
        return pad(row.coverage, widths["gradient"] + len(_GAP) + widths["gain"], right=True)
    return _GAP.join(_aligned(column, row.cells[column], widths) for column in ("gradient", "gain"))
