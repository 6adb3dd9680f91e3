"""Tensor -> statistics, on the tensor's device, with one transfer when they are asked for.

A small tensor is copied whole into a buffer that its shape reuses, and full buffers are reduced at once: a
deep narrow model pays for a handful of calls instead of hundreds, and touches no new memory. Of a large
tensor the norm, the mean and the extremes are exact, one pass each; zero fraction, centred signal and common
mode come from a strided sample, whose size is stated (standard error of a fraction p:
``sqrt(p (1 - p) / sample)``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from gradflow.recording import kernels
from gradflow.recording.drafts import drafting
from gradflow.recording.sample_buffers import (
    BUFFER_ELEMENTS,
    SAMPLE_ELEMENTS,
    SUNK,
    Buffer,
    BufferPool,
    Key,
)
from gradflow.trace_model import TensorStatistics

CHUNK = 65_536
"""Norms are taken over chunks of this length: one float32 accumulator over 1e7 elements is off by 2e-4."""
ROWS_AT_ONCE = 64
"""So many tensors of one width share the memory for what is known of their units."""
SQUARABLE = 1e18
"""Of tensors whose elements are all smaller than this, no moment overflows in float32."""
WELL_CONDITIONED = 1e-3
"""The variance is taken from exact moments only above this share of the mean square."""

_ACCUMULATING = frozenset({torch.float32, torch.float64})
"""Types whose sums are accurate in themselves; narrower ones are widened first."""
_STATISTICS = drafting(TensorStatistics)
_NOT_MEASURED = TensorStatistics()
_EMPTY = TensorStatistics(nonfinite=0, sample=0)


is_transformed: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
"""True inside ``vmap``, ``grad`` and their like, where a tensor stands for values that cannot be read."""


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def real_values(tensor: Tensor) -> Tensor:
    """The stored values as a dense real tensor: complex as pairs, sparse and nested by values."""
    values = tensor.detach() if tensor.requires_grad else tensor
    if values.layout is not torch.strided:
        values = values.coalesce().values() if values.layout is torch.sparse_coo else values.values()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    return values


def flat_values(values: Tensor) -> Tensor:
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
    if values.dtype not in _ACCUMULATING:
        values = values.float()
    if values.numel() <= CHUNK:
        small: Tensor = torch.linalg.vector_norm(values)
        return small
    flat = flat_values(values)
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
    square = kernels.square(tensor) if tensor.is_contiguous() else None
    if square is not None:
        return math.sqrt(square), 0
    plain = tensor.dtype is torch.float32 and tensor.layout is torch.strided
    if plain and 0 < tensor.numel() <= CHUNK:
        norm = torch.linalg.vector_norm(tensor).item()
    else:
        values = real_values(tensor)
        norm = l2_norm(values).item() if values.numel() else 0.0
    if math.isfinite(norm):
        return norm, 0
    values = real_values(tensor)
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


@dataclass(frozen=True, slots=True, eq=False)
class UnitRows:
    """What the reduction of several tensors knows of each unit, [tensors, units], on their device."""

    active: Tensor
    """How many samples are not 0."""
    sunk: Tensor
    """True where the mean is more than SUNK standard deviations below 0."""

    def row(self, position: int) -> tuple[int, int]:
        """Where a tensor's row of each begins in memory."""
        start = position * self.active.shape[1]
        return self.active.data_ptr() + 4 * start, self.sunk.data_ptr() + start


def _unit_rows(count: int, width: int) -> UnitRows:
    # A default device or type that a program has set would be another.
    return UnitRows(
        active=torch.empty((count, width), dtype=torch.float32, device="cpu"),
        sunk=torch.empty((count, width), dtype=torch.bool, device="cpu"),
    )


