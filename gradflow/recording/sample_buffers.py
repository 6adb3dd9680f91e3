"""Copies of the tensors of a step, in memory that its shapes and steps share.

Fresh memory costs more than the arithmetic done on it: a page fault is dearer than reducing the page. So a
shape keeps its buffer, and a model keeps its buffers from step to step. A small tensor is copied whole, of a
large one a strided sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradflow.recording import kernels

SUNK = 4.0
"""How many of its own standard deviations below 0 the mean pre-activation of a sunk unit is."""
SAMPLE_ELEMENTS = 16_384
"""Tensors up to this size are measured whole; larger ones give a sample of about this size."""
SAMPLE_ROWS = 256
"""At most this many samples of the batch enter the sample of a large tensor."""
BUFFER_ELEMENTS = 262_144
"""A buffer holds about this many elements (1 MiB of float32), to be reduced together."""
BUFFER_SLOTS = 128
"""And at most this many tensors."""

Key = tuple[torch.Size, torch.dtype, torch.device, bool]
"""Shape, type, device and whether the memory is contiguous: tensors alike in these share a buffer."""


@dataclass(slots=True)
class Buffer:
    """Copies of one shape that are reduced together.

    ``store`` is [slots, *copy]; ``as_matrix`` gives it as [slots, samples, units].
    """

    store: Tensor
    slots: tuple[Tensor, ...]
    rows: int
    axis: int | None
    take: Callable[[Tensor], Tensor] | None
    """Draws the sample of a large tensor; None copies it whole."""
    survey: kernels.Survey | None = None
    """How tensors like these are measured where they lie; None where they have to be copied."""
    members: list[int] = field(default_factory=list)
    has_units: bool = field(init=False)
    """True where each unit of a whole (samples, units) tensor is looked at."""
    spreads: bool = field(init=False)
    """True where samples are told apart."""
    elements: int = field(init=False)
    """Of one copy."""

    def __post_init__(self) -> None:
        self.has_units = self.take is None and self.axis == 0 and self.store.dim() == 3
        self.spreads = self.axis is not None and self.rows > 1
        self.elements = self.slots[0].numel()

    def as_matrix(self) -> Tensor:
        """What the buffer holds, [tensors, samples, units]."""
        used = self.store[: len(self.members)]
        if self.axis == 1 and self.take is None:
            used = used.movedim(2, 1)
        return used.reshape(len(self.members), self.rows, -1)

    def matrix_of(self, values: Tensor) -> Tensor | None:
        """One tensor, or its sample, as [samples, units] where it lies; None where that would take a copy."""
        if self.take is not None:
            return values if values.dim() == 2 else None
        return values.view(self.rows, -1) if self.axis != 1 and values.is_contiguous() else None


@dataclass(slots=True)
class BufferPool:
    """The buffers of a model, for one step at a time; they stay for the next."""

    _buffers: dict[tuple[Key, int | None, int], Buffer] = field(default_factory=dict)
    _scratches: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict)

    def buffer_for(self, key: Key, values: Tensor, axis: int | None, samples: int) -> Buffer:
        """An empty buffer for tensors like ``values``, with samples along ``axis``."""
        buffer = self._buffers.get((key, axis, samples))
        if buffer is None:
            buffer = self._buffers[key, axis, samples] = _new_buffer(values, axis, samples)
        # A step that raised has left some behind.
        buffer.members.clear()
        return buffer

    def scratch_like(self, matrix: Tensor) -> Tensor:
        """Working memory of the size and type of ``matrix``."""
        key = (matrix.dtype, matrix.device)
        scratch = self._scratches.get(key)
        if scratch is None or scratch.numel() < matrix.numel():
            scratch = self._scratches[key] = matrix.new_empty(matrix.numel())
        return scratch[: matrix.numel()].view(matrix.shape)


def _new_buffer(values: Tensor, axis: int | None, rows: int) -> Buffer:
    take = None
    shape: tuple[int, ...] = tuple(values.shape)
    if values.numel() > SAMPLE_ELEMENTS:
        take = _sampler(values, axis, rows)
        shape = tuple(take(values).shape)
        rows = shape[0]
    slots = max(1, min(BUFFER_ELEMENTS // math.prod(shape), BUFFER_SLOTS))
    dtype = torch.float64 if values.dtype is torch.float64 else torch.float32
    store = torch.empty((slots, *shape), dtype=dtype, device=values.device)
    buffer = Buffer(store=store, slots=store.unbind(0), rows=rows, axis=axis, take=take)
    matrix = buffer.matrix_of(values if take is None else take(values))
    if matrix is not None and values.is_contiguous():
        buffer.survey = kernels.survey_of(values, matrix, SUNK, sampled=take is not None)
    return buffer


def _sampler(values: Tensor, axis: int | None, rows: int) -> Callable[[Tensor], Tensor]:
    """How to draw [samples, units] from tensors that are shaped and laid out like this one."""
    if axis is None:
        return lambda tensor: _strided(tensor.reshape(1, -1))
    if rows != values.shape[axis] or (axis == 0 and values.is_contiguous()):
        return lambda tensor: _strided(tensor.reshape(rows, -1))
    picked = _indices(values.movedim(axis, 0))
    return lambda tensor: tensor.movedim(axis, 0)[picked]


def _stride(rows: int, units: int) -> tuple[int, int]:
    """Steps over samples and over units that leave about SAMPLE_ELEMENTS.

    The step over units shares no factor with their number, so that every channel and position is met.
    """
    row_step = math.ceil(rows / SAMPLE_ROWS)
    kept = math.ceil(rows / row_step)
    step = max(1, units * kept // SAMPLE_ELEMENTS)
    while step > 1 and math.gcd(step, units) != 1:
        step += 1
    return row_step, step


def _strided(matrix: Tensor) -> Tensor:
    row_step, step = _stride(*matrix.shape)
    return matrix[::row_step, step // 2 :: step]


def _indices(values: Tensor) -> tuple[Any, ...]:
    """The same sample of a tensor whose units do not lie in one stride, without copying the tensor."""
    shape = values.shape[1:]
    row_step, step = _stride(values.shape[0], math.prod(shape))
    flat = torch.arange(step // 2, math.prod(shape), step, device=values.device)
    return (slice(None, None, row_step), *torch.unravel_index(flat, shape))
