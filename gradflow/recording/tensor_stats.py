"""Tensor -> statistics, on the tensor's device, with one transfer when they are asked for.

A small tensor is copied whole, and copies of one shape are reduced together: a deep narrow model pays for a
handful of calls instead of hundreds. Of a large tensor the norm, the mean and the extremes are exact, one
pass each; zero fraction, centred signal and common mode come from a strided sample, whose size is stated
(standard error of a fraction p: ``sqrt(p (1 - p) / sample)``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gradflow.trace_model import TensorStatistics

SAMPLE_ELEMENTS = 16_384
"""Tensors up to this size are measured whole; larger ones give a sample of about this size."""
SAMPLE_ROWS = 256
"""At most this many samples of the batch enter the sample of a large tensor."""
PENDING_ELEMENTS = 4_194_304
"""Copies waiting to be reduced hold at most this many elements (16 MiB of float32)."""
CHUNK = 65_536
"""Norms are taken over chunks of this length: one float32 accumulator over 1e7 elements is off by 2e-4."""
WELL_CONDITIONED = 1e-3
"""The variance is taken from exact moments only above this share of the mean square."""

_NOT_MEASURED = TensorStatistics()


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


@dataclass(frozen=True, slots=True)
class _Group:
    """Copies that can be reduced together."""

    rows: int
    units: int
    has_batch: bool
    dtype: torch.dtype
    device: torch.device


@dataclass(slots=True)
class StatisticsCollector:
    """Takes tensors as they are produced and gives their statistics, in the same order, when all are in.

    Args:
        batch_size: N, to tell samples apart; 0 where the inputs share no leading dimension.
    """

    batch_size: int
    _pending: dict[_Group, list[tuple[int, Tensor]]] = field(default_factory=dict)
    _pending_elements: int = 0
    _results: list[TensorStatistics] = field(default_factory=list)
    _exact: dict[int, Tensor] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> int:
        """Measure a tensor as it is now; returns its position in ``results()``.

        Nothing is kept of the tensor itself: it may be changed in place right after.
        """
        slot = len(self._results)
        self._results.append(_NOT_MEASURED)
        values = real_values(tensor)
        size = values.numel()
        if not size or values.is_meta:
            self._results[slot] = TensorStatistics(nonfinite=0, sample=0) if not size else _NOT_MEASURED
            return slot
        if size > SAMPLE_ELEMENTS:
            self._exact[slot] = _exact_moments(values)
            self._sizes[slot] = size
        self._queue(slot, values)
        return slot

    def results(self) -> tuple[TensorStatistics, ...]:
        """Statistics of every tensor added so far."""
        self._flush()
        if self._exact:
            slots = tuple(self._exact)
            rows = _transfer([self._exact[slot] for slot in slots])
            for slot, row in zip(slots, rows, strict=True):
                self._results[slot] = _with_exact(self._results[slot], self._sizes[slot], row)
            self._exact.clear()
        return tuple(self._results)

    def _queue(self, slot: int, values: Tensor) -> None:
        sample, has_batch = _sample(values, self.batch_size)
        group = _Group(sample.shape[0], sample.shape[1], has_batch, sample.dtype, sample.device)
        self._pending.setdefault(group, []).append((slot, sample))
        self._pending_elements += sample.numel()
        if self._pending_elements > PENDING_ELEMENTS:
            self._flush()

    def _flush(self) -> None:
        for group, members in self._pending.items():
            stacked = torch.stack([sample for _, sample in members])
            for (slot, sample), row in zip(members, _reduce(stacked).tolist(), strict=True):
                if not math.isfinite(row[_RMS]):
                    row = _reduce(sample.double().unsqueeze(0)).tolist()[0]
                self._results[slot] = _statistics(row, sample, group.has_batch)
        self._pending.clear()
        self._pending_elements = 0


_MEAN, _STD, _RMS, _ABSMAX, _NONZERO, _SIGNAL, _COMMON = range(7)


def _reduce(stacked: Tensor) -> Tensor:
    """Rows of (mean, std, rms, absmax, nonzero count, signal, common mode) of [tensors, samples, units].

    The variance is the corrected two-pass form: exact where all samples nearly agree, which is where the
    signal matters most.
    """
    x = stacked if stacked.dtype is torch.float64 else stacked.float()
    centre = x.mean(1, keepdim=True)
    nonzero = x.sign().abs_().sum((1, 2))
    absmax = torch.maximum(x.amax((1, 2)), x.amin((1, 2)).neg_())
    deviation = x - centre
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
    return torch.stack([column.double() for column in columns], 1)


def _statistics(row: list[float], sample: Tensor, has_batch: bool) -> TensorStatistics:
    size = sample.numel()
    bad = 0 if math.isfinite(row[_RMS]) else int(count_nonfinite(sample).item())
    nonzero = row[_NONZERO] if not bad else float(torch.count_nonzero(sample).item())
    spread = has_batch and sample.shape[0] > 1
    return TensorStatistics(
        mean=row[_MEAN],
        std=row[_STD],
        rms=row[_RMS],
        absmax=row[_ABSMAX],
        zero_fraction=1.0 - nonzero / size,
        nonfinite=bad,
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


def _sample(values: Tensor, batch_size: int) -> tuple[Tensor, bool]:
    """A copy of the values or of a strided sample, as [samples, units]; and whether rows are samples."""
    axis = batch_dimension(values.shape, batch_size)
    if axis is None:
        rows, by_sample = 1, values.unsqueeze(0)
    else:
        by_sample = values.movedim(1, 0) if axis == 1 else values
        rows = batch_size
    if values.numel() <= SAMPLE_ELEMENTS:
        copy = by_sample.clone(memory_format=torch.contiguous_format)
        return copy.view(rows, -1), axis is not None
    if by_sample.is_contiguous() or (rows != by_sample.shape[0]):
        return _strided(by_sample.reshape(rows, -1)), axis is not None
    return _gathered(by_sample), axis is not None


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
    return matrix[::row_step, step // 2 :: step].clone(memory_format=torch.contiguous_format)


def _gathered(values: Tensor) -> Tensor:
    """The same sample of a tensor whose units do not lie in one stride, without copying the tensor."""
    shape = values.shape[1:]
    row_step, step = _stride(values.shape[0], math.prod(shape))
    flat = torch.arange(step // 2, math.prod(shape), step, device=values.device)
    picked: tuple[Any, ...] = (slice(None, None, row_step), *torch.unravel_index(flat, shape))
    return values[picked].contiguous()
