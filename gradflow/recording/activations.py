"""What the units of a nonlinearity do, measured when it runs, in place or not, module or function.

Which units a rectifier lets through, and which elements of a tanh or a sigmoid are saturated, is decided by
the pre-activation, so that is what is looked at, before the op may overwrite it; of other nonlinearities the
output is. Small tensors of one shape are copied into a shared buffer and reduced at once; of a large tensor
enough observations of every unit are taken to tell an activity of 1% from none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from gradflow.recording import kernels
from gradflow.recording.sample_buffers import BUFFER_ELEMENTS, BUFFER_SLOTS, SAMPLE_ELEMENTS, SUNK
from gradflow.recording.tensor_stats import UnitRows, is_transformed, real_values

ENOUGH_OBSERVATIONS = 298
"""ln 0.05 / ln 0.99: a unit never active in so many is active in less than 1%, at 95% confidence."""
FEWEST_OBSERVATIONS = 16
"""A standard deviation of fewer says too little to call a unit sunk by it."""
LEAST_ACTIVITY = 0.01
"""A rectifier's unit that is active in a smaller share of its observations is inactive."""
DORMANT = 0.1
"""A unit whose mean magnitude is at most this share of the layer's is dormant (Sokar et al., 2023)."""
STUCK = 0.99
"""A unit on one side of saturation in this share of its observations is stuck."""
SATURATION = {"tanh": 2.5, "sigmoid": 5.0}
"""|z| above which the slope is below 2.7% of its largest: 1 - tanh(2.5)^2 = 4 sigmoid'(5) = 0.0266."""
RECTIFIED_OBSERVATIONS = 300
"""Of a large tensor this many observations of each unit are taken at least, where it has them."""
MANY_SAMPLES = 64
"""Of more samples than this some are left out, before positions are."""
OTHER_OBSERVATIONS = 96
"""The same, where only a mean magnitude is wanted."""


class Family(StrEnum):
    """What can be said about the units of a nonlinearity."""

    RECTIFIER = "rectifier"
    TANH = "tanh"
    SIGMOID = "sigmoid"
    OTHER = "other"


_OTHERS = (
    "gelu silu elu selu celu leaky_relu prelu rrelu softplus mish hardswish hardsigmoid softsign logsigmoid"
)
_FAMILIES = {
    Family.RECTIFIER: ("relu", "relu6", "clamp_min"),
    Family.TANH: ("tanh",),
    Family.SIGMOID: ("sigmoid", "expit", "special_expit"),
    Family.OTHER: tuple(_OTHERS.split()),
}
FAMILIES = {op + end: family for family, ops in _FAMILIES.items() for op in ops for end in ("", "_")}
"""Ops by name; some are rectifiers only with the right arguments: see ``family_of``."""
_CONDITIONAL = "hardtanh hardtanh_ threshold threshold_ _threshold clamp clamp_ clip clip_"
CONDITIONAL = frozenset(_CONDITIONAL.split())
"""Rectifiers where their lower limit is 0."""
ACTIVATION_OPS = frozenset(FAMILIES) | CONDITIONAL

Arguments = tuple[Any, ...]
Keywords = dict[str, Any] | None


def family_of(op: str, args: Arguments, kwargs: Keywords) -> Family | None:
    """What an op is with these arguments; None for a clamp that is no rectifier."""
    named = kwargs or {}
    if op in CONDITIONAL:
        kind = op.lstrip("_")[0]
        name = {"h": "min_val", "t": "threshold", "c": "min"}[kind]
        default = -1.0 if kind == "h" else None
        limit = args[1] if len(args) > 1 else named.get(name, default)
        replaced = (args[2] if len(args) > 2 else named.get("value")) if kind == "t" else 0
        lifts = isinstance(limit, int | float) and limit == 0 and replaced == 0
        bounded = Family.OTHER if kind == "h" else None
        return Family.RECTIFIER if lifts else bounded
    family = FAMILIES.get(op)
    if op.startswith("clamp_min"):
        limit = args[1] if len(args) > 1 else named.get("min")
        return family if isinstance(limit, int | float) and limit == 0 else None
    return family


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitStatistics:
    """Shares of one activation's units; see ``ActivationRecord``."""

    units: int
    observations: int
    inactive: float | None = None
    sunk: float | None = None
    always_active: float | None = None
    dormant: float | None = None
    saturated: float | None = None
    stuck: float | None = None


