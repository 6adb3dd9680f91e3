"""Everything about a model and the process that an inspection must leave as it found it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.parameter import is_lazy


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """A flat picture of a model and of the process's generators and switches; equal means untouched.

    Tensors are taken bit for bit, so a NaN equals itself; other attributes by identity, containers by their
    members.
    """
    picture: dict[str, Any] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        picture[f"tensor {name}"] = (
            id(tensor),
            type(tensor),
            tensor.requires_grad,
            tensor.is_leaf,
            bits(tensor),
        )
        picture[f"grad {name}"] = (id(tensor.grad) if tensor.grad is not None else None, bits(tensor.grad))
        picture[f"tensor hooks {name}"] = (
            list(tensor._backward_hooks or ()),
            list(getattr(tensor, "_post_accumulate_grad_hooks", None) or ()),
        )
    for name, child in module.named_modules(remove_duplicate=False):
        picture[f"module {name}"] = (id(child), type(child), child.training)
        for attribute, value in vars(child).items():
            picture[f"attribute {name}.{attribute}"] = shallow(value)
    return picture | process_state()


def process_state() -> dict[str, Any]:
    """Generators and global switches."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch rng": torch.get_rng_state().numpy().tobytes(),
        "python rng": random.getstate(),
        "numpy rng": (name, keys.tobytes(), *rest),
        "grad enabled": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly": torch.is_anomaly_enabled(),
        "default dtype": torch.get_default_dtype(),
        "global hooks": [
            len(table)
            for table in (
                global_hooks._global_forward_hooks,
                global_hooks._global_forward_pre_hooks,
                global_hooks._global_backward_hooks,
                global_hooks._global_backward_pre_hooks,
            )
        ],
        "function modes": torch._C._len_torch_function_stack(),
    }


def shallow(value: Any) -> Any:
    """A container's members by identity, a tensor by identity and bits, anything else by identity."""
    if isinstance(value, Tensor):
        return id(value), bits(value)
    if isinstance(value, dict):
        return id(value), [(key, id(member)) for key, member in value.items()]
    if isinstance(value, list | tuple):
        return id(value), [id(member) for member in value]
    if isinstance(value, int | float | str | bool | None):
        return value
    return id(value)


def bits(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    if is_lazy(tensor):
        return "uninitialised"
    plain = tensor.detach()
    if plain.layout is torch.sparse_coo:
        return "sparse", bits(plain.coalesce().indices()), bits(plain.coalesce().values())
    plain = plain.resolve_conj().contiguous()
    return str(plain.dtype), tuple(plain.shape), plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The keys that changed, appeared or went."""
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
