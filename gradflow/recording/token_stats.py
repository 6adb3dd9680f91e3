"""How much the tokens of a sample differ, for tensors shaped (batch, tokens, features).

A transformer without skips makes all tokens alike long before all samples are: that is seen only here. A
sample of each tensor is copied into a buffer that its shape shares, and full buffers are reduced at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradflow.recording.tensor_stats import is_transformed

FEWEST_TOKENS = 8
"""Of fewer tokens it is no wonder that they agree."""
SAMPLES, TOKENS, ELEMENTS = 4, 64, 8_192
"""A sample has about so many samples of the batch, tokens of each, and elements in all."""
SLOTS = 16
"""A buffer holds so many tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStatistics:
    """Over the tokens of each sample."""

    signal: float
    """RMS over units and samples of the across-token standard deviation."""
    common_mode: float | None
    """‖mean_t h‖² / mean_t ‖h‖²; None for a tensor of zeros."""


@dataclass(slots=True)
class _TokenBuffer:
    take: Callable[[Tensor], Tensor]
    """Draws [samples, tokens, features], as a view."""
    store: Tensor
    members: list[int] = field(default_factory=list)


@dataclass(slots=True)
class TokenCollector:
    """Takes tensors by their probe, and gives what is known of their tokens by it.

    Args:
        batch_size: N, to tell samples from tokens.
    """

    batch_size: int
    _buffers: dict[Any, _TokenBuffer | None] = field(default_factory=dict)
    _reduced: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list)

    def add(self, probe: int, tensor: Tensor) -> None:
        """Measure a tensor as it is now, if it is shaped so; nothing is kept of it."""
        if tensor.dim() != 3 or is_transformed(tensor) or tensor.layout is not torch.strided:
            return
        key = (tensor.shape, tensor.dtype, tensor.device)
        if key not in self._buffers:
            self._buffers[key] = _new_buffer(tensor, self.batch_size)
        buffer = self._buffers[key]
        if buffer is None:
            return
        buffer.store[len(buffer.members)].copy_(buffer.take(tensor.detach()))
        buffer.members.append(probe)
        if len(buffer.members) == len(buffer.store):
            self._reduce(buffer)

    def results(self) -> dict[int, TokenStatistics]:
        """Statistics by probe; the transfers from another device happen here."""
        for buffer in self._buffers.values():
            if buffer is not None and buffer.members:
                self._reduce(buffer)
        return {
            probe: TokenStatistics(
                signal=math.sqrt(varying),
                common_mode=common / (common + varying) if common + varying else None,
            )
            for members, rows in self._reduced
            for probe, (varying, common) in zip(members, rows.tolist(), strict=True)
        }

    def _reduce(self, buffer: _TokenBuffer) -> None:
        x = buffer.store[: len(buffer.members)]
        centre = x.mean(2, keepdim=True)
        varying = (x - centre).square_().mean((1, 2, 3))
        common = centre.square_().mean((1, 2, 3))
        self._reduced.append((tuple(buffer.members), torch.stack((varying, common), 1)))
        buffer.members.clear()


def _new_buffer(tensor: Tensor, batch_size: int) -> _TokenBuffer | None:
    """None for a tensor whose first two dimensions are not samples and enough tokens."""
    axis = 0 if tensor.shape[0] == batch_size else 1
    if tensor.shape[axis] != batch_size or tensor.is_meta or not tensor.is_floating_point():
        return None
    samples, tokens, features = tensor.transpose(0, axis).shape
    if tokens < FEWEST_TOKENS or not tensor.numel():
        return None
    by_sample, by_token = math.ceil(samples / SAMPLES), math.ceil(tokens / TOKENS)
    by_feature = max(1, features * math.ceil(samples / by_sample) * math.ceil(tokens / by_token) // ELEMENTS)

    def take(values: Tensor) -> Tensor:
        return values.transpose(0, axis)[::by_sample, ::by_token, ::by_feature]

    dtype = torch.float64 if tensor.dtype is torch.float64 else torch.float32
    store = torch.empty((SLOTS, *take(tensor).shape), dtype=dtype, device=tensor.device)
    return _TokenBuffer(take=take, store=store)