@dataclass(slots=True)
class _UnitBuffer:
    """Copies of activations of one shape and family, [slots, outer, units, inner]."""

    family: Family
    take: Callable[[Tensor], Tensor] | None
    """Draws [outer, units, inner] of a large tensor; None copies it whole."""
    store: Tensor
    slots: tuple[Tensor, ...]
    scratch: Tensor
    grid: kernels.Grid | None
    """How the units of a rectifier are counted where they lie; None where they have to be copied."""
    members: list[int] = field(default_factory=list)


@dataclass(slots=True)
class UnitPool:
    """The buffers of a model, for one step at a time; they stay for the next."""

    buffers: dict[Any, _UnitBuffer] = field(default_factory=dict)


@dataclass(slots=True)
class ActivationCollector:
    """Takes what nonlinearities are given or return, and gives the statistics of their units in that order."""

    pool: UnitPool
    _used: dict[int, _UnitBuffer] = field(default_factory=dict)
    _results: list[UnitStatistics | None] = field(default_factory=list)
    _waiting: list[tuple[_UnitBuffer, tuple[int, ...], Tensor]] = field(default_factory=list)
    _counted: list[tuple[_UnitBuffer, int, list[float]]] = field(default_factory=list)
    """What the kernels found."""

    def add(self, tensor: Tensor, family: Family, axis: int) -> int | None:
        """Measure a pre-activation (of family OTHER an output) as it is now.

        Nothing is kept of the tensor itself.

        Args:
            tensor: With at least one dimension besides that of the units.
            family: What it is given to.
            axis: The dimension of the units, 1 or the last.

        Returns:
            The position in ``results()``; None for a tensor that cannot be looked at.
        """
        if is_transformed(tensor) or tensor.is_meta or not tensor.numel() or tensor.is_complex():
            return None
        values = real_values(tensor)
        key = (values.shape, values.dtype, values.device, values.is_contiguous(), family, axis)
        buffer = self.pool.buffers.get(key)
        if buffer is None:
            buffer = self.pool.buffers[key] = _new_buffer(values, family, axis)
        if id(buffer) not in self._used:
            # A step that raised has left some behind.
            buffer.members.clear()
            self._used[id(buffer)] = buffer
        slot = len(self._results)
        self._results.append(None)
        found = None if buffer.grid is None else kernels.rectifier(values, buffer.grid)
        if found is not None:
            self._counted.append((buffer, slot, found))
            return slot
        members = buffer.members
        buffer.slots[len(members)].copy_(values if buffer.take is None else buffer.take(values))
        members.append(slot)
        if len(members) == len(buffer.slots):
            self._reduce(buffer)
        return slot

    def results(self) -> tuple[UnitStatistics | None, ...]:
        """Statistics of everything added so far; what waits on another device is transferred, all at once."""
        for buffer in self._used.values():
            if buffer.members:
                self._reduce(buffer)
        for buffer, members, rows in self._waiting:
            self._fill(buffer, members, rows.tolist())
        self._waiting.clear()
        for buffer, slot, found in self._counted:
            self._fill(buffer, (slot,), [found])
        self._counted.clear()
        return tuple(self._results)

    def _reduce(self, buffer: _UnitBuffer) -> None:
        count = len(buffer.members)
        rows = _REDUCTIONS[buffer.family](buffer.store[:count], buffer.scratch[:count])
        members = tuple(buffer.members)
        if rows.device.type == "cpu":
            self._fill(buffer, members, rows.tolist())
        else:
            self._waiting.append((buffer, members, rows))
        buffer.members.clear()

    def _fill(self, buffer: _UnitBuffer, members: tuple[int, ...], rows: list[list[float]]) -> None:
        _, outer, units, inner = buffer.store.shape
        names = _NAMES[buffer.family]
        for slot, row in zip(members, rows, strict=True):
            observations = int(row[-1]) if buffer.family is Family.RECTIFIER else outer * inner
            self._results[slot] = UnitStatistics(
                units=units, observations=observations, **_measured(names, row)
            )


