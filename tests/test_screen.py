"""The terminal screen: golden files, and what no renewal of them can silence."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from rich.cells import cell_len

from gradflow.findings import Severity
from gradflow.reporters import terminal
from gradflow.reporters.screen import Screen, emit, encodable, wants_colour, width_of
from gradflow.reporters.terminal_findings import beside_threshold
from tests.screens import COMMAND, SCREENS

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
WIDTHS = (60, 80, 100, 140)
EVERY_SCREEN = pytest.mark.parametrize("name", SCREENS)


def draw(name: str, width: int = 80, **changes: bool) -> str:
    return terminal.render(SCREENS[name](), Screen(width=width, command=COMMAND, **changes))


def flat(text: str) -> str:
    return " ".join(text.split())


@EVERY_SCREEN
@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("colour", [False, True], ids=["plain", "colour"])
def test_the_screen_looks_as_agreed(
    golden: Callable[[str, str], None], name: str, width: int, colour: bool
) -> None:
    text = draw(name, width, colour=colour)
    golden(f"{name}-{width}-{'colour' if colour else 'plain'}.txt", text.replace("\x1b", "␛"))


@EVERY_SCREEN
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("show_all", [False, True], ids=["some", "all"])
def test_no_line_is_wider_than_the_screen(name: str, width: int, show_all: bool) -> None:
    lines = draw(name, width, show_all=show_all).splitlines()
    assert [line for line in lines if cell_len(line) > width] == []
    assert [line for line in lines if line != line.rstrip()] == []


@EVERY_SCREEN
@pytest.mark.parametrize("width", WIDTHS)
def test_every_error_shows_its_code_number_place_and_hint(name: str, width: int) -> None:
    text = flat(draw(name, width))
    for finding in SCREENS[name]().findings:
        if finding.severity is not Severity.INFO:
            assert f"{finding.rule} {finding.slug}" in text
            assert beside_threshold(finding) in text
            assert finding.location.first in text.replace(" ", "")
            assert flat(finding.hint) in text


@EVERY_SCREEN
def test_colour_adds_nothing_but_colour(name: str) -> None:
    plain, coloured = draw(name), draw(name, colour=True)
    assert "\x1b" not in plain
    assert "\x1b[" in coloured
    assert ESCAPE.sub("", coloured) == plain


@EVERY_SCREEN
def test_colours_leave_the_shade_to_the_terminal(name: str) -> None:
    """No black, white, background, 256-colour or dim code: each is unreadable on some theme."""
    codes = {code for found in ESCAPE.findall(draw(name, colour=True)) for code in found[2:-1].split(";")}
    assert codes <= {"0", "1", "4", "31", "32", "33", "36"}


@pytest.mark.parametrize("name", [name for name in SCREENS if name != "awkward_names"])
def test_an_ascii_terminal_gets_the_same_lines(name: str) -> None:
    plain = draw(name)
    text = encodable(plain, "ascii")
    assert text.isascii()
    assert [len(line) for line in text.splitlines()] == [cell_len(line) for line in plain.splitlines()]


def test_what_an_encoding_lacks_is_escaped_not_lost() -> None:
    text = encodable(draw("awkward_names"), "ascii")
    assert r"\u0441\u043b\u043e\u0439.\xe9" in text
    assert encodable("plain", "ascii") == "plain"
    assert encodable("✓ 8×3", "utf-8") == "✓ 8×3"


def test_control_characters_and_markup_are_shown_not_obeyed() -> None:
    text = draw("awkward_names")
    assert "\x1b" not in text
    assert r"a b\x1b[31m" in text
    assert "[red]bold[/red]" in text


def test_all_shows_every_row_and_the_short_table_says_what_it_left_out() -> None:
    everything, some = draw("many_rows", show_all=True), draw("many_rows")
    names = [layer.name for layer in SCREENS["many_rows"]().trace.layers]
    assert [name for name in names if f" {name} " not in everything] == []
    shown = sum(f" {name} " in some for name in names)
    assert f"{len(names) - shown} more rows: --all" in some
    assert shown < 40


def test_repeated_blocks_are_one_row_with_the_range_of_their_gains() -> None:
    layers = draw("healthy").split("\nLayers  ")[1]
    rows = {line.split()[0]: line.split() for line in layers.splitlines() if "h.0–11" in line}
    assert set(rows) == {
        f"h.0–11{inner}"
        for inner in ("", ".ln_1", ".attn.c_attn", ".attn.c_proj", ".mlp.c_fc", ".mlp.act", ".mlp.c_proj")
    }
    assert rows["h.0–11"][-2:] == ["1.84", "1.1..2.6"]


def test_residual_blocks_fold_and_the_one_with_a_finding_stands_alone() -> None:
    lines = draw("residual_sites").splitlines()
    rows = {line[2:].split()[0]: line for line in lines if "  identity  " in line}
    assert rows["stages.1.3"].startswith("▲ ") and " ▁ " in rows["stages.1.3"]
    assert rows["stages.0.1–5"].startswith("  ") and " ▆▆▆▆▆ " in rows["stages.0.1–5"]
    assert "stages.1.1" in rows and "decoder.layers.1[0–2]" in rows


def test_a_model_without_residual_sites_has_no_section_for_them() -> None:
    assert "Residual blocks" not in draw("three_rows")
    assert "Residual blocks" in draw("healthy")


def test_a_consequence_stands_under_its_cause() -> None:
    lines = draw("vanishing").splitlines()
    cause = next(at for at, line in enumerate(lines) if line.startswith("✗ GF101"))
    consequence = next(at for at, line in enumerate(lines) if "GF304" in line)
    assert consequence > cause
    assert lines[consequence].startswith("    →")


def test_print_needs_no_command_line() -> None:
    text = str(SCREENS["many_rows"]())
    assert "more rows: report.layers" in text
    assert "gradflow inspect" not in text
    assert 'report.to_csv("report")' in text
    assert max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize(
    ("columns", "width"),
    [("140", 140), ("20", 60), ("999", 160), ("", 80), ("wide", 80), ("0", 80), ("-5", 80)],
)
def test_columns_sets_the_width(monkeypatch: pytest.MonkeyPatch, columns: str, width: int) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert width_of(io.StringIO()) == width


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "variables", "wanted"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        (Terminal(), {"NO_COLOR": ""}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
        (io.StringIO(), {"FORCE_COLOR": "1"}, True),
    ],
)
def test_who_gets_colour(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, variables: dict[str, str], wanted: bool
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wants_colour(stream) is wanted


def test_emit_writes_what_the_stream_can_take() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", newline="")
    emit("✗ 8×3 слой\n", stream)
    assert raw.getvalue() == rb"x 8x3 \u0441\u043b\u043e\u0439" + b"\n"
