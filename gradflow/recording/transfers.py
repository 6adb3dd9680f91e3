"""Small results that wait on their devices -> numbers, in one transfer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def listed(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Flat tensors as lists of floats, whatever device each is on, in one transfer."""
    if not tensors:
        return []
    home = tensors[0].device
    flat = torch.cat([tensor.double().to(home) for tensor in tensors]).tolist()
    found, start = [], 0
    for tensor in tensors:
        found.append(flat[start : start + tensor.numel()])
        start += tensor.numel()
    return found