_NAMES = {
    Family.RECTIFIER: ("inactive", "always_active", "sunk"),
    Family.TANH: ("saturated", "stuck", "dormant"),
    Family.SIGMOID: ("saturated", "stuck"),
    Family.OTHER: ("dormant",),
}


def _tells_sunk(observations: int) -> bool:
    """Fewer tell nothing by their deviation; of more it needs none."""
    return FEWEST_OBSERVATIONS <= observations < ENOUGH_OBSERVATIONS


def _rectifier(x: Tensor, scratch: Tensor) -> Tensor:
    """Shares of inactive, always active and sunk units (NaN: not asked), and the observations that count.

    An observation whose pre-activations are all exactly 0 is padding (an empty slot of an expert, a masked
    token) and does not count.
    """
    tensors, total = x.shape[0], x.shape[1] * x.shape[3]
    active = torch.gt(x, 0, out=scratch).sum((1, 3))
    padding = x[:, :, 0].eq(0)
    if x.device.type != "cpu" or bool(padding.any()):
        seen = x.ne(0).any(2).flatten(1).sum(1).clamp_min_(1).to(x.dtype)
    else:
        seen = torch.full((tensors,), float(total), dtype=x.dtype, device=x.device)
    inactive = (active < LEAST_ACTIVITY * seen.unsqueeze(1)).to(x.dtype).mean(1)
    always = (active > (1 - LEAST_ACTIVITY) * seen.unsqueeze(1)).to(x.dtype).mean(1)
    sunk = torch.full_like(inactive, math.nan)
    if _tells_sunk(total):
        mean = x.mean((1, 3))
        variance = (torch.mul(x, x, out=scratch).mean((1, 3)) - mean * mean).clamp_min_(0)
        below = (mean < -SUNK * variance.sqrt_()) & (active == 0)
        sunk = below.to(x.dtype).mean(1)
    return torch.stack((inactive, always, sunk, seen), 1)


