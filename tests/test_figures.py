"""The figures of the documentation: every one that a page shows is there, and the script that draws them runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
FIGURES = DOCS / "figures"
PAGE = (DOCS / "residual.md").read_text(encoding="utf-8")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(FIGURES))
    import draw  # type: ignore[import-not-found, unused-ignore]

    yield draw
    for name in ("draw", "runs"):
        sys.modules.pop(name, None)


def test_every_figure_that_a_page_shows_is_there() -> None:
    shown = [
        (page, picture)
        for page in DOCS.rglob("*.md")
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        if "://" not in picture
    ]
    assert len(shown) >= 4
    assert [(str(page), picture) for page, picture in shown if not (page.parent / picture).is_file()] == []
    named = {(page.parent / picture).resolve() for page, picture in shown}
    assert {path.resolve() for path in FIGURES.glob("*.svg")} <= named
    for path in FIGURES.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
        assert path.stat().st_size < 100_000


def test_the_script_runs_and_draws(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["draw.py", "--tiny", "--out", str(tmp_path)])
    script.main()
    assert {path.name for path in tmp_path.iterdir()} == {
        "residual.json", *(f"{name}.svg" for name in script.CHARTS)
    }  # fmt: skip
    assert set(script.CHARTS) == set(script.RUNS)
    kept = json.loads((tmp_path / "residual.json").read_text())
    assert all(site["rho"] == 0.0 for site in kept["zero_gamma"]["before"])

    monkeypatch.setattr(sys, "argv", ["draw.py", "--draw-only", "--out", str(tmp_path)])
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    script.main()
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")} == before
    assert "running ranking" in capsys.readouterr().out


def test_the_pictures_are_those_of_the_numbers(script: Any, tmp_path: Path) -> None:
    values = json.loads((FIGURES / "residual.json").read_text())
    script.draw(values, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in FIGURES.glob("*.svg")}


def test_the_page_says_what_was_measured() -> None:
    values = json.loads((FIGURES / "residual.json").read_text())
    rows = dict(re.findall(r"^\| ((?:plain|ResNet)-\d+) \| (.+?) \|(?: \|)?$", PAGE, re.M))
    assert set(rows) == set(values["responses"])
    for name, cells in rows.items():
        found = values["responses"][name]
        said = cells.split(" | ")
        measured = [found["init"]["gain"], found["trained"]["gain"], found["last_loss"]]
        assert [float(cell) for cell in said[:3]] == pytest.approx(measured, rel=0.05, abs=0.005)
    said = " ".join(PAGE.split())
    for measure, correlation in values["ranking"]["agreements"].items():
        assert f"{correlation:.2f} for {measure}" in said
