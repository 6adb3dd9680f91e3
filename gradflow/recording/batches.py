"""Whatever a file or a person gives as inputs -> batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gradflow.errors import InputError
from gradflow.recording.leaves import tensor_leaves
from gradflow.recording.model_choice import required_arguments
from gradflow.recording.signatures import ForwardSignature
from gradflow.recording.target_types import Batch
from gradflow.recording.tracebacks import model_error

MOST_BATCHES = 8
"""Taken from an iterable of batches: enough for a median, few enough to hold."""


def read_batches(value: Any, source: str) -> tuple[Batch, ...]:
    """Read declared inputs: a value, a callable that returns one, or an iterable of batches.

    A tuple, and a list of tensors (``get_inputs()`` of KernelBench), are positional arguments; a dict is
    keyword arguments; a list of tuples or of dicts, an iterator and a DataLoader are batches.

    Raises:
        InputError: It is empty or nothing that can be read so.
        ModelError: The callable or the iterator raised.
    """
    try:
        value = _called(value, source)
        if _is_batches(value):
            return _several(value, source)
    except (InputError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise model_error(error, source) from error
    return (one_batch(value, source),)


def one_batch(value: Any, source: str) -> Batch:
    """Read one batch: a tuple or list is positional, a dict is keywords, anything else is one argument."""
    if isinstance(value, Mapping):
        return Batch(kwargs={str(key): _as_tensor(item) for key, item in value.items()})
    if isinstance(value, (tuple, list)) and not _is_structure(value):
        return Batch(args=tuple(_as_tensor(item) for item in value), kwargs={})
    if value is None or isinstance(value, (str, bytes)):
        raise InputError(
            f"{source} is {value!r}: inputs are a tensor, a tuple of positional arguments, a dict of keyword "
            "arguments, a function that returns one of these, or an iterable of batches"
        )
    return Batch(args=(_as_tensor(value),), kwargs={}, lone=True)


def fitted(batch: Batch, signature: ForwardSignature) -> Batch:
    """Read a dict of which forward takes no key as its one argument: ``forward(self, batch)``."""
    if batch.args or not batch.kwargs or not signature.positional:
        return batch
    if any(signature.accepts(name) for name in batch.kwargs):
        return batch
    return Batch(args=(dict(batch.kwargs),), kwargs={}, lone=True)


def _called(value: Any, source: str) -> Any:
    if isinstance(value, Tensor) or not callable(value) or hasattr(value, "__iter__"):
        return value
    needed = required_arguments(value)
    if needed:
        raise InputError(f"{source} needs arguments ({', '.join(needed)}); gradflow calls it with none")
    return value()


def _is_structure(value: Any) -> bool:
    return isinstance(value, PackedSequence) or hasattr(value, "_fields")


def _is_batches(value: Any) -> bool:
    if isinstance(value, list):
        kinds = {type(item) for item in value}
        return bool(value) and len(kinds) == 1 and issubclass(kinds.pop(), (tuple, Mapping))
    plain = (Tensor, Mapping, tuple, str, bytes)
    return hasattr(value, "__iter__") and not isinstance(value, plain) and not hasattr(value, "__array__")


def _several(value: Iterable[Any], source: str) -> tuple[Batch, ...]:
    batches = tuple(one_batch(item, source) for item in itertools.islice(iter(value), MOST_BATCHES))
    if not batches:
        raise InputError(f"{source} gave no batch: it is empty")
    return batches


def _as_tensor(value: Any) -> Any:
    # numpy arrays, without importing numpy to say so
    if hasattr(value, "__array__") and hasattr(value, "dtype") and not isinstance(value, Tensor):
        return torch.as_tensor(value)
    return value


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Apply a function to every tensor of a batch, wherever it is nested."""
    kwargs = {key: _mapped(value, change) for key, value in batch.kwargs.items()}
    return replace(batch, args=tuple(_mapped(arg, change) for arg in batch.args), kwargs=kwargs)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PackedSequence):
        return PackedSequence(change(value.data), *value[1:])
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def placed(batch: Batch, device: torch.device | None, dtype: torch.dtype | None) -> Batch:
    """Move a batch to a device; its floating tensors follow the dtype."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    return map_tensors(batch, move)


def cut(batch: Batch, size: int) -> Batch:
    """Keep the first ``size`` samples: cut the leading dimension that all inputs share.

    Raises:
        InputError: The inputs share none, or it is smaller.
    """
    tensors = [t for _, t in tensor_leaves((batch.args, dict(batch.kwargs))) if t.dim() > 0]
    leading = {int(tensor.shape[0]) for tensor in tensors}
    if len(leading) != 1:
        found = ", ".join("×".join(map(str, t.shape)) for t in tensors) or "no tensor"
        raise InputError(
            f"--batch-size {size}: the inputs share no leading dimension to cut ({found}); "
            "set a module-level batch_size in the file, or give --input"
        )
    (length,) = leading
    if size > length:
        raise InputError(f"--batch-size {size} is more than the {length} samples the inputs have")
    return map_tensors(batch, lambda tensor: tensor[:size] if tensor.dim() else tensor)
