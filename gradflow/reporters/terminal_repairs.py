"""The repairs that were tried, the best first: what each did to the gain, and which findings are left."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from gradflow.repair_outcomes import RepairOutcome
from gradflow.reporters.number_text import number_text
from gradflow.reporters.screen import Screen
from gradflow.reporters.severity_style import COLOURS, HEADING, LABEL, MARKS
from gradflow.reporters.text_lines import hanging, one_line, pad

_GAP = "  "
_HEADINGS = ("repair", "gain J", "findings left")


def repair_lines(repairs: Sequence[RepairOutcome], screen: Screen) -> list[Text]:
    """The section; nothing where no repair was tried."""
    if not repairs:
        return []
    helped = [outcome for outcome in repairs if outcome.helped]
    others = [outcome for outcome in repairs if not outcome.helped]
    title = Text.assemble(("Fixes tried", HEADING), _GAP)
    lines = hanging(title, f"{len(repairs)}, in memory, measured again; the model is as it was", screen.width)
    lines += _table(helped) if helped else [Text("  none of them leaves fewer findings")]
    if helped:
        for label, text in (("where", helped[0].where), ("best", helped[0].code)):
            lines += hanging(Text.assemble("  ", (f"{label:<7}", LABEL)), one_line(text), screen.width)
    if others:
        said = "; ".join(_in_short(outcome) for outcome in others)
        lines += hanging(Text.assemble("  ", ("no help", LABEL), " "), one_line(said), screen.width)
    return lines


def repair_cells(outcome: RepairOutcome) -> tuple[str, str, str]:
    """What was done, the gain before and after, and what is left."""
    after = None if outcome.after is None else outcome.after.gain
    gain = f"{number_text(outcome.before.gain)} → {number_text(after)}"
    return outcome.words.removeprefix("a "), gain, ", ".join(outcome.remaining) or "none"


def _table(outcomes: Sequence[RepairOutcome]) -> list[Text]:
    rows = [repair_cells(outcome) for outcome in outcomes]
    widths = [max(cell_len(row[at]) for row in [*rows, _HEADINGS]) for at in range(2)]
    heading = _GAP.join((pad(_HEADINGS[0], widths[0]), pad(_HEADINGS[1], widths[1]), _HEADINGS[2]))
    return [Text(f"  {heading}", style="underline"), *(_row(row, widths) for row in rows)]


def _row(row: tuple[str, str, str], widths: Sequence[int]) -> Text:
    clean = row[2] == "none"
    mark = (MARKS[None], COLOURS[None]) if clean else ("•", "")
    cells = _GAP.join((pad(row[0], widths[0]), pad(row[1], widths[1], right=True), row[2]))
    return Text.assemble(mark, f" {cells}")


def _in_short(outcome: RepairOutcome) -> str:
    words = outcome.words.removeprefix("a ")
    if outcome.after is None:
        return f"{words} (could not be run: {outcome.note})"
    return f"{words} (J {number_text(outcome.after.gain)}, {', '.join(outcome.remaining) or 'none'} left)"
