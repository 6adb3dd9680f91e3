"""Tensor -> statistics, on the tensor's device, with one transfer when they are asked for.

A small tensor is copied whole into a buffer that its shape reuses, and full buffers are reduced at once: a
deep narrow model pays for a handful of calls instead of hundreds, and touches no new memory. Of a large
tensor the norm, the mean and the extremes are exact, one pass each; zero fraction, centred signal and common
mode come from a strided sample, whose size is stated (standard error of a fraction p:
``sqrt(p (1 - p) / sample)``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gradflow.trace_model import TensorStatistics

SAMPLE_ELEMENTS = 16_384
"""Tensors up to this size are measured whole; larger ones give a sample of about this size."""
SAMPLE_ROWS = 256
"""At most this many samples of the batch enter the sample of a large tensor."""
BUFFER_ELEMENTS = 131_072
"""A buffer holds about this many elements (512 KiB of float32): it stays in the cache until it is reduced."""
BUFFER_SLOTS = 128
"""And at most this many tensors."""
CHUNK = 65_536
"""Norms are taken over chunks of this length: one float32 accumulator over 1e7 elements is off by 2e-4."""
WELL_CONDITIONED = 1e-3
"""The variance is taken from exact moments only above this share of the mean square."""

_NOT_MEASURED = TensorStatistics()


def is_transformed(tensor: Tensor) -> bool:
    """True inside ``vmap``, ``grad`` and their like, where a tensor stands for values that cannot be read."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def real_values(tensor: Tensor) -> Tensor:
    """The stored values as a dense real tensor: complex as pairs, sparse and nested by values."""
    values = tensor.detach()
    if values.layout is not torch.strided:
        values = values.coalesce().values() if values.layout is torch.sparse_coo else values.values()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    return values


def _flat(values: Tensor) -> Tensor:
    """All elements in one dimension, in any order, without a copy where memory is dense."""
    if values.is_contiguous():
        return values.view(-1)
    dense = sorted(zip(values.stride(), values.shape, strict=True))
    expected = 1
    for stride, size in dense:
        if size != 1 and stride != expected:
            return values.reshape(-1)
        expected *= size
    return values.as_strided((values.numel(),), (1,), values.storage_offset())


def l2_norm(values: Tensor) -> Tensor:
    """The L2 norm of all elements as a 0-d float32 (or float64) tensor, accurate at any size."""
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    elif values.element_size() == 1:
        values = values.to(torch.float32)
    if values.numel() <= CHUNK:
        small: Tensor = torch.linalg.vector_norm(values)
        return small
    flat = _flat(values)
    whole = flat.numel() // CHUNK * CHUNK
    parts = torch.linalg.vector_norm(flat[:whole].view(-1, CHUNK), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:]).view(1)
    norm: Tensor = torch.linalg.vector_norm(torch.cat((parts, rest)))
    return norm


def count_nonfinite(values: Tensor) -> Tensor:
    """How many elements are NaN or Inf, as a 0-d tensor."""
    return torch.isfinite(values).logical_not_().sum()


def norm_and_nonfinite(tensor: Tensor) -> tuple[float, int]:
    """The L2 norm and the exact count of non-finite elements, transferred at once.

    A float32 norm that overflows although every element is finite is taken again in float64.
    """
    values = real_values(tensor)
    if not values.numel():
        return 0.0, 0
    norm = l2_norm(values).item()
    if math.isfinite(norm):
        return norm, 0
    return torch.linalg.vector_norm(values.double()).item(), int(count_nonfinite(values).item())


def batch_dimension(shape: Sequence[int], batch_size: int) -> int | None:
    """Which dimension counts samples: the first, the second (sequence first), or None.

    A leading dimension that is a multiple of the batch (windows, heads, flat tokens) counts as the first.
    """
    if batch_size < 1 or not shape:
        return None
    if shape[0] == batch_size:
        return 0
    if len(shape) > 1 and shape[1] == batch_size:
        return 1
    return 0 if shape[0] and shape[0] % batch_size == 0 else None


@dataclass(slots=True)
class _Buffer:
    """Copies of one shape that are reduced together.

    ``store`` is [slots, *copy]; ``as_matrix`` gives it as [slots, samples, units].
    """

    store: Tensor
    slots: tuple[Tensor, ...]
    rows: int
    axis: int | None
    take: Callable[[Tensor], Tensor] | None
    """Draws the sample of a large tensor; None copies it whole."""
    scratch: Tensor
    members: list[int] = field(default_factory=list)

    def as_matrix(self) -> Tensor:
        used = self.store[: len(self.members)]
        if self.axis == 1 and self.take is None:
            used = used.movedim(2, 1)
        return used.reshape(len(self.members), self.rows, -1)


