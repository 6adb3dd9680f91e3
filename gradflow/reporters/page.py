"""A Markdown page on a terminal, in the terminal's own colours."""

from __future__ import annotations

import io

from pygments.token import (  # type: ignore[import-untyped]
    Comment,
    Keyword,
    Name,
    Number,
    String,
    Token,
)
from rich.console import Console
from rich.markdown import Markdown
from rich.style import Style
from rich.syntax import ANSISyntaxTheme
from rich.theme import Theme

from gradflow.reporters.screen import Screen
from gradflow.reporters.text_lines import PROSE_WIDTH

# rich's own choices stand on a black ground, which no light terminal has.
_THEME = Theme(
    {
        "markdown.code": "cyan",
        "markdown.code_block": "default",
        "markdown.h1": "bold",
        "markdown.h1.border": "default",
        "markdown.h2": "bold cyan",
        "markdown.item.bullet": "cyan",
        "markdown.table.border": "default",
        "markdown.table.header": "bold",
    }
)
_CODE = ANSISyntaxTheme(
    {
        Token: Style(),
        Comment: Style(italic=True),
        Keyword: Style(color="magenta"),
        Name.Builtin: Style(color="cyan"),
        Number: Style(color="cyan"),
        String: Style(color="green"),
    }
)


def rendered_page(markdown: str, screen: Screen) -> str:
    """Markdown as text, with or without colour codes, no wider than the screen nor than reads well."""
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=min(screen.width, PROSE_WIDTH),
        force_terminal=screen.colour,
        color_system="standard" if screen.colour else None,
        no_color=not screen.colour,
        legacy_windows=False,
        theme=_THEME,
    )
    console.print(Markdown(markdown, code_theme=_CODE))  # type: ignore[arg-type]
    return "\n".join(line.rstrip() for line in stream.getvalue().split("\n"))
