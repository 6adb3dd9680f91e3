"""A repository that is checked goes red by one edited line, says where, and goes green again with a baseline."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradflow.cli import app

EXAMPLE = Path(__file__).parent / "example_repository"

EDITS = [
    pytest.param(
        "models/plain.py",
        "nn.ReLU()",
        "nn.Sigmoid()",
        "::error file=models/plain.py,line=7,title=GF101 vanishing-gradient at stem–layers.15::",
        id="an activation",
    ),
    pytest.param(
        "models/plain.py",
        'nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")',
        "nn.init.normal_(layer.weight, std=1.0)",
        "::error file=models/plain.py,line=7,title=GF102 exploding-gradient at stem–layers.15::",
        id="an initialisation",
    ),
    pytest.param(
        "models/residual.py",
        "return x + branch",
        "return branch",
        "::error file=models/residual.py,line=7,title=GF101 vanishing-gradient at blocks.0.norm–blocks.15.narrow::",
        id="a removed skip",
    ),
    pytest.param(
        "models/residual.py",
        "x = self.stem(x)",
        "x = self.stem(x).detach()",
        "::error file=models/residual.py,line=21,title=GF103 no-gradient at stem::The graph is cut after stem",
        id="a detached tensor",
    ),
]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(EXAMPLE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return tmp_path


def check(*options: str) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["check", *options])
    return result.exit_code, result.stdout.splitlines()


def annotations(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith(("::error", "::warning"))]


def test_the_example_is_green(repository: Path) -> None:
    assert check() == (0, ["gradflow: no findings in 2 targets"])


@pytest.mark.parametrize(("file", "line", "edited", "annotation"), EDITS)
def test_one_edited_line(repository: Path, file: str, line: str, edited: str, annotation: str) -> None:
    path = repository / file
    source = path.read_text(encoding="utf-8")
    assert source.count(line) == 1
    path.write_text(source.replace(line, edited), encoding="utf-8")

    code, lines = check()
    (said,) = annotations(lines)
    assert code == 1
    assert said.startswith(annotation)

    assert check("--write-baseline")[0] == 0
    code, lines = check("--baseline", "gradflow-baseline.json")
    assert (code, annotations(lines)) == (0, [])

    path.write_text(source, encoding="utf-8")
    result = CliRunner().invoke(app, ["check", "--baseline", "gradflow-baseline.json"])
    assert result.exit_code == 0
    assert "gradflow: gone: " in result.stderr
