"""GF105: what float16 flushes to zero against float64, and both sides of every limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fingerprint import differences, fingerprint
from torch import Tensor, nn
from traces import make_parameter, make_trace

import gradflow
from gradflow import trace_file
from gradflow.config import Config
from gradflow.findings import Severity
from gradflow.rules import find_rule

WARNING, ERROR = Severity.WARNING, Severity.ERROR


class Weighted(nn.Module):
    """One product: the gradient of the weight is the sum of the input over samples, times the loss's factor."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, features).half())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def scaled(factor: float) -> Any:
    return lambda outputs, _: factor * outputs.float().sum()


@pytest.mark.parametrize("factor", [1.0, 2.0**-12, 2.0**-16, 2.0**-20])
def test_the_share_is_that_of_float64(factor: float) -> None:
    torch.manual_seed(0)
    model = Weighted(500)
    x = torch.randn(1, 500).half()
    before = fingerprint(model)
    report = gradflow.inspect(model, (x,), scaled(factor))
    (row,) = report.trace.parameters
    exact = factor * x.double()
    lost = (exact != 0) & (exact.abs() <= 2.0**-25)  # half of the smallest number rounds to even, to 0
    assert row.underflow == pytest.approx(lost.double().mean().item(), abs=1e-9)
    assert differences(before, fingerprint(model)) == []
    assert trace_file.loads(trace_file.dumps(report.trace)) == report.trace


def test_what_overflows_at_one_scale_is_judged_at_a_smaller_one() -> None:
    x = torch.tensor([[100.0, 2.0**-26, 0.0, 1.0]]).half()
    x[0, 1] = 2.0**-20
    (row,) = gradflow.inspect(Weighted(4), (x,), scaled(2.0**-6)).trace.parameters
    assert row.underflow == pytest.approx(1 / 3)
    (row,) = gradflow.inspect(Weighted(4), (100 * x,), scaled(1.0)).trace.parameters
    assert row.underflow is None


def test_other_types_and_the_probe_are_not_measured() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, x = nn.Linear(4, 2).to(dtype), torch.randn(3, 4).to(dtype)
        assert {p.underflow for p in gradflow.inspect(model, (x,), scaled(1e-9)).trace.parameters} == {None}
    report = gradflow.inspect(nn.Linear(4, 2).half(), (torch.randn(3, 4).half(),))
    assert {p.underflow for p in report.trace.parameters} == {None}


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return self.linear(x)


@pytest.mark.parametrize(("factor", "expected"), [(1.0, None), (2.0**-24, ERROR)])
def test_loss_scale_one_under_autocast(factor: float, expected: Severity | None) -> None:
    torch.manual_seed(0)
    report = gradflow.inspect(Autocast(), (0.1 * torch.randn(4, 8),), scaled(factor))
    found = [f.severity for f in report.findings if f.rule == "GF105"]
    assert found == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"underflow": 0.05}, None),
        ({"underflow": 0.051}, WARNING),
        ({"underflow": 0.5}, WARNING),
        ({"underflow": 0.501}, ERROR),
        ({"underflow": None}, None),
        ({"underflow": 1.0, "shape": (16,)}, None),
    ],
)
def test_both_sides_of_every_limit(changes: dict[str, Any], expected: Severity | None) -> None:
    parameters = [make_parameter("layers.0.weight", dtype="float16", **changes)]
    check = find_rule("GF105").check
    found = [f.severity for f in check(make_trace(parameters=parameters), Config())]
    assert found == ([] if expected is None else [expected])
    assert list(check(make_trace(parameters=parameters, loss="probe"), Config())) == []
