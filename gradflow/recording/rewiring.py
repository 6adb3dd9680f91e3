"""Another wiring of a model while it runs: skips, norms and activations that its code does not have.

A ``TorchFunctionMode`` replaces ops as they run, so a repair can be tried on a model however it is written,
and nothing of the model is changed. Only weight layers of a scope take part: those that consume one of the
parameters it names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gradflow.recording.activations import ACTIVATION_OPS, family_of
from gradflow.recording.weight_ops import CONV_OPS, LAYER_OPS, NORM_OPS

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """What is done at each weight layer of the scope, and at the activation behind it.

    Attributes:
        skip: Factor on the layer and its activation, which are added to the layer's input; None adds nothing.
        norm_before: Normalise what the layer reads.
        norm_after: Normalise what the layer returns.
        activation: Takes the place of the activation behind the layer.
    """

    skip: float | None = None
    norm_before: bool = False
    norm_after: bool = False
    activation: Function | None = None


@dataclass(slots=True)
class _Behind:
    """A tensor that a weight layer of the scope made, and what that layer read."""

    tensor: Tensor
    read: Tensor


class Rewiring(TorchFunctionMode):
    """Runs a model in another wiring while it is entered.

    Args:
        wiring: What to do.
        weights: The parameters that make a weight layer one of the scope.

    Attributes:
        changes: How many ops were changed so far; a repair that changed none was not tried.
    """

    def __init__(self, wiring: Wiring, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.changes = 0
        self._wiring = wiring
        self._weights = {id(weight) for weight in weights}
        self._behind: _Behind | None = None
        self._normed: tuple[Tensor, Tensor] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in LAYER_OPS:
            return self._layer(func, name, args, kwargs)
        behind = self._behind
        if behind is None or not args or args[0] is not behind.tensor:
            return func(*args, **kwargs)
        if name in ACTIVATION_OPS and family_of(name, args, kwargs) is not None:
            self._behind = None
            return self._activation(func, name, args, kwargs, behind)
        result = func(*args, **kwargs)
        if name in NORM_OPS and isinstance(result, Tensor):
            behind.tensor = result
        return result

    def _layer(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        at = next((i for i, arg in enumerate(args) if id(arg) in self._weights), None)
        named = any(id(value) in self._weights for value in kwargs.values())
        read = next((arg for i, arg in enumerate(args) if i != at and _is_data(arg)), None)
        if read is None or not (named or at is not None):
            return func(*args, **kwargs)
        axis = 1 if name in CONV_OPS else -1
        if self._wiring.norm_before:
            args = tuple(self._normalised(arg, axis) if arg is read else arg for arg in args)
        result = func(*args, **kwargs)
        if self._wiring.norm_after and isinstance(result, Tensor):
            result = normalised(result, axis)
            self.changes += 1
        if isinstance(result, Tensor):
            self._behind = _Behind(result, read)
        return result

    def _normalised(self, read: Tensor, axis: int) -> Tensor:
        """Query, key and value read one tensor: they read one normalisation of it."""
        if self._normed is None or self._normed[0] is not read:
            self._normed = (read, normalised(read, axis))
        self.changes += 1
        return self._normed[1]

    def _activation(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], behind: _Behind
    ) -> Any:
        function, skip = self._wiring.activation, self._wiring.skip
        skips = skip is not None and behind.read.shape == behind.tensor.shape
        if function is None and not skips:
            return func(*args, **kwargs)
        self.changes += 1
        written = name.endswith("_") or kwargs.get("inplace") is True
        given = args[0].clone() if written else args[0]
        result = function(given) if function is not None else func(given, *args[1:], **kwargs)
        if skip is not None and skips:
            result = behind.read + (result if skip == 1.0 else result * skip)
        return args[0].copy_(result) if written else result


def normalised(values: Tensor, axis: int) -> Tensor:
    """Zero mean and unit variance: a channel over batch and positions (axis 1), else a vector over features."""
    if axis == 1 and values.dim() > 2 and values.numel() > values.shape[1]:
        return F.batch_norm(values, None, None, training=True)
    return F.layer_norm(values, values.shape[-1:])


def _is_data(value: Any) -> bool:
    return (
        isinstance(value, Tensor) and value.is_floating_point() and not isinstance(value, torch.nn.Parameter)
    )
