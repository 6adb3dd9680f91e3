"""GF106: the correlation against plain autograd in float64, and both sides of every limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fingerprint import differences, fingerprint
from torch import Tensor, nn
from traces import make_trace
from typer.testing import CliRunner

import gradflow
from gradflow import trace_file
from gradflow.cli import app
from gradflow.config import Config
from gradflow.findings import Severity
from gradflow.rules import find_rule

INFO, WARNING = Severity.INFO, Severity.WARNING


def correlation(model: nn.Module, inputs: Tensor) -> float:
    trace = gradflow.inspect(model, (inputs,), shattered=True).trace
    assert trace.gradient_correlation is not None
    assert trace_file.loads(trace_file.dumps(trace)) == trace
    return trace.gradient_correlation


def plain(depth: int, width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 4))


@pytest.mark.parametrize("depth", [1, 4, 12])
def test_the_correlation_is_that_of_plain_autograd(depth: int) -> None:
    model, x = plain(depth), torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    before = fingerprint(model)
    measured = correlation(model, x)
    assert differences(before, fingerprint(model)) == []
    slow, exact = plain(depth).double(), x.double()
    noise = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).double()
    beside = exact + 0.1 * exact.square().mean().sqrt() * noise
    head = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)).double()
    gradients = []
    for point in (exact, beside):
        leaf = point.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((slow(leaf) * head).sum(), leaf)
        gradients.append(gradient)
    expected = sum(float(a @ b / (a.norm() * b.norm())) for a, b in zip(*gradients, strict=True)) / len(x)
    assert measured == pytest.approx(expected, abs=1e-3)


def test_a_linear_model_is_correlated_and_a_deep_plain_one_is_not() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    linear = nn.Sequential(*(nn.Linear(64, 64) for _ in range(24)))
    assert correlation(linear, x) == pytest.approx(1.0, abs=1e-4)
    assert correlation(plain(24), x) < 0.25


def test_token_numbers_are_moved_where_they_are_looked_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    ids = torch.randint(0, 20, (8, 5))
    assert 0.5 < correlation(model, ids) < 1


def test_without_asking_it_is_not_checked() -> None:
    assert gradflow.inspect(plain(2), (torch.randn(8, 64),)).trace.gradient_correlation is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.5, None), (0.499, INFO), (0.25, INFO), (0.249, WARNING), (-1.0, WARNING), (None, None)],
)
def test_both_sides_of_every_limit(value: float | None, expected: Severity | None) -> None:
    trace = replace(make_trace(), gradient_correlation=value)
    found = [f.severity for f in find_rule("GF106").check(trace, Config())]
    assert found == ([] if expected is None else [expected])


@pytest.mark.parametrize("command", ["inspect", "check"])
def test_the_command_line_asks_for_it(command: str, tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text(find_rule("GF106").failing_example, encoding="utf-8")
    asked = [command, str(file), "--format", "json"]
    assert "GF106" not in CliRunner().invoke(app, asked).output
    assert "GF106" in CliRunner().invoke(app, [*asked, "--shattered"]).output


def test_what_was_asked_for_is_shown_though_nothing_is_found() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    report = gradflow.inspect(model, torch.randn(8, 8), shattered=True)
    assert "cosine of gradients side by side 1" in " ".join(str(report).split())
    assert "side by side" not in str(gradflow.inspect(model, torch.randn(8, 8)))


def test_it_is_shown_of_a_model_with_a_single_tensor_too() -> None:
    report = gradflow.inspect(nn.Linear(8, 4), torch.randn(8, 8), shattered=True)
    assert "the trunk is a single tensor" in str(report)
    assert "cosine of gradients side by side 1" in " ".join(str(report).split())


class OneHot(nn.Module):
    """Nothing that could be moved by a little: whole numbers that no embedding looks up."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.fc(nn.functional.one_hot(ids, 5).float()))


def test_what_could_not_be_measured_is_said() -> None:
    report = gradflow.inspect(OneHot(), torch.arange(5), shattered=True)
    assert report.trace.gradient_correlation is None
    assert "gradients side by side not measured" in " ".join(str(report).split())