@dataclass(slots=True)
class StatisticsCollector:
    """Takes tensors as they are produced and gives their statistics, in the same order, when all are in.

    Args:
        batch_size: N, to tell samples apart; 0 where the inputs share no leading dimension.
        pool: Memory to use, which no other collector uses at the same time.
    """

    batch_size: int
    pool: BufferPool
    _buffers: dict[Key, Buffer] = field(default_factory=dict)
    _reduced: list[tuple[Buffer, tuple[int, ...], Tensor]] = field(default_factory=list)
    _waiting: dict[tuple[int, torch.dtype], list[_Reduced]] = field(default_factory=dict)
    """What is known of each unit, by how many units and which type, until it is combined for all tensors at once."""
    _results: list[TensorStatistics] = field(default_factory=list)
    _exact: dict[int, tuple[int, Sequence[float]]] = field(default_factory=dict)
    """Number of elements and exact moments of each large tensor."""
    _on_device: dict[int, tuple[int, Tensor]] = field(default_factory=dict)
    """The same, still on a device that looking at would stop."""
    _rows: dict[tuple[int, bool], tuple[UnitRows, int]] = field(default_factory=dict)
    """Memory for what the kernels find of so many units, and how many of its rows are taken."""
    _units: dict[int, tuple[UnitRows, int]] = field(default_factory=dict)
    """Where what is known of each unit of a small (samples, units) tensor stands."""
    _surveyed: list[tuple[int, Buffer, int, list[float]]] = field(default_factory=list)
    """What the kernels found, until it is asked for: between two ops of a model Python is at its slowest."""

    def counts_units(self, tensor: Tensor) -> bool:
        """Tell whether what ``add`` keeps of a tensor shaped like this one will do for ``unit_rows``."""
        rows = tensor.shape[0] if tensor.dim() == 2 else 0
        return 1 < rows == self.batch_size and tensor.numel() <= SAMPLE_ELEMENTS and not tensor.is_sparse

    def unit_rows(self, probe: int) -> tuple[UnitRows, int] | None:
        """What is known of each unit of a tensor, and its row there; ask after ``results()``."""
        return self._units.get(probe)

    def add(self, tensor: Tensor) -> int:
        """Measure a tensor as it is now; returns its position in ``results()``.

        Nothing is kept of the tensor itself: it may be changed in place right after.
        """
        slot = len(self._results)
        self._results.append(_NOT_MEASURED)
        if is_transformed(tensor):
            return slot
        values = tensor.detach() if tensor.requires_grad else tensor
        if values.layout is not torch.strided or values.is_complex():
            values = real_values(values)
        key = (values.shape, values.dtype, values.device, values.is_contiguous())
        buffer = self._buffers.get(key)
        if buffer is None:
            if values.is_meta or not values.numel():
                self._results[slot] = _NOT_MEASURED if values.numel() else _EMPTY
                return slot
            axis = batch_dimension(values.shape, self.batch_size)
            samples = 1 if axis is None else self.batch_size
            buffer = self._buffers[key] = self.pool.buffer_for(key, values, axis, samples)
        if buffer.survey is not None and self._survey(slot, buffer, buffer.survey, values):
            return slot
        if buffer.take is not None:
            self._add_moments(slot, values)
            values = buffer.take(values)
        if kernels.is_loaded() and self._measure_units(slot, buffer, values):
            return slot
        members = buffer.members
        buffer.slots[len(members)].copy_(values)
        members.append(slot)
        if len(members) == len(buffer.slots):
            self._reduce(buffer)
        return slot

    def results(self) -> tuple[TensorStatistics, ...]:
        """Statistics of every tensor added so far."""
        for buffer in self._buffers.values():
            if buffer.members:
                self._reduce(buffer)
        for key in tuple(self._waiting):
            self._combine(key)
        for buffer, members, rows in self._reduced:
            self._fill(buffer, members, rows.tolist())
        self._reduced.clear()
        for slot, buffer, size, found in self._surveyed:
            statistics = _statistics(found[:6], buffer.elements, buffer.spreads)
            if buffer.take is not None:
                total, square, low, high = found[6:]
                statistics = _with_exact(statistics, size, (math.sqrt(square), total, high, low, 0.0))
            self._results[slot] = statistics
        self._surveyed.clear()
        if self._on_device:
            rows_by_slot = zip(self._on_device.items(), _transfer(self._on_device.values()), strict=True)
            self._exact.update({slot: (size, row) for (slot, (size, _)), row in rows_by_slot})
            self._on_device.clear()
        for slot, (size, row) in self._exact.items():
            self._results[slot] = _with_exact(self._results[slot], size, row)
        self._exact.clear()
        return tuple(self._results)

    def _add_moments(self, slot: int, values: Tensor) -> None:
        if values.device.type == "cpu":
            self._exact[slot] = (values.numel(), _moments(values))
        else:
            self._on_device[slot] = (values.numel(), _moments_on_device(values))

    def _survey(self, slot: int, buffer: Buffer, how: kernels.Survey, values: Tensor) -> bool:
        """Measure a tensor in one call, where it is: nothing is copied."""
        if not buffer.has_units:
            found = kernels.survey(values, how, None)
        else:
            units, row = self._units_row(how.units, kept=True)
            found = kernels.survey(values, how, units.row(row))
            self._units[slot] = units, row
        if found is None:
            self._units.pop(slot, None)
            return False
        self._surveyed.append((slot, buffer, how.n, found))
        return True

    def _measure_units(self, slot: int, buffer: Buffer, values: Tensor) -> bool:
        """Measure a small tensor, or the sample of a large one, where it is: nothing is copied."""
        matrix = buffer.matrix_of(values)
        if matrix is None:
            return False
        units, row = self._units_row(matrix.shape[1], kept=buffer.has_units)
        found = kernels.units(matrix, SUNK, units.active[row], units.sunk[row])
        if found is None:
            return False
        self._fill(buffer, (slot,), [found])
        self._note_units(buffer, (slot,), units, row)
        return True

    def _units_row(self, width: int, *, kept: bool) -> tuple[UnitRows, int]:
        """Memory for what is known of so many units; what nobody will ask for is written over."""
        held = self._rows.get((width, kept))
        if held is None or held[1] == len(held[0].active):
            held = _unit_rows(ROWS_AT_ONCE if kept else 1, width), 0
        self._rows[width, kept] = held[0], held[1] + kept
        return held

    def _reduce(self, buffer: Buffer) -> None:
        """Reduce what a buffer holds, and empty it; on the CPU looking at the result costs nothing."""
        members = tuple(buffer.members)
        matrix = buffer.as_matrix()
        moments = _unit_moments(matrix, self.pool.scratch_like(matrix))
        if matrix.is_cpu and moments.absmax.max().item() < SQUARABLE:
            key = (matrix.shape[2], matrix.dtype)
            waiting = self._waiting.setdefault(key, [])
            waiting.append(_Reduced(buffer, members, moments))
            if key[0] * sum(len(reduced.members) for reduced in waiting) >= BUFFER_ELEMENTS:
                self._combine(key)
            buffer.members.clear()
            return
        rows, units = _combined(moments)
        self._note_units(buffer, members, units, 0)
        if matrix.device.type != "cpu":
            self._reduced.append((buffer, members, torch.cat((rows.double(), _nonfinite_column(matrix)), 1)))
        else:
            listed = rows.tolist()
            for position, row in enumerate(listed):
                if not math.isfinite(row[_COMMON] + row[_WITHIN]):
                    listed[position] = _looked_at(matrix[position])
            self._fill(buffer, members, listed)
        buffer.members.clear()

    def _combine(self, key: tuple[int, torch.dtype]) -> None:
        """Combine over units what waits: a call for hundreds of small tensors instead of one for each buffer."""
        waiting = self._waiting.pop(key)
        rows, units = _combined(
            _UnitMoments(*map(torch.cat, zip(*(r.moments for r in waiting), strict=True)))
        )
        listed, start = rows.tolist(), 0
        for reduced in waiting:
            end = start + len(reduced.members)
            self._note_units(reduced.buffer, reduced.members, units, start)
            self._fill(reduced.buffer, reduced.members, listed[start:end])
            start = end

    def _note_units(self, buffer: Buffer, members: tuple[int, ...], units: UnitRows, start: int) -> None:
        if buffer.has_units:
            self._units.update({slot: (units, row) for row, slot in enumerate(members, start)})

    def _fill(self, buffer: Buffer, members: tuple[int, ...], rows: list[list[float]]) -> None:
        for slot, row in zip(members, rows, strict=True):
            self._results[slot] = _statistics(row, buffer.elements, buffer.spreads)


