"""Awkward outputs: changed in place, nested, handed on, and awkward inputs."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import torch
from awkward import Case, batch_of, seeded
from torch import Tensor, nn
from torch.nn import functional as F
from witness import layer_row

import gradflow

Built = tuple[nn.Module, Any]


@seeded
def inplace_relu() -> Built:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), (batch_of(8),)


def inplace_relu_twin(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    before = module[0](x)
    after = F.relu(before)
    out = module[2](after)
    return out, {"0": before, "1": after, "2": out, "": out}


def inplace_relu_check(report: gradflow.Report) -> None:
    assert layer_row(report, "0").activation_zero_fraction == 0.0
    assert layer_row(report, "1").activation_zero_fraction > 0.2


class AddInPlace(nn.Module):
    """A block as in torchvision: ``out += x``, then an in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.relu(self.first(x)))
        out += x
        return self.relu(out)


@seeded
def add_in_place() -> Built:
    return AddInPlace(), (batch_of(8),)


def add_in_place_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    first = module.first(x)
    hidden = F.relu(first)
    second = module.second(hidden)
    out = F.relu(second + x)
    return out, {"first": first, "relu#0": hidden, "second": second, "relu#1": out, "": out}


class AddConstant(nn.Module):
    """``layer(x).add_(1)``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).add_(1).tanh_())


@seeded
def add_constant() -> Built:
    return AddConstant(), (batch_of(8),)


def add_constant_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    layer = module.layer(x)
    out = module.head(torch.tanh(layer + 1))
    return out, {"layer": layer, "head": out, "": out}


class OverwriteView(nn.Module):
    """Writes into a slice of a layer's output, and splits another into views."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        h[:, 0] = 0.5
        left, right = self.head(h).split(2, dim=1)
        return left * right.sigmoid()


@seeded
def overwrite_view() -> Built:
    return OverwriteView(), (batch_of(8),)


def overwrite_view_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    layer = module.layer(x)
    head = module.head(torch.cat((torch.full_like(layer[:, :1], 0.5), layer[:, 1:]), dim=1))
    return head[:, :2] * head[:, 2:].sigmoid(), {"layer": layer, "head": head}


@dataclasses.dataclass
class Output:
    features: Tensor
    scores: list[Any]
    aux: Any = None


Pair = namedtuple("Pair", ["mean", "spread"])


class DictEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.other = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = self.layer(x) * self.scale
        return {"hidden": hidden, "more": (self.other(x), None), "ids": x.argmax(1), "none": None}


class NestedOutputs(nn.Module):
    """A dict, a named tuple, a dataclass and a list, nested, with ``None`` and integer leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = DictEncoder()
        self.head = nn.Linear(8, 2)
        self.shift = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Output:
        encoded = self.encoder(x)
        scores = self.head(encoded["hidden"]) + self.shift
        return Output(features=encoded["more"][0], scores=[scores, None, {"pair": Pair(scores.exp(), 3)}])


@seeded
def nested_outputs() -> Built:
    return NestedOutputs(), (batch_of(8),)


def nested_outputs_twin(module: Any, x: Tensor) -> tuple[Any, dict[str, Tensor]]:
    layer = module.encoder.layer(x)
    hidden = layer * module.encoder.scale
    other = module.encoder.other(x)
    head = module.head(hidden)
    scores = head + module.shift
    spread = scores.exp()
    tensors = {
        "encoder.layer": layer,
        "encoder:hidden": hidden,
        "encoder.other": other,
        "encoder:more.0": other,
        "head": head,
        ":features": other,
        ":scores.0": scores,
        ":scores.2.pair.mean": spread,
    }
    return [other, scores, spread], tensors


class PassThrough(nn.Module):
    """Modules that hand back what they were given: one tensor, three rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.same = nn.Identity()
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.same(self.layer(x)))


@seeded
def pass_through() -> Built:
    return PassThrough().eval(), (batch_of(8),)


def pass_through_twin(module: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = module.layer(x)
    return out, {"layer": out, "same": out, "drop": out, "": out}


class KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, *, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
        return self.layer(x) * scale if mask is None else self.layer(x) * mask


@seeded
def keyword_only() -> Built:
    return KeywordOnly(), {"x": batch_of(8), "scale": 3.0, "mask": None}


def keyword_only_twin(
    module: Any, *, x: Tensor, scale: float, mask: None
) -> tuple[Tensor, dict[str, Tensor]]:
    layer = module.layer(x)
    out = layer * scale
    return out, {"layer": layer, "": out}


class TwoLosses(nn.Module):
    """Returns its losses; the caller adds them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(8, 8)
        self.left, self.right = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.trunk(x))
        return {"left": self.left(hidden).square().mean(), "right": self.right(hidden).exp().mean()}


@seeded
def two_losses() -> Built:
    return TwoLosses(), (batch_of(8),)


def two_losses_twin(module: Any, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    trunk = module.trunk(x)
    left, right = module.left(torch.tanh(trunk)), module.right(torch.tanh(trunk))
    outputs = {"left": left.square().mean(), "right": right.exp().mean()}
    tensors = {
        "trunk": trunk,
        "left": left,
        "right": right,
        ":left": outputs["left"],
        ":right": outputs["right"],
    }
    return outputs, tensors


def sum_of_losses(outputs: dict[str, Tensor], _inputs: Any) -> Tensor:
    return outputs["left"] + outputs["right"]


CASES: tuple[Case, ...] = (
    Case(name="in-place ReLU", build=inplace_relu, twin=inplace_relu_twin, check=inplace_relu_check),
    Case(name="out += x", build=add_in_place, twin=add_in_place_twin),
    Case(name="layer(x).add_(1)", build=add_constant, twin=add_constant_twin),
    Case(name="write into a view", build=overwrite_view, twin=overwrite_view_twin),
    Case(name="nested outputs", build=nested_outputs, twin=nested_outputs_twin),
    Case(name="passed through", build=pass_through, twin=pass_through_twin),
    Case(name="keyword-only inputs", build=keyword_only, twin=keyword_only_twin),
    Case(name="several losses", build=two_losses, twin=two_losses_twin, loss=sum_of_losses),
)