def _saturating(x: Tensor, scratch: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Shares of saturated elements and of stuck units."""
    total = x.shape[1] * x.shape[3]
    high = torch.gt(x, limit, out=scratch).sum((1, 3))
    low = torch.lt(x, -limit, out=scratch).sum((1, 3))
    stuck = torch.maximum(high, low) >= STUCK * total
    return (high + low).mean(1) / total, stuck.to(x.dtype).mean(1)


def _tanh(x: Tensor, scratch: Tensor) -> Tensor:
    saturated, stuck = _saturating(x, scratch, SATURATION["tanh"])
    return torch.stack((saturated, stuck, _dormant(torch.tanh(x, out=scratch), scratch)), 1)


def _sigmoid(x: Tensor, scratch: Tensor) -> Tensor:
    return torch.stack(_saturating(x, scratch, SATURATION["sigmoid"]), 1)


def _dormant(x: Tensor, scratch: Tensor) -> Tensor:
    """Share of units with a Sokar score E|h_i| / mean_j E|h_j| of at most 0.1; NaN where all are 0."""
    size = torch.abs(x, out=scratch).mean((1, 3))
    mean = size.mean(1, keepdim=True)
    share = (size <= DORMANT * mean).to(x.dtype).mean(1)
    return share.masked_fill_(mean.squeeze(1) == 0, math.nan)


def _other(x: Tensor, scratch: Tensor) -> Tensor:
    return _dormant(x, scratch).unsqueeze(1)


UnitPlace = tuple[UnitRows, int]
"""One tensor's row among what is known of units."""


def from_rows(outputs: Sequence[UnitPlace], inputs: Sequence[UnitPlace], rows: int) -> list[UnitStatistics]:
    """Statistics of small rectifiers from what was measured of their outputs and pre-activations anyway.

    Args:
        outputs: All of one width, on one device.
        inputs: The same of their pre-activations; empty where ``rows`` are enough without.
        rows: How many samples each has.
    """
    active = _gathered([(units.active, row) for units, row in outputs])
    inactive = (active < LEAST_ACTIVITY * rows).float().mean(1)
    always = (active > (1 - LEAST_ACTIVITY) * rows).float().mean(1)
    sunk = torch.full_like(inactive, math.nan)
    if inputs and _tells_sunk(rows):
        below = _gathered([(units.sunk, row) for units, row in inputs])
        sunk = (below & (active == 0)).float().mean(1)
    names = _NAMES[Family.RECTIFIER]
    return [
        UnitStatistics(units=active.shape[1], observations=rows, **_measured(names, row))
        for row in torch.stack((inactive, always, sunk), 1).tolist()
    ]


def _gathered(places: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Rows of several tensors as one tensor."""
    chunks = {id(chunk): chunk for chunk, _ in places}
    starts, start = {}, 0
    for identity, chunk in chunks.items():
        starts[identity] = start
        start += len(chunk)
    whole = torch.cat(tuple(chunks.values()))
    return whole[torch.tensor([starts[id(chunk)] + row for chunk, row in places], device=whole.device)]


def _measured(names: Sequence[str], row: Sequence[float]) -> dict[str, float]:
    """Shares by name; NaN stands for one that was not asked for."""
    return {name: share for name, share in zip(names, row, strict=False) if share == share}


_REDUCTIONS: dict[Family, Callable[[Tensor, Tensor], Tensor]] = {
    Family.RECTIFIER: _rectifier,
    Family.TANH: _tanh,
    Family.SIGMOID: _sigmoid,
    Family.OTHER: _other,
}


def _new_buffer(values: Tensor, family: Family, axis: int) -> _UnitBuffer:
    wanted = OTHER_OBSERVATIONS if family is Family.OTHER else RECTIFIED_OBSERVATIONS
    draw = _channels_first if axis == 1 and values.dim() > 2 else _channels_last
    take = draw(values, wanted)
    shape = take(values).shape
    count = max(1, min(BUFFER_ELEMENTS // math.prod(shape), BUFFER_SLOTS))
    dtype = torch.float64 if values.dtype is torch.float64 else torch.float32
    store = torch.empty((count, *shape), dtype=dtype, device=values.device)
    whole = math.prod(shape) == values.numel()
    slots = store.view(count, *values.shape) if whole else store
    return _UnitBuffer(
        family=family,
        take=None if whole else take,
        store=store,
        slots=slots.unbind(0),
        scratch=torch.empty_like(store),
        grid=_grid(values, take(values)) if family is Family.RECTIFIER and values.is_contiguous() else None,
    )


def _grid(values: Tensor, drawn: Tensor) -> kernels.Grid | None:
    asks_sunk = _tells_sunk(drawn.shape[0] * drawn.shape[2])
    return kernels.grid_of(values, drawn, depth=SUNK, least=LEAST_ACTIVITY, asks_sunk=asks_sunk)


def _channels_last(values: Tensor, wanted: int) -> Callable[[Tensor], Tensor]:
    """How to draw [observations, units, 1] of a tensor whose last dimension is the units."""
    units = values.shape[-1]
    rows = values.numel() // units
    step = 1 if values.numel() <= SAMPLE_ELEMENTS else _step(rows, wanted, values.shape[-2])

    def take(tensor: Tensor) -> Tensor:
        return tensor.reshape(rows, units)[::step].unsqueeze(-1)

    return take


def _channels_first(values: Tensor, wanted: int) -> Callable[[Tensor], Tensor]:
    """How to draw [samples, units, positions] of a tensor whose dimension 1 is the units."""
    samples, positions = values.shape[0], math.prod(values.shape[2:])
    row_step = step = 1
    if values.numel() > SAMPLE_ELEMENTS:
        row_step = max(1, samples // max(MANY_SAMPLES, math.ceil(wanted / positions)))
        step = _step(positions, math.ceil(wanted / math.ceil(samples / row_step)), values.shape[-1])

    def take(tensor: Tensor) -> Tensor:
        return tensor.flatten(2)[::row_step, :, ::step]

    return take


def _step(length: int, wanted: int, period: int) -> int:
    """The longest step that leaves ``wanted`` and, unless it is short, meets every phase of ``period``."""
    step = max(1, length // wanted)
    while step > 3 and math.gcd(step, period) != 1:
        step -= 1
    return step
