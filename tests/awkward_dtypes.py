"""Awkward tensors: low precision, complex, sparse, 0-d, empty and integer."""

from __future__ import annotations

from typing import Any

import torch
from awkward import Case, batch_of, energy, seeded
from torch import Tensor, nn
from witness import layer_row, missing

import gradflow

Built = tuple[nn.Module, Any]


def small_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def mlp_twin(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    first = module[0](x)
    hidden = torch.tanh(first)
    out = module[2](hidden)
    return out, {"0": first, "1": hidden, "2": out, "": out}


@seeded
def half() -> Built:
    return small_mlp().half(), (batch_of(8).half(),)


@seeded
def bfloat16() -> Built:
    return small_mlp().bfloat16(), (batch_of(8).bfloat16(),)


def dtype_check(dtype: str) -> Any:
    def check(report: gradflow.Report) -> None:
        assert set(report.layers["dtype"]) == {dtype}
        assert set(report.parameters["dtype"]) == {dtype}

    return check


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = small_mlp()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layers(x).float()


@seeded
def autocast() -> Built:
    return Autocast(), (batch_of(8),)


def autocast_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    _, tensors = mlp_twin(module.layers, x)
    out = tensors.pop("")
    return out, {f"layers.{key}": tensor for key, tensor in tensors.items()}


def autocast_check(report: gradflow.Report) -> None:
    assert layer_row(report, "layers.0")["dtype"] == "bfloat16"
    assert layer_row(report, "")["dtype"] == "float32"
    assert set(report.parameters["dtype"]) == {"float32"}


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.mix = nn.Linear(5, 5, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(self.mix(torch.fft.rfft(x) * self.filters), n=8)


@seeded
def complex_numbers() -> Built:
    return Complex(), (batch_of(8),)


def complex_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    mixed = module.mix(torch.fft.rfft(x) * module.filters)
    out = torch.fft.irfft(mixed, n=8)
    return out, {"mix": mixed, "": out}


def to_complex128(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.complex128)
    return module


class SparseGradient(nn.Module):
    """Ids repeat, so the sparse gradient has to be summed before its norm is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8, sparse=True)
        self.head = nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


@seeded
def sparse_gradient() -> Built:
    return SparseGradient(), (torch.randint(0, 4, (6, 7)),)


def sparse_gradient_twin(module: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    embedded = nn.functional.embedding(ids, module.embedding.weight)
    out = module.head(embedded)
    return out, {"embedding": embedded, "head": out, "": out}


class Scale(nn.Module):
    """One number for the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean().sqrt()


class Choice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


class Oddities(nn.Module):
    """A 0-d output, an integer output, an empty output and no output at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.scale = Scale()
        self.choice = Choice()
        self.rare = nn.Linear(8, 8)
        self.nothing = nn.Module()
        self.nothing.forward = lambda x: None
        self.table = nn.Embedding(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        rare = self.rare(hidden[hidden[:, 0] > 1e9])
        self.nothing(hidden)
        return hidden / self.scale(hidden) + self.table(self.choice(hidden)) + rare.sum()


@seeded
def oddities() -> Built:
    return Oddities(), (batch_of(8),)


def oddities_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    hidden = module.layer(x)
    scale = hidden.square().mean().sqrt()
    table = module.table(hidden.argmax(1))
    rare = module.rare(hidden[:0])
    out = hidden / scale + table + rare.sum()
    return out, {"layer": hidden, "scale": scale, "table": table, "": out}


def oddities_check(report: gradflow.Report) -> None:
    empty = layer_row(report, "rare")
    assert empty["shape"] == "0x8"
    assert missing(empty.activation_mean)
    assert missing(empty.activation_rms)
    assert missing(layer_row(report, "scale").signal), "one number has no spread over samples"
    assert missing(layer_row(report, "choice").activation_mean)
    assert [finding for finding in report.findings if finding.severity == "error"] == []


@seeded
def one_sample() -> Built:
    return small_mlp(), (torch.randn(1, 8),)


def one_sample_check(report: gradflow.Report) -> None:
    assert report.layers.signal.isna().all(), "no spread over one sample"
    assert report.layers.common_mode.isna().all()


LOW_PRECISION = 0.03
"""Two roundings to 8 bits in a row, with room; a wrong tensor is off by far more."""

CASES: tuple[Case, ...] = (
    Case(name="half", build=half, twin=mlp_twin, check=dtype_check("float16"), tolerance=LOW_PRECISION),
    Case(
        name="bfloat16", build=bfloat16, twin=mlp_twin, check=dtype_check("bfloat16"), tolerance=LOW_PRECISION
    ),
    Case(name="autocast", build=autocast, twin=autocast_twin, check=autocast_check, tolerance=LOW_PRECISION),
    Case(name="complex", build=complex_numbers, twin=complex_twin, widen=to_complex128),
    Case(name="sparse gradient", build=sparse_gradient, twin=sparse_gradient_twin),
    Case(
        name="0-d, integer, empty and no output",
        build=oddities,
        twin=oddities_twin,
        loss=energy,
        coverage={"choice": "non-tensor output", "nothing": "non-tensor output", "scale": "measured"},
        check=oddities_check,
    ),
    Case(name="one sample", build=one_sample, twin=mlp_twin, check=one_sample_check, batch=1),
)
