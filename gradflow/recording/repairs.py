"""The repairs that can be tried: each changes weights in place, or the wiring while the model runs, or both.

The caller puts the model back. A repair that has nothing to act on raises :class:`NothingToRepair`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.nn import functional as F

from gradflow.recording.layout import NamedParameter
from gradflow.recording.reinitialisation import (
    fan_in_initialise,
    is_weight,
    orthogonal_gain,
    orthogonal_initialise,
    scale,
    unit_variance,
)
from gradflow.recording.rewiring import Function, Wiring

Item = TypeVar("Item")


class NothingToRepair(Exception):
    """The scope holds nothing that this repair acts on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A residual branch that the findings are about, as a trace has it."""

    parameters: tuple[str, ...]
    """Their names, first to last."""
    rho: float | None
    usual_rho: float | None
    """What branches of the same make have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What the findings are about, as a trace has it."""

    parameters: frozenset[str]
    """Names of the parameters of the layers."""
    activation: str
    """The nonlinearity that most of them have behind them; "" for none."""
    branches: tuple[Branch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workpiece:
    """What a repair acts on: the ground, found in the model."""

    scope: tuple[NamedParameter, ...]
    """Parameters of the layers that the findings are about."""
    activation: str
    branches: tuple[tuple[Branch, tuple[NamedParameter, ...]], ...]
    """Each branch with its parameters."""
    run: Callable[[], Any]
    """A forward of the model."""
    generator: torch.Generator

    @property
    def depth(self) -> int:
        """Weight layers in the scope."""
        return max(1, sum(is_weight(item.parameter) for item in self.scope))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewired:
    """A wiring and the parameters whose layers get it."""

    wiring: Wiring
    scope: tuple[NamedParameter, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """One candidate."""

    name: str
    words: str
    code: str
    answers: tuple[str, ...]
    """The rules whose findings it may mend."""
    apply: Callable[[Workpiece], Rewired | None]
    """Changes the weights, and says how the model is to be wired; raises NothingToRepair."""
    keeps_weights: bool = False
    """What was trained stays trained."""


GAIN = ("GF101", "GF102", "GF304")
UNITS = ("GF301", "GF302")
BRANCH = ("GF201", "GF204")
GROWTH = ("GF202",)


def _fan_in(piece: Workpiece) -> None:
    fan_in_initialise(_weighted(piece), piece.activation, piece.generator)


def _orthogonal(piece: Workpiece) -> None:
    orthogonal_initialise(_weighted(piece), orthogonal_gain(piece.activation), piece.generator)


def _unit_variance(piece: Workpiece) -> None:
    orthogonal_initialise(_weighted(piece), 1.0, piece.generator)
    unit_variance(piece.scope, piece.run)


def _wired(wiring: Wiring) -> Callable[[Workpiece], Rewired]:
    return lambda piece: Rewired(wiring=wiring, scope=_weighted(piece))


def _scaled_skip(piece: Workpiece) -> Rewired:
    return Rewired(wiring=Wiring(skip=1 / math.sqrt(piece.depth)), scope=_weighted(piece))


def _other_activation(
    activation: str, function: Function, *, instead_of: Sequence[str]
) -> Callable[[Workpiece], Rewired]:
    def apply(piece: Workpiece) -> Rewired:
        if piece.activation not in instead_of:
            raise NothingToRepair
        fan_in_initialise(_weighted(piece), activation, piece.generator)
        return Rewired(wiring=Wiring(activation=function), scope=piece.scope)

    return apply


def _scaled_branches(piece: Workpiece) -> None:
    for _, parameters in _some(piece.branches):
        scale(_last_layer(parameters), 1 / math.sqrt(len(piece.branches)))


def _usual_branches(piece: Workpiece) -> None:
    """Lift each weak branch to the strength of its like; what is exactly zero stays so."""
    weak = [
        (_last_layer(parameters), branch.usual_rho / branch.rho)
        for branch, parameters in piece.branches
        if branch.rho and branch.usual_rho and branch.rho < branch.usual_rho
    ]
    for layer, factor in _some(weak):
        scale(layer, factor)


def _normed_branches(piece: Workpiece) -> Rewired:
    heads = [_first_layer(parameters) for _, parameters in _some(piece.branches)]
    return Rewired(wiring=Wiring(norm_before=True), scope=tuple(item for head in heads for item in head))


def _weighted(piece: Workpiece) -> tuple[NamedParameter, ...]:
    if not any(is_weight(item.parameter) for item in piece.scope):
        raise NothingToRepair
    return piece.scope


def _some(found: Sequence[Item]) -> Sequence[Item]:
    if not found:
        raise NothingToRepair
    return found


def _last_layer(parameters: Sequence[NamedParameter]) -> tuple[NamedParameter, ...]:
    """The parameters of the layer that ends a branch."""
    return tuple(item for item in parameters if item.owner == parameters[-1].owner)


def _first_layer(parameters: Sequence[NamedParameter]) -> tuple[NamedParameter, ...]:
    """The weights of the layers that read the stream: the first, and query, key and value beside it."""
    weights = [item for item in parameters if is_weight(item.parameter)]
    around = weights[0].owner.rpartition(".")[0] if weights else ""
    beside = [
        item
        for item in weights
        if item.owner.rpartition(".")[0] == around and item.owner.rpartition(".")[2] in _PROJECTIONS
    ]
    return tuple(beside or weights[:1])


_PROJECTIONS = ("q", "k", "v", "q_proj", "k_proj", "v_proj", "query", "key", "value")

REPAIRS: tuple[Repair, ...] = (
    Repair(
        name="scaled-skip",
        words="a skip around each layer, scaled by 1/√L",
        code="x = x + activation(layer(x)) / len(layers) ** 0.5",
        answers=(*GAIN, *UNITS),
        apply=_scaled_skip,
    ),
    Repair(
        name="skip",
        words="a skip around each layer",
        code="x = x + activation(layer(x))",
        answers=(*GAIN, *UNITS),
        apply=_wired(Wiring(skip=1.0)),
    ),
    Repair(
        name="norm-after",
        words="a norm between layer and activation",
        code="x = activation(norm(layer(x)))  # nn.LayerNorm(width), or nn.BatchNorm2d(channels)",
        answers=(*GAIN, *UNITS),
        apply=_wired(Wiring(norm_after=True)),
    ),
    Repair(
        name="norm-before",
        words="a norm in front of each layer",
        code="x = activation(layer(norm(x)))  # nn.LayerNorm(width), or nn.BatchNorm2d(channels)",
        answers=(*GAIN, *UNITS),
        apply=_wired(Wiring(norm_before=True)),
    ),
    Repair(
        name="branch-norm",
        words="a norm at the head of each branch",
        code="x = x + branch(norm(x))",
        answers=(*GAIN, *GROWTH),
        apply=_normed_branches,
    ),
    Repair(
        name="branch-scale",
        words="branches scaled by 1/√L",
        code="with torch.no_grad(): last.weight /= len(blocks) ** 0.5",
        answers=("GF102", *GROWTH),
        apply=_scaled_branches,
    ),
    Repair(
        name="branch-restore",
        words="weak branches scaled up to their like",
        code="with torch.no_grad(): last.weight *= usual_rho / rho",
        answers=("GF201",),
        apply=_usual_branches,
        keeps_weights=True,
    ),
    Repair(
        name="relu",
        words="ReLU and He initialisation",
        code='nn.ReLU() and nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")',
        answers=(*GAIN, *UNITS),
        apply=_other_activation("relu", F.relu, instead_of=("sigmoid", "tanh")),
    ),
    Repair(
        name="gelu",
        words="GELU and an initialisation for it",
        code="nn.GELU() and nn.init.normal_(layer.weight, std=1.53 / fan_in ** 0.5)",
        answers=("GF301", "GF304"),
        apply=_other_activation("gelu", F.gelu, instead_of=("relu",)),
    ),
    Repair(
        name="he-init",
        words="He initialisation",
        code='nn.init.kaiming_normal_(layer.weight, nonlinearity="relu"); nn.init.zeros_(layer.bias)',
        answers=(*GAIN, *UNITS, *BRANCH),
        apply=_fan_in,
    ),
    Repair(
        name="orthogonal-init",
        words="orthogonal initialisation",
        code="nn.init.orthogonal_(layer.weight, gain=gain); nn.init.zeros_(layer.bias)",
        answers=(*GAIN, *UNITS, *BRANCH),
        apply=_orthogonal,
    ),
    Repair(
        name="lsuv-init",
        words="LSUV initialisation on this batch",
        code="layer.weight /= layer(x).std()  # layer by layer, first to last",
        answers=(*GAIN, *UNITS),
        apply=_unit_variance,
    ),
)
"""In the order of preference among equals: wiring holds through training, an initialisation only starts it."""
