"""Awkward ways to call modules, or not to."""

from __future__ import annotations

from typing import Any

import torch
from awkward import Case, batch_of, seeded
from torch import Tensor, nn
from witness import layer_row, missing, parameter_row

import gradflow

Built = tuple[nn.Module, Any]


class CalledThreeTimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        return x


@seeded
def called_three_times() -> Built:
    return CalledThreeTimes(), (batch_of(8),)


def called_three_times_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    tensors = {}
    for call in range(3):
        tensors[f"cell#{call}"] = module.cell(x)
        x = torch.tanh(tensors[f"cell#{call}"])
    return x, tensors | {"": x}


class Tied(nn.Module):
    """Embedding and output share one matrix; one block stands under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.block = nn.Linear(8, 8)
        self.again = self.block
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.again(torch.tanh(self.block(self.embedding(ids)))))


@seeded
def tied() -> Built:
    return Tied(), (torch.randint(0, 11, (6, 5)),)


def tied_twin(module: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    embedded = module.embedding(ids)
    first = module.block(embedded)
    second = module.block(torch.tanh(first))
    out = module.head(second)
    return out, {"embedding": embedded, "block#0": first, "block#1": second, "head": out, "": out}


def tied_check(report: gradflow.Report) -> None:
    assert list(report.parameters.name) == ["embedding.weight", "block.weight", "block.bias"]
    assert "head.weight" in str(parameter_row(report, "embedding.weight").aliases)
    assert "again.weight" in str(parameter_row(report, "block.weight").aliases)


class NoGradEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.encoder(x)
        return self.head(features)


@seeded
def under_no_grad() -> Built:
    return NoGradEncoder(), (batch_of(8),)


def under_no_grad_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = module.head(module.encoder(x).detach())
    return out, {"head": out, "": out}


def under_no_grad_check(report: gradflow.Report) -> None:
    row = layer_row(report, "encoder")
    assert missing(row.gradient_norm)
    assert row.activation_rms > 0
    assert parameter_row(report, "encoder.weight").coverage == "no grad"
    (finding,) = (f for f in report.findings if f.rule == "GF103")
    assert str(finding.location) == "encoder"
    assert "no_grad" in finding.message


@seeded
def frozen() -> Built:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return model, (batch_of(8),)


def frozen_twin(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    second = module[2](torch.tanh(module[0](x)))
    after = torch.tanh(second)
    out = module[4](after)
    return out, {"2": second, "3": after, "4": out, "": out}


def frozen_check(report: gradflow.Report) -> None:
    assert {parameter_row(report, name).coverage for name in ("0.weight", "0.bias", "4.bias")} == {"frozen"}
    assert all(finding.severity == "info" for finding in report.findings if finding.rule == "GF103")


class NeverCalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(8, 8)
        self.idle = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@seeded
def never_called() -> Built:
    return NeverCalled(), (batch_of(8),)


def never_called_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = module.used(x)
    return out, {"used": out, "": out}


def never_called_check(report: gradflow.Report) -> None:
    assert parameter_row(report, "idle.0.weight").coverage == "never called"
    assert list(report.layers.name)[-2:] == ["idle.0", "idle.1"], "modules never called come last"


class CalledByForward(nn.Module):
    """``module.forward(x)`` goes round every hook."""

    def __init__(self) -> None:
        super().__init__()
        self.direct = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.direct.forward(x)))


@seeded
def called_by_forward() -> Built:
    return CalledByForward(), (batch_of(8),)


def called_by_forward_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = module.head(torch.tanh(module.direct(x)))
    return out, {"head": out, "": out}


def called_by_forward_check(report: gradflow.Report) -> None:
    assert parameter_row(report, "direct.weight").coverage == "measured"
    assert missing(layer_row(report, "direct").gradient_norm)
    assert [finding for finding in report.findings if str(finding.location).startswith("direct")] == []


class Forces(nn.Module):
    """Minus the gradient of an energy: the forward runs a backward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


@seeded
def forces() -> Built:
    return Forces(), (batch_of(8),)


def forces_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    first, _, last = module.energy
    hidden = first(x)
    slope = (1 - torch.tanh(hidden).square()) * last.weight
    out = -slope @ first.weight
    return out, {"energy.0": hidden, "": out}


class Mapped(nn.Module):
    """Calls a layer on single samples, under ``torch.vmap``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda sample: torch.tanh(self.layer(sample)))(x)


@seeded
def mapped() -> Built:
    return Mapped(), (batch_of(8),)


def mapped_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = torch.tanh(module.layer(x))
    return out, {"": out}


CASES: tuple[Case, ...] = (
    Case(name="called three times", build=called_three_times, twin=called_three_times_twin),
    Case(name="tied", build=tied, twin=tied_twin, check=tied_check),
    Case(
        name="under no_grad",
        build=under_no_grad,
        twin=under_no_grad_twin,
        coverage={"encoder": "no grad", "head": "measured"},
        check=under_no_grad_check,
    ),
    Case(
        name="frozen",
        build=frozen,
        twin=frozen_twin,
        coverage={"0": "frozen", "2": "measured"},
        check=frozen_check,
    ),
    Case(
        name="never called",
        build=never_called,
        twin=never_called_twin,
        coverage={"idle.0": "never called", "idle.1": "never called", "used": "measured"},
        check=never_called_check,
    ),
    Case(
        name="called by .forward()",
        build=called_by_forward,
        twin=called_by_forward_twin,
        coverage={"direct": "bypassed"},
        check=called_by_forward_check,
    ),
    Case(name="forces", build=forces, twin=forces_twin, coverage={"energy.2": "no grad"}),
    Case(name="vmap", build=mapped, twin=mapped_twin),
)
