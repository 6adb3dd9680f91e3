"""The tensors inside whatever a module takes or returns, each with the path that leads to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

MAX_DEPTH = 16
"""Deeper nesting than this is a data structure of the model's own (a tree, a cycle), not an output."""

Leaf = tuple[str, Tensor]


def tensor_leaves(value: Any) -> tuple[Leaf, ...]:
    """List the tensors of a nested value in the order they are written.

    Dicts (and ``ModelOutput``), dataclasses, named tuples, lists, tuples, packed sequences (their ``data``)
    and plain objects that hold tensors as attributes (a ``SimpleNamespace``, a distribution) are opened.
    Caches, modules and everything else are not outputs and are passed over, as is ``None``.

    Returns:
        ``(path, tensor)`` pairs of any dtype: "" for a lone tensor, else "logits", "0", "hidden_states.3".
        A tensor that is reached twice is listed twice.
    """
    if isinstance(value, Tensor):
        return (("", value),)
    if value is None:
        return ()
    return tuple(_walk(value, "", 0))


def floating_leaves(value: Any) -> tuple[Leaf, ...]:
    """Keep the leaves that can carry a gradient: floating-point and complex ones."""
    return tuple(
        (path, leaf) for path, leaf in tensor_leaves(value) if leaf.is_floating_point() or leaf.is_complex()
    )


def _walk(value: Any, path: str, depth: int) -> Iterator[Leaf]:
    if isinstance(value, Tensor):
        yield path, value
        return
    if depth > MAX_DEPTH:
        return
    for key, child in _children(value):
        yield from _walk(child, f"{path}.{key}" if path else str(key), depth + 1)


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, PackedSequence):
        yield "data", value.data
    elif isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield field.name, getattr(value, field.name, None)
    else:
        yield from _tensor_attributes(value)


def _tensor_attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """A plain object's own tensors, one level down: deeper ones belong to its workings, not to the output."""
    if isinstance(value, (nn.Module, type, torch.device, str, bytes)) or "Cache" in type(value).__name__:
        return
    for key, child in getattr(value, "__dict__", {}).items():
        if isinstance(child, Tensor) or _is_tensor_sequence(child):
            yield key.removeprefix("_"), child


def _is_tensor_sequence(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(item, Tensor) for item in value)
    )
