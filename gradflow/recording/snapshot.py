"""Leave the model exactly as it was found, also after an exception.

Held: the values of parameters, buffers and inputs, which objects stand under which name, every plain
attribute of every module (modes and hook tables included), and gradients.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter


@dataclass(frozen=True, slots=True, kw_only=True)
class _ModuleState:
    module: nn.Module
    attributes: dict[str, Any]
    tables: dict[str, Any]
    """Shallow copies of the attributes that are plain containers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything a forward and backward may change in a model."""

    modules: tuple[_ModuleState, ...]
    values: tuple[tuple[Tensor, Tensor], ...]
    """Each parameter and buffer with a copy of its value."""
    gradients: tuple[tuple[Tensor, Tensor | None], ...]

    def restore(self) -> None:
        """Put everything back; a tensor that still has its value is not written to."""
        for state in self.modules:
            _restore_attributes(state)
        with torch.no_grad():
            for tensor, value in self.values:
                if not _same(tensor, value):
                    _overwrite(tensor, value)
            for tensor, gradient in self.gradients:
                tensor.grad = gradient

    def clear_gradients(self) -> None:
        """Set the gradients aside, so that backward makes new ones instead of adding to them."""
        for tensor, _ in self.gradients:
            tensor.grad = None


def take_snapshot(module: nn.Module, inputs: Iterable[Tensor] = ()) -> Snapshot:
    """Copy what may change. Costs one copy of the parameters, buffers and inputs."""
    tensors = _unique([*module.parameters(), *module.buffers(), *inputs])
    return Snapshot(
        modules=tuple(_module_state(child) for child in module.modules()),
        values=tuple((tensor, tensor.detach().clone()) for tensor in tensors),
        gradients=tuple((tensor, tensor.grad) for tensor in tensors if tensor.is_leaf),
    )


def _module_state(module: nn.Module) -> _ModuleState:
    attributes = dict(vars(module))
    tables = {name: value.copy() for name, value in attributes.items() if type(value) in _CONTAINERS}
    return _ModuleState(module=module, attributes=attributes, tables=tables)


_CONTAINERS = (dict, OrderedDict, list, set)


def _restore_attributes(state: _ModuleState) -> None:
    attributes = vars(state.module)
    for name in attributes.keys() - state.attributes.keys():
        del attributes[name]
    attributes.update(state.attributes)
    for name, table in state.tables.items():
        current = attributes[name]
        if isinstance(current, list):
            current[:] = table
        else:
            current.clear()
            current.update(table)


def _same(tensor: Tensor, value: Tensor) -> bool:
    if tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
        return False
    return torch.equal(_bits(tensor), _bits(value))


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that a NaN equals itself."""
    plain = tensor.detach()
    if plain.layout is not torch.strided or not plain.numel():
        return plain
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if plain.is_complex():
        plain = torch.view_as_real(plain.resolve_conj())
    return plain.contiguous().view(widths[plain.element_size()])


def _overwrite(tensor: Tensor, value: Tensor) -> None:
    if tensor.shape == value.shape and tensor.dtype == value.dtype and tensor.device == value.device:
        tensor.copy_(value)
    else:
        tensor.data = value.clone()


def _unique(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


@contextmanager
def preserved(module: nn.Module, inputs: Iterable[Tensor] = ()) -> Iterator[Snapshot]:
    """Restore the model and its inputs when the block ends, however it ends."""
    snapshot = take_snapshot(module, inputs)
    with _versions_kept([tensor for tensor, _ in snapshot.values]), _cast_anew():
        try:
            yield snapshot
        finally:
            snapshot.restore()


@contextmanager
def _cast_anew() -> Iterator[None]:
    """Neither use nor leave cast weights in autocast's cache, which lasts as long as the caller's block.

    A weight that is changed in place, by a step of the optimizer or a repair, would still run as it was.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def _versions_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put back how often each tensor was written to; wrap what restores every value.

    Autograd compares these counts: a caller between forward and backward could otherwise not run its backward,
    although every value that its graph has saved is back.
    """
    with ExitStack() as stack:
        for tensor in tensors:
            if not tensor.is_inference():
                stack.enter_context(_unsafe_preserve_version_counter(tensor))
        yield
