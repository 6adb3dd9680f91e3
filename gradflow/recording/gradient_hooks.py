"""Hooks on the gradients of tensors, by the hundred a step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

Hook = Callable[[Tensor], Tensor | None]

_OWN_KEY = -1
"""torch numbers its own hooks from 0."""
_IS_DIRECT = hasattr(torch.Tensor, "_backward_hooks")


def hook_gradient(tensor: Tensor, hook: Hook) -> None:
    """Have a hook called with the gradient of a tensor as it is now, for as long as the tensor's graph lives.

    ``Tensor.register_hook`` makes a handle to remove each hook by, which costs more than all the rest of it. The
    first hook on a tensor needs none here; where another is there already, or torch is not built as it was,
    this is ``register_hook``.
    """
    function = tensor.grad_fn
    if not _IS_DIRECT or function is None or tensor._backward_hooks is not None:
        tensor.register_hook(hook)  # type: ignore[no-untyped-call]
        return
    hooks: OrderedDict[int, Hook] = OrderedDict({_OWN_KEY: hook})
    tensor._backward_hooks = hooks
    function._register_hook_dict(tensor)
