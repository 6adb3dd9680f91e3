"""The residual sites on a screen: what each branch adds, and what of the gradient comes back."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from gradflow.report import Report
from gradflow.reporters.number_text import count_text
from gradflow.reporters.screen import Screen
from gradflow.reporters.severity_style import COLOURS, HEADING, MARKS
from gradflow.reporters.site_rows import BAR_HIGH, BAR_LOW, SiteRow, bars, counted, site_table
from gradflow.reporters.text_lines import fold_name, hanging, pad

_GAP = "  "
_NAME_FOLDS_AT = 28
_WIDEST_BARS = 24
_HEADINGS = {
    "name": "site",
    "kind": "kind",
    "rho": "ρ",
    "bars": "",
    "cosine": "cosine",
    "influence": "influence",
    "gradient": "gradient",
    "scale": "scale",
}
_LEFT = ("name", "kind", "bars")
_LEGEND = f"ρ: ‖branch‖ / ‖skip‖, ▁ {BAR_LOW:g} to █ {BAR_HIGH:g}; gradient: at the source / at the sum"
# What to leave out, and how many bars to draw, until names have room.
_GIVE_WAY = (
    ((), _WIDEST_BARS),
    ((), 12),
    (("cosine",), 12),
    (("cosine",), 8),
    (("cosine", "bars"), 0),
    (("cosine", "bars", "scale"), 0),
    (("cosine", "bars", "scale", "influence"), 0),
)


def residual_lines(report: Report, screen: Screen) -> list[Text]:
    """The section; nothing for a model without residual sites."""
    if not report.trace.residuals:
        return []
    table = site_table(report, show_all=screen.show_all)
    heading = Text.assemble(("Residual blocks", HEADING), "  ")
    lines = [
        *hanging(heading, _counted(report, folded=table.folded), screen.width),
        *layout(table.rows, screen.width),
    ]
    if table.left_out:
        where = "--all" if screen.command else "report.residuals"
        lines.append(Text(f"  … {count_text(table.left_out, 'more row')}: {where}"))
    if any(row.rhos for row in table.rows):
        lines += hanging(Text("  "), _LEGEND, screen.width)
    return lines


def _counted(report: Report, *, folded: bool) -> str:
    median = ", medians of the steps" if report.trace.run.steps > 1 else ""
    return f"{counted(report.trace.residuals)}{', repeated blocks folded' if folded else ''}{median}"


def layout(rows: Sequence[SiteRow], width: int) -> list[Text]:
    """Lines of at most ``width`` cells: a heading and each row, on several lines where its name is long."""
    drawn = [row.cells | {"bars": bars(row.rhos, _WIDEST_BARS)} for row in rows]
    widths = _fit(drawn, width)
    heading = "  " + _GAP.join(_aligned(column, _HEADINGS[column], widths) for column in widths)
    lines = [Text(heading.rstrip(), style="underline")]
    for row in rows:
        lines += _row_lines(row, widths)
    return lines


def _fit(rows: Sequence[dict[str, str]], width: int) -> dict[str, int]:
    """Widths of the columns that are shown, in order; a column that no row fills is not."""
    natural = {
        column: max(cell_len(heading), *(cell_len(row[column]) for row in rows))
        for column, heading in _HEADINGS.items()
        if any(row[column] for row in rows)
    }
    wanted = min(natural["name"], _NAME_FOLDS_AT)
    for dropped, most_bars in _GIVE_WAY:
        kept = {column: size for column, size in natural.items() if column not in dropped}
        if "bars" in kept:
            kept["bars"] = min(natural["bars"], most_bars)
        room = width - 2 - sum(kept.values()) + kept["name"] - len(_GAP) * (len(kept) - 1)
        if room >= wanted:
            break
    return kept | {"name": min(natural["name"], max(8, room))}


def _aligned(column: str, text: str, widths: dict[str, int]) -> str:
    return pad(text, widths[column], right=column not in _LEFT)


def _row_lines(row: SiteRow, widths: dict[str, int]) -> list[Text]:
    name, *more = fold_name(row.cells["name"], widths["name"])
    colour = COLOURS[row.mark] if row.mark else ""
    mark = MARKS[row.mark] if row.mark else " "
    line = Text.assemble((mark, colour), " ", pad(name, widths["name"]))
    cells = row.cells | {"bars": bars(row.rhos, widths.get("bars", 1))}
    for column in [column for column in widths if column != "name"]:
        line.append(_GAP)
        line.append(
            _aligned(column, cells[column], widths), style=colour if column in ("rho", "bars") else ""
        )
    return [line, *(Text(f"  {piece}") for piece in more)]
