"""Two folders side by side in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.text import Text

from gradflow.folder_diff import FolderDiff, TableDiff
from gradflow.reporters.diff_rows import BESIDE, SHORT, MovedRow, alone, moved_rows, summary, tables
from gradflow.reporters.number_text import count_text
from gradflow.reporters.screen import Screen, rendered
from gradflow.reporters.severity_style import HEADING, LABEL
from gradflow.reporters.text_lines import fold_name, hanging, pad

_GAP = "  "
_NARROWEST_LABEL = 24
_WIDEST_FACT = 20
_HEADINGS = ("moved most", "a", "b", "b / a")


def render(diff: FolderDiff, screen: Screen) -> str:
    """A section a table; no line is wider than the screen, and no name is cut."""
    lines = [Text.assemble(("gradflow diff", HEADING), "  what moved most comes first")]
    for name, path in (("a", diff.a), ("b", diff.b)):
        lines += hanging(Text.assemble("  ", (name, LABEL), "  "), path, screen.width)
    for table in tables(diff):
        lines += [Text(""), *_section(table, screen)]
    return rendered(lines, screen)


def _section(table: TableDiff, screen: Screen) -> Iterator[Text]:
    yield from hanging(Text.assemble((table.name.capitalize(), HEADING), "  "), summary(table), screen.width)
    rows = moved_rows(table)
    shown = rows if screen.show_all else rows[:SHORT]
    if shown:
        yield from _table(shown, BESIDE[table.name], screen.width)
    if len(rows) > len(shown):
        yield Text(f"  … {count_text(len(rows) - len(shown), 'more row')} moved: --all")
    for words, labels in alone(table, show_all=screen.show_all):
        yield from hanging(Text.assemble("  ", (words, LABEL), "  "), labels, screen.width)


def _table(rows: Sequence[MovedRow], beside: Sequence[str], width: int) -> Iterator[Text]:
    """What moved most, then as many of the ratios beside it as leave the names room."""
    cells = [(row.what, *(_cut(cell) for cell in (row.a, row.b)), row.ratio) for row in rows]
    columns = _columns([_HEADINGS, *cells])
    extra = _columns([[f"{name} b/a" for name in beside], *(row.beside for row in rows)])
    wanted = max(_NARROWEST_LABEL, *(min(cell_len(row.label), 40) for row in rows))
    while extra and 2 + wanted + _taken(columns) + _taken(extra) > width:
        extra.pop()
    columns += extra
    room = width - 2 - _taken(columns)
    room = min(room, max(cell_len("row"), *(cell_len(row.label) for row in rows)))
    yield _line("row", [column[0] for column in columns], columns, room, HEADING)
    for at, row in enumerate(rows, 1):
        first, *rest = fold_name(row.label, room)
        yield _line(first, [column[at] for column in columns], columns, room)
        yield from (Text(f"  {piece}") for piece in rest)


def _cut(fact: str) -> str:
    """Numbers are short; a fact, "never called", may be as long as this."""
    return fact if cell_len(fact) <= _WIDEST_FACT else f"{fact[: _WIDEST_FACT - 1]}…"


def _columns(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _taken(columns: Sequence[Sequence[str]]) -> int:
    return sum(len(_GAP) + max(map(cell_len, column)) for column in columns)


def _line(
    name: str, cells: Sequence[str], columns: Sequence[Sequence[str]], room: int, style: str = ""
) -> Text:
    widths = [max(map(cell_len, column)) for column in columns]
    padded = [
        pad(cell, width, right=at > 0) for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return Text.assemble("  ", (_GAP.join([pad(name, room), *padded]), style))