@dataclass(slots=True)
class StatisticsCollector:
    """Takes tensors as they are produced and gives their statistics, in the same order, when all are in.

    Args:
        batch_size: N, to tell samples apart; 0 where the inputs share no leading dimension.
    """

    batch_size: int
    _buffers: dict[tuple[Any, ...], _Buffer] = field(default_factory=dict)
    _scratches: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    _reduced: list[tuple[_Buffer, tuple[int, ...], Tensor]] = field(default_factory=list)
    _results: list[TensorStatistics] = field(default_factory=list)
    _exact: dict[int, Tensor] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> int:
        """Measure a tensor as it is now; returns its position in ``results()``.

        Nothing is kept of the tensor itself: it may be changed in place right after.
        """
        slot = len(self._results)
        self._results.append(_NOT_MEASURED)
        if is_transformed(tensor):
            return slot
        values = real_values(tensor)
        key = (values.shape, values.dtype, values.device, values.is_contiguous())
        buffer = self._buffers.get(key)
        if buffer is None:
            if values.is_meta or not values.numel():
                self._results[slot] = (
                    TensorStatistics(nonfinite=0, sample=0) if not values.numel() else _NOT_MEASURED
                )
                return slot
            buffer = self._buffers[key] = _buffer_for(values, self.batch_size, self._scratches)
        if buffer.take is not None:
            self._exact[slot] = _exact_moments(values)
            self._sizes[slot] = values.numel()
            values = buffer.take(values)
        buffer.slots[len(buffer.members)].copy_(values)
        buffer.members.append(slot)
        if len(buffer.members) == len(buffer.slots):
            self._reduce(buffer)
        return slot

    def results(self) -> tuple[TensorStatistics, ...]:
        """Statistics of every tensor added so far."""
        for buffer in self._buffers.values():
            if buffer.members:
                self._reduce(buffer)
        for buffer, members, rows in self._reduced:
            self._fill(buffer, members, rows.tolist())
        self._reduced.clear()
        if self._exact:
            rows_by_slot = zip(self._exact, _transfer(list(self._exact.values())), strict=True)
            for slot, row in rows_by_slot:
                self._results[slot] = _with_exact(self._results[slot], self._sizes[slot], row)
            self._exact.clear()
        return tuple(self._results)

    def _reduce(self, buffer: _Buffer) -> None:
        """Reduce what a buffer holds, and empty it; on the CPU looking at the result costs nothing."""
        members = tuple(buffer.members)
        matrix = buffer.as_matrix()
        rows = _reduce(matrix, buffer.scratch[: matrix.numel()].view(matrix.shape))
        if matrix.device.type != "cpu":
            self._reduced.append((buffer, members, torch.cat((rows, _nonfinite_columns(matrix)), 1)))
        else:
            listed = rows.tolist()
            for position, row in enumerate(listed):
                if not math.isfinite(row[_RMS]):
                    listed[position] = _looked_at(matrix[position])
            self._fill(buffer, members, listed)
        buffer.members.clear()

    def _fill(self, buffer: _Buffer, members: tuple[int, ...], rows: list[list[float]]) -> None:
        size = buffer.slots[0].numel()
        spread = buffer.axis is not None and buffer.rows > 1
        for slot, row in zip(members, rows, strict=True):
            self._results[slot] = _statistics(row, size, spread)


