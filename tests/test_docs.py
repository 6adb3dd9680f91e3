"""The pages a reader is sent to: what they name exists, and what exists is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from gradflow.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path for folder in ("", "docs", "sample_models", "benchmarks") for path in (ROOT / folder).glob("*.md")
)
DESIGN = ROOT / "docs" / "design.md"
FAMILIES = ("gf", "terminal_", "anatomy_")
"""Modules that the design page names together."""
OTHERS_OPTIONS = {
    "--constraint",
    "--update-golden",
    "--gradflow-csv",
    "--edit-last",
    "--create-if-none",
    "--body-file",
}
"""Of pip, pytest and the commands of a pull request."""


def modules() -> list[Path]:
    return [path for path in sorted((ROOT / "gradflow").rglob("*.py")) if path.stem != "__init__"]


def unnamed(page: str, stems: list[str]) -> list[str]:
    """The modules that a page does not name, alone or with their family."""
    words = set(re.findall(r"\w+", page))
    return [stem for stem in stems if stem not in words and not stem.startswith(FAMILIES)]


def test_the_design_page_names_every_module() -> None:
    assert unnamed(DESIGN.read_text(encoding="utf-8"), [path.stem for path in modules()]) == []
    assert unnamed("cli.py, config", ["cli", "config", "gf101_x", "trunk"]) == ["trunk"]


def test_the_design_page_names_no_file_that_is_gone() -> None:
    named = set(re.findall(r"\b\w+\.py\b", DESIGN.read_text(encoding="utf-8")))
    known = {path.name for folder in ("gradflow", "tests", "docs") for path in (ROOT / folder).rglob("*.py")}
    assert named - known - {"model.py", "hatch_build.py"} == set()


def anchors(page: Path) -> set[str]:
    """What a link may point at: the headings, in GitHub's spelling."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def known_options() -> set[str]:
    """Those of every command, and of the scripts in benchmarks/."""
    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    options = {
        option
        for command in commands
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    scripts = [path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")]
    return options.union(*(re.findall(r'"(--[a-z][a-z-]+)"', script) for script in scripts))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_that_is_named_is_there(page: Path) -> None:
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert named - known_options() - OTHERS_OPTIONS - {"--help", "--version"} == set()
