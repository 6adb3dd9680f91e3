"""``gradflow explain``: the page of one rule."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def explain(
    rule: Annotated[str, typer.Argument(metavar="RULE", help="A code or a name: GF101, vanishing-gradient.")],
) -> int:
    """Show a rule's page: meaning, formula, limits, sources, a failing and a healthy example.

    In a pipe the page is Markdown.
    """
    from gradflow.reporters.screen import Screen, emit, wants_colour, width_of
    from gradflow.rules import find_rule
    from gradflow.rules.pages import render_page

    page = render_page(find_rule(rule))
    colour = wants_colour(sys.stdout)
    if colour or sys.stdout.isatty():
        from gradflow.reporters.page import rendered_page

        page = rendered_page(page, Screen(width=width_of(sys.stdout), colour=colour))
    emit(page, sys.stdout)
    return 0