_MEAN, _WITHIN, _BETWEEN, _COMMON, _ABSMAX, _NONZERO, _BAD = range(7)


class _UnitMoments(NamedTuple):
    """Of several tensors, [tensors, units] but for the first."""

    absmax: Tensor
    """Largest magnitude of each tensor, [tensors]."""
    active: Tensor
    centre: Tensor
    shift: Tensor
    """Mean of the deviations from ``centre``: its rounding error."""
    square: Tensor
    """Mean square of those deviations."""


class _Reduced(NamedTuple):
    """What a buffer held."""

    buffer: Buffer
    members: tuple[int, ...]
    moments: _UnitMoments


def _unit_moments(x: Tensor, scratch: Tensor) -> _UnitMoments:
    """Reduce [tensors, samples, units] over samples; ``scratch`` is as large as ``x``."""
    absmax = torch.abs(x, out=scratch).amax((1, 2))
    active = scratch.sign_().sum(1)
    centre = x.mean(1, keepdim=True)
    deviation = torch.sub(x, centre, out=scratch)
    shift = deviation.mean(1)
    return _UnitMoments(absmax, active, centre.squeeze(1), shift, deviation.square_().mean(1))


def _combined(moments: _UnitMoments) -> tuple[Tensor, UnitRows]:
    """Rows of moments, largest magnitude and nonzero count of each tensor, and its units alone.

    The moments are: the mean; the variance over samples, averaged over units; the variance over units of
    their means; the mean square of those means. The variance is the corrected two-pass form: exact where all
    samples nearly agree, which is where the signal matters most.
    """
    absmax, active, centre, shift, square = moments
    variance = square.addcmul_(shift, shift, value=-1).clamp_min_(0)
    unit_mean = shift.add_(centre)
    units = UnitRows(active=active, sunk=unit_mean < variance.sqrt().mul_(-SUNK))
    mean = unit_mean.mean(1)
    common = unit_mean.square().mean(1)
    between = unit_mean.sub_(mean.unsqueeze(1)).square_().mean(1)
    return torch.stack((mean, variance.mean(1), between, common, absmax, active.sum(1)), 1), units


