"""``gradflow diff``: two folders of CSV tables -> what moved between them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradflow.errors import UsageError

if TYPE_CHECKING:
    from gradflow.folder_diff import FolderDiff

_FORMATS = ("table", "csv", "json", "markdown")


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="The folder before, as --csv DIR wrote it.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The folder after.")],
    form: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="table, csv, json or markdown.")
    ] = "table",
    table: Annotated[
        str,
        typer.Option(
            metavar="TABLE", help="Which one --format csv writes: layers, residuals, parameters, findings."
        ),
    ] = "layers",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it there instead of standard output.")
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Every row that moved.")] = False,
) -> int:
    """Compare two folders of tables, row by row: by name, then by position, what moved most first.

    Ratios are B / A. The exit code is 0 whatever moved. Neither a model nor torch is needed.
    """
    from gradflow.atomic_files import check_place, write_text
    from gradflow.folder_diff import diff_folders
    from gradflow.reporters.screen import emit
    from gradflow.table_folder import TABLES, read_folder

    _known("format", form, _FORMATS)
    _known("table", table, tuple(TABLES))
    if output is not None:
        check_place(output)
    compared = diff_folders(read_folder(a), read_folder(b))
    text = _text(compared, form, table, to_stdout=output is None, show_all=show_all)
    if output is None:
        emit(text, sys.stdout)
    else:
        write_text(output, text)
        print(f"wrote {output}", file=sys.stderr)
    return 0


def _known(what: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise UsageError(f"there is no {what} {given!r} here; --{what} takes {', '.join(known)}")


def _text(compared: FolderDiff, form: str, table: str, *, to_stdout: bool, show_all: bool) -> str:
    from gradflow.reporters import diff_screen, diff_texts
    from gradflow.reporters.screen import Screen, wants_colour, width_of

    if form == "csv":
        return diff_texts.render_csv(compared, table)
    if form == "json":
        return diff_texts.render_json(compared)
    if form == "markdown":
        return diff_texts.render_markdown(compared, show_all=show_all)
    colour = to_stdout and wants_colour(sys.stdout)
    return diff_screen.render(compared, Screen(width=width_of(sys.stdout), colour=colour, show_all=show_all))
