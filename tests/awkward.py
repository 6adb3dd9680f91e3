"""What an awkward case is: a model, and the same forward again by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import gradflow

Twin = Callable[..., tuple[Any, dict[str, Tensor]]]
"""``twin(module, *inputs)`` -> (outputs, the tensors that modules return), without hooks or in-place ops."""


def energy(outputs: Any, inputs: Any = None) -> Tensor:
    """The mean of |h|^2 of every floating leaf, summed: a gradient that differs from element to element."""
    return sum((leaf.abs().square().mean() for leaf in leaves(outputs)), start=torch.zeros(()))


def leaves(value: Any) -> list[Tensor]:
    """The floating tensors of a nested output, independent of the recorder's own walk."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() or value.is_complex() else []
    if dataclasses.is_dataclass(value):
        value = [getattr(value, each.name) for each in dataclasses.fields(value)]
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return [value.data]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [leaf for member in value for leaf in leaves(member)] if isinstance(value, list | tuple) else []


def to_float64(module: nn.Module) -> nn.Module:
    return module.double()


def as_it_is(module: nn.Module) -> nn.Module:
    return module


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One awkward model.

    ``build`` gives ``(module, inputs)``, freshly and the same every time. Keys of ``coverage`` and of the
    twin's tensors are "name", "name#call", "name:output" or both.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Any]]
    twin: Twin
    loss: Callable[[Any, Any], Tensor] = energy
    coverage: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[gradflow.Report], None] | None = None
    widen: Callable[[nn.Module], nn.Module] = to_float64
    tolerance: float = 1e-4
    batch: int = 6


def seeded(build: Callable[[], tuple[nn.Module, Any]]) -> Callable[[], tuple[nn.Module, Any]]:
    """The same model at every call, whatever ran before."""

    def again() -> tuple[nn.Module, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return build()

    return again


def batch_of(*shape: int) -> Tensor:
    return torch.randn(6, *shape)