def _nonfinite_column(matrix: Tensor) -> Tensor:
    """The count of non-finite elements of each tensor, to be appended to the rows."""
    return torch.isfinite(matrix).logical_not_().sum((1, 2)).double().unsqueeze(1)


def _looked_at(values: Tensor) -> list[float]:
    """The row with its non-finite count; what overflowed in float32 is taken again in float64."""
    wide = values.double().unsqueeze(0)
    rows, _ = _combined(_unit_moments(wide, torch.empty_like(wide)))
    again: list[float] = rows.tolist()[0]
    bad = float(count_nonfinite(values).item())
    if bad:
        again[_NONZERO] = float(torch.count_nonzero(values).item())
    return [*again, bad]


def _statistics(row: list[float], size: int, spread: bool) -> TensorStatistics:
    within, between, common = row[_WITHIN], row[_BETWEEN], row[_COMMON]
    square = common + within
    return _STATISTICS(
        mean=row[_MEAN],
        std=math.sqrt(within + between),
        rms=math.sqrt(square),
        absmax=row[_ABSMAX],
        zero_fraction=1.0 - row[_NONZERO] / size,
        nonfinite=int(row[_BAD]) if len(row) > _BAD else 0,
        signal=math.sqrt(within) if spread else None,
        common_mode=common / square if spread and square else None,
        sample=size,
    )


def _moments(values: Tensor) -> tuple[float, ...]:
    """(norm, sum, largest, smallest, non-finite count) of a tensor on the CPU: looking is free there."""
    found = kernels.moments(flat_values(values))
    if found is not None:
        return math.sqrt(found.square), found.total, found.high, found.low, 0.0
    if values.dtype not in _ACCUMULATING:
        values = values.float()
    flat = flat_values(values)
    norm, bad = l2_norm(flat).item(), 0.0
    if not math.isfinite(norm):
        norm, bad = torch.linalg.vector_norm(flat.double()).item(), count_nonfinite(flat).item()
    low, high = torch.aminmax(flat)
    return norm, flat.sum().item(), high.item(), low.item(), bad


def _moments_on_device(values: Tensor) -> Tensor:
    """The same as float64, still on the device."""
    if values.dtype not in _ACCUMULATING:
        values = values.float()
    flat = flat_values(values)
    low, high = torch.aminmax(flat)
    parts = (l2_norm(flat), flat.sum(), high, low, count_nonfinite(flat))
    return torch.stack([part.double() for part in parts])


def _with_exact(sampled: TensorStatistics, size: int, row: Sequence[float]) -> TensorStatistics:
    norm, total, high, low, bad = row
    rms, mean = norm / math.sqrt(size), total / size
    variance = rms * rms - mean * mean
    exact = variance > WELL_CONDITIONED * rms * rms or not math.isfinite(variance)
    return _STATISTICS(
        mean=mean,
        rms=rms,
        std=math.sqrt(variance)
        if exact and math.isfinite(variance)
        else (math.nan if exact else sampled.std),
        absmax=max(high, -low),
        zero_fraction=sampled.zero_fraction,
        nonfinite=int(bad),
        signal=sampled.signal,
        common_mode=sampled.common_mode,
        sample=sampled.sample,
    )


def _transfer(waiting: Iterable[tuple[int, Tensor]]) -> list[list[float]]:
    """One transfer; the order is kept."""
    rows = [row for _, row in waiting]
    home = rows[0].device
    stacked: list[list[float]] = torch.stack([row.to(home) for row in rows]).tolist()
    return stacked
