"""Where a gradient was cut, and who made the first NaN: each told from plain code a person would write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradflow


class Two(nn.Module):
    """An encoder, something in between, and a head."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 4)
        self.table = nn.Embedding(8, 8)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.encoder(x)))


def under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 2


def straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


CUTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "detach": (lambda x: x.detach(), "detach"),
    "data": (lambda x: x.data, "data"),
    "no_grad": (under_no_grad, "no_grad"),
    "argmax": (lambda x: x.argmax(1, keepdim=True).expand(-1, 8).float(), "argmax"),
    "integers": (lambda x: (x * 10).long().float(), "long"),
    "numpy": (lambda x: torch.from_numpy(x.detach().numpy()), "detach"),
    "numbers": (lambda x: torch.tensor([[row.mean().item()] * 8 for row in x]), "item"),
    "a list": (lambda x: torch.tensor(x.tolist()), "tolist"),
}


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("name", CUTS)
def test_the_cut_and_the_module_before_it_are_named(name: str) -> None:
    between, op = CUTS[name]
    report = gradflow.inspect(Two(between), torch.randn(6, 8))
    cuts = {row.name: row.cut for row in report.trace.parameters}
    for parameter in ("encoder.0.weight", "encoder.0.bias"):
        cut = cuts[parameter]
        assert cut is not None, parameter
        assert (cut.op, cut.module) == (op, "encoder")
        assert cut.source.startswith("test_cuts.py:")
    assert cuts["head.weight"] is None
    errors = [finding for finding in report.findings if finding.severity == "error"]
    assert [(finding.rule, str(finding.location)) for finding in errors] == [("GF103", "encoder")]


@pytest.mark.parametrize("between", [lambda x: x, straight_through, torch.tanh])
def test_no_cut_where_the_gradient_arrives(between: Callable[[Tensor], Tensor]) -> None:
    report = gradflow.inspect(Two(between), torch.randn(6, 8))
    assert all(row.cut is None for row in report.trace.parameters)
    assert not any(finding.severity == "error" for finding in report.findings)


def test_values_kept_for_a_log_are_no_cut() -> None:
    seen = []

    def logged(x: Tensor) -> Tensor:
        seen.append(x.detach().mean())
        return x

    report = gradflow.inspect(Two(logged), torch.randn(6, 8))
    assert all(row.cut is None for row in report.trace.parameters)


def first_origin(between: Callable[[Tensor], Tensor], phase: str) -> tuple[str, str, str]:
    report = gradflow.inspect(Two(between), torch.randn(6, 8))
    origins = [origin for origin in report.trace.origins if origin.phase == phase]
    assert origins, report.trace.origins
    return origins[0].op, origins[0].value, origins[0].source


FORWARD_FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "log of a negative": (lambda x: torch.log(-x.abs() - 1), "log", "nan"),
    "zero by zero": (lambda x: (x - x) / (x - x), "div", "nan"),
    "exp too large": (lambda x: torch.exp(x * 0 + 1000), "exp", "inf"),
    "softmax of a row that is masked out": (
        lambda x: torch.softmax(x.masked_fill(torch.ones(6, 8, dtype=torch.bool), float("-inf")), 1),
        "softmax",
        "nan",
    ),
    "a chain after it": (lambda x: torch.tanh(torch.log(-x.abs() - 1) * 2) + 1, "log", "nan"),
}


@pytest.mark.parametrize("name", FORWARD_FAULTS)
def test_the_first_producer_is_blamed(name: str) -> None:
    between, op, value = FORWARD_FAULTS[name]
    found = first_origin(between, "forward")
    assert found[:2] == (op, value)
    assert found[2].startswith("test_cuts.py:")


BACKWARD_FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "square root at zero": (lambda x: torch.sqrt(x * 0), "sqrt"),
    "where hides the value, not the gradient": (
        lambda x: torch.where(x > 2, torch.sqrt(x - x), torch.zeros_like(x)),
        "sqrt",
    ),
    "norm of nothing": (lambda x: x / torch.sqrt(((x * 0) ** 2).sum(1, keepdim=True)).add(1), "sqrt"),
}


@pytest.mark.parametrize("name", BACKWARD_FAULTS)
def test_the_op_whose_backward_fails_is_blamed(name: str) -> None:
    between, op = BACKWARD_FAULTS[name]
    assert first_origin(between, "backward")[0] == op


def test_a_mask_of_minus_infinity_is_no_fault() -> None:
    half = torch.arange(8).expand(6, 8) > 4
    report = gradflow.inspect(
        Two(lambda x: torch.softmax(x.masked_fill(half, float("-inf")), 1)), torch.randn(6, 8)
    )
    assert report.trace.origins == ()
    assert not {finding.rule for finding in report.findings} & {"GF104", "GF303"}


def test_a_parameter_that_holds_nan_is_named() -> None:
    net = Two(torch.tanh)
    with torch.no_grad():
        net.head.weight[1, 2] = float("nan")
    report = gradflow.inspect(net, torch.randn(6, 8))
    assert [(origin.phase, origin.name) for origin in report.trace.origins][:1] == [
        ("parameter", "head.weight")
    ]


def test_an_input_that_holds_nan_is_named() -> None:
    x = torch.randn(6, 8)
    x[3, 3] = float("nan")
    report = gradflow.inspect(Two(torch.tanh), x)
    assert [origin.op for origin in report.trace.origins if origin.phase == "forward"] == ["input"]
    assert report.findings[0].message.startswith("The input itself holds 1 nan elements")