def _buffer_for(values: Tensor, batch_size: int, scratches: dict[tuple[Any, ...], Tensor]) -> _Buffer:
    axis = batch_dimension(values.shape, batch_size)
    rows = 1 if axis is None else batch_size
    take = None
    shape: tuple[int, ...] = tuple(values.shape)
    if values.numel() > SAMPLE_ELEMENTS:
        take = _sampler(values, axis, rows)
        shape = tuple(take(values).shape)
        rows = shape[0]
    slots = max(1, min(BUFFER_ELEMENTS // math.prod(shape), BUFFER_SLOTS))
    dtype = torch.float64 if values.dtype is torch.float64 else torch.float32
    store = torch.empty((slots, *shape), dtype=dtype, device=values.device)
    scratch = scratches.setdefault((dtype, values.device), torch.empty(0, dtype=dtype, device=values.device))
    if scratch.numel() < store.numel():
        scratch = scratches[dtype, values.device] = torch.empty_like(store).view(-1)
    return _Buffer(store=store, slots=store.unbind(0), rows=rows, axis=axis, take=take, scratch=scratch)


_MEAN, _STD, _RMS, _ABSMAX, _NONZERO, _SIGNAL, _COMMON, _BAD = range(8)


def _reduce(x: Tensor, scratch: Tensor) -> Tensor:
    """Rows of (mean, std, rms, absmax, nonzero count, signal, common mode) of [tensors, samples, units].

    The variance is the corrected two-pass form: exact where all samples nearly agree, which is where the
    signal matters most. ``scratch`` is as large as ``x``: the page faults of a fresh temporary would cost
    more than the arithmetic.
    """
    absmax = torch.abs(x, out=scratch).amax((1, 2))
    nonzero = scratch.sign_().sum((1, 2))
    centre = x.mean(1, keepdim=True)
    deviation = torch.sub(x, centre, out=scratch)
    shift = deviation.mean(1)
    variance = (deviation.square_().mean(1) - shift * shift).clamp_min_(0)
    unit_mean = centre.squeeze(1) + shift
    mean = unit_mean.mean(1)
    within = variance.mean(1)
    common = unit_mean.square().mean(1)
    between = (unit_mean - mean.unsqueeze(1)).square_().mean(1)
    square = common + within
    columns = (
        mean,
        (within + between).sqrt(),
        square.sqrt(),
        absmax,
        nonzero,
        within.sqrt(),
        common / square,
    )
    return torch.stack(columns, 1).double()


def _nonfinite_columns(matrix: Tensor) -> Tensor:
    """(count of non-finite) of each tensor, to be appended to the rows."""
    return torch.isfinite(matrix).logical_not_().sum((1, 2)).double().unsqueeze(1)


def _looked_at(values: Tensor) -> list[float]:
    """The row with its non-finite count; what overflowed in float32 is taken again in float64."""
    wide = values.double().unsqueeze(0)
    again: list[float] = _reduce(wide, torch.empty_like(wide)).tolist()[0]
    bad = float(count_nonfinite(values).item())
    if bad:
        again[_NONZERO] = float(torch.count_nonzero(values).item())
    return [*again, bad]


def _statistics(row: list[float], size: int, spread: bool) -> TensorStatistics:
    return TensorStatistics(
        mean=row[_MEAN],
        std=row[_STD],
        rms=row[_RMS],
        absmax=row[_ABSMAX],
        zero_fraction=1.0 - row[_NONZERO] / size,
        nonfinite=int(row[_BAD]) if len(row) > _BAD else 0,
        signal=row[_SIGNAL] if spread else None,
        common_mode=row[_COMMON] if spread and row[_RMS] != 0.0 else None,
        sample=size,
    )


def _exact_moments(values: Tensor) -> Tensor:
    """(norm, sum, largest, smallest, non-finite count) as float64, still on the device."""
    if values.dtype is not torch.float64:
        values = values.float()
    flat = _flat(values)
    norm = l2_norm(flat)
    low, high = torch.aminmax(flat)
    # On the CPU looking is free, and counting is dear; elsewhere it is the other way round.
    if flat.device.type == "cpu":
        bad = flat.new_zeros(())
        if not math.isfinite(norm.item()):
            norm, bad = torch.linalg.vector_norm(flat.double()), count_nonfinite(flat)
    else:
        bad = count_nonfinite(flat)
    return torch.stack([part.double() for part in (norm, flat.sum(), high, low, bad)])


def _with_exact(sampled: TensorStatistics, size: int, row: list[float]) -> TensorStatistics:
    norm, total, high, low, bad = row
    rms, mean = norm / math.sqrt(size), total / size
    variance = rms * rms - mean * mean
    exact = variance > WELL_CONDITIONED * rms * rms or not math.isfinite(variance)
    return replace(
        sampled,
        mean=mean,
        rms=rms,
        std=math.sqrt(variance)
        if exact and math.isfinite(variance)
        else (math.nan if exact else sampled.std),
        absmax=max(high, -low),
        nonfinite=int(bad),
    )


def _transfer(rows: list[Tensor]) -> list[list[float]]:
    """One transfer a device; the order is kept."""
    home = rows[0].device
    stacked: list[list[float]] = torch.stack([row.to(home) for row in rows]).tolist()
    return stacked


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
