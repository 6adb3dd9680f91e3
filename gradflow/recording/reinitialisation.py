"""Other initial values for the weight layers of a scope, written in place: the caller puts the old ones back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradflow.recording.layout import NamedParameter
from gradflow.recording.weight_ops import LAYER_OPS

GAINS = {
    "relu": math.sqrt(2.0),
    "gelu": 1 / math.sqrt(0.4252),
    "silu": 1 / math.sqrt(0.3558),
    "sigmoid": 4.0,
}
"""Gain that keeps a unit second moment, 1/sqrt(E phi(z)^2); of a sigmoid the one that undoes its slope of 1/4."""
CRITICAL_TANH = (1.76, 0.05)
"""Variances of weight (times fan-in) and bias at which a tanh net neither loses nor amplifies."""
LSUV_ROUNDS = 3
"""Mishkin and Matas stop at a variance of 1 within 0.1; three divisions are enough for that."""
LSUV_TOLERANCE = 0.1


def is_weight(parameter: Tensor) -> bool:
    """A matrix or a kernel, and no scale or bias."""
    return parameter.dim() >= 2 and parameter.is_floating_point() and parameter.numel() > 0


def fan_in_initialise(scope: Sequence[NamedParameter], activation: str, generator: torch.Generator) -> None:
    """He's initialisation with the gain of the activation; for tanh the critical one, biases included."""
    variance, bias = GAINS.get(activation, GAINS["relu"]) ** 2, 0.0
    if activation == "tanh":
        variance, bias = CRITICAL_TANH
    with torch.no_grad():
        for item in scope:
            parameter = item.parameter
            if is_weight(parameter):
                fan_in = parameter[0].numel()
                parameter.normal_(0.0, math.sqrt(variance / fan_in), generator=generator)
            elif _is_bias(item):
                parameter.normal_(0.0, math.sqrt(bias), generator=generator)


def orthogonal_gain(activation: str) -> float:
    """What keeps the signal through orthogonal weights and this activation."""
    if activation.startswith(("relu", "leaky_relu")):
        return GAINS["relu"]
    return GAINS.get(activation, 1.0)


def orthogonal_initialise(scope: Sequence[NamedParameter], gain: float, generator: torch.Generator) -> None:
    """Orthogonal weights (Saxe et al., 2014) and zero biases."""
    for item in scope:
        if is_weight(item.parameter):
            nn.init.orthogonal_(item.parameter, gain=gain, generator=generator)
        elif _is_bias(item):
            nn.init.zeros_(item.parameter)


def scale(scope: Sequence[NamedParameter], factor: float) -> None:
    """Multiply the parameters, biases included: what the layer returns is multiplied so."""
    with torch.no_grad():
        for item in scope:
            item.parameter.mul_(factor)


def unit_variance(scope: Sequence[NamedParameter], run: Callable[[], Any]) -> None:
    """Divide each weight by the standard deviation of what its layer returns, in the order they run.

    Mishkin and Matas, All you need is a good init, 2016 (LSUV); the weights are orthogonal before.

    Args:
        scope: Parameters of the layers.
        run: A forward of the model.
    """
    weights = (item.parameter for item in scope if is_weight(item.parameter))
    with torch.no_grad(), _UnitVariance(weights):
        run()


class _UnitVariance(TorchFunctionMode):
    def __init__(self, weights: Any) -> None:
        super().__init__()
        self._waiting = {id(weight): weight for weight in weights}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in LAYER_OPS or not isinstance(result, Tensor):
            return result
        given = (*args, *(kwargs or {}).values())
        weight = next((self._waiting.pop(id(arg)) for arg in given if id(arg) in self._waiting), None)
        for _ in range(LSUV_ROUNDS if weight is not None else 0):
            spread = float(result.float().std())
            if weight is None or not 0 < spread < math.inf or abs(spread**2 - 1) < LSUV_TOLERANCE:
                break
            weight.div_(spread)
            result = func(*args, **(kwargs or {}))
        return result


def _is_bias(item: NamedParameter) -> bool:
    return item.parameter.dim() == 1 and item.names[0].rpartition(".")[2].startswith("bias")
