"""Batch normalisations as they run: how many values a channel has, and what their statistics are.

The statistics of the batch are read off what the op does to the running ones, which are small: a pass over
the activations is taken only where there are none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.recording.dataflow import Node
from gradflow.recording.layout import ModelLayout
from gradflow.recording.tensor_stats import is_transformed
from gradflow.recording.transfers import listed
from gradflow.trace_model import BatchNormRecord

BATCH_NORM_OP = "batch_norm"
_FUNCTION = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
"""Arguments of ``torch.nn.functional.batch_norm``."""
_OPERATOR = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
"""Those of ``torch.batch_norm``, which has one more and no defaults."""
_DEFAULTS = {"running_mean": None, "running_var": None, "training": False, "momentum": 0.1, "eps": 1e-5}
LEAST_MOMENTUM = 0.05
"""With less the running statistics move too little to read the batch's off them."""
_ROUNDING = 2.0**-22
"""Of what is read off running statistics in float32, relative to them; momentum divides it."""


@dataclass(slots=True)
class _Seen:
    """One call; a statistic is [2, channels]: means, then variances."""

    channels: int
    values: int
    eps: float
    momentum: float
    training: bool
    running: tuple[Tensor, Tensor] | None
    """The module's own, which the op updates."""
    before: Tensor | None = None
    after: Tensor | None = None
    batch: Tensor | None = None
    """Set where it was measured and need not be read off."""
    node: Node | None = None


class BatchNormRecorder:
    """Watches the batch normalisations of a step."""

    def __init__(self) -> None:
        self._pending: _Seen | None = None
        self._seen: list[_Seen] = []

    def before(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
        """Look at the running statistics, which the op is about to update."""
        self._pending = None
        names = _OPERATOR if len(args) > len(_FUNCTION) else _FUNCTION
        given = {**_DEFAULTS, **dict(zip(names, args, strict=False)), **(kwargs or {})}
        value = given.get("input")
        if not isinstance(value, Tensor) or value.dim() < 2 or not value.numel() or is_transformed(value):
            return
        mean, variance = given["running_mean"], given["running_var"]
        seen = self._pending = _Seen(
            channels=value.shape[1],
            values=value.numel() // value.shape[1],
            eps=float(given["eps"]),
            momentum=float(given["momentum"] or 0.0),
            training=bool(given["training"]) or mean is None,
            running=None if mean is None or variance is None else (mean, variance),
        )
        if not seen.training:
            return
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if seen.running is not None:
                seen.before = torch.stack((mean, variance))
            precise = seen.running is not None and mean.dtype in (torch.float32, torch.float64)
            if not precise or seen.momentum < LEAST_MOMENTUM:
                dims = (0, *range(2, value.dim()))
                spread, centre = torch.var_mean(value.detach().float(), dims, correction=0)
                seen.batch = torch.stack((centre, spread)).double()

    def after(self, node: Node) -> None:
        """Note which node a batch normalisation made, and what it left behind."""
        seen, self._pending = self._pending, None
        if seen is None:
            return
        seen.node = node
        if seen.running is not None and seen.batch is None and seen.training:
            with torch.no_grad():
                seen.after = torch.stack(seen.running)
        self._seen.append(seen)

    def records(self, layout: ModelLayout) -> tuple[BatchNormRecord, ...]:
        """Freeze what was seen, in execution order; call it before the model is put back."""
        modules = {name: module for module, name in layout.names.items()}
        names = ["" if seen.node is None else seen.node.place for seen in self._seen]
        updates = _updates(names, modules)
        calls: dict[str, int] = {}
        found = []
        for order, (seen, name, row) in enumerate(zip(self._seen, names, _numbers(self._seen), strict=True)):
            call = calls[name] = calls.get(name, -1) + 1
            found.append(
                BatchNormRecord(
                    order=order,
                    name=name,
                    call=call,
                    channels=seen.channels,
                    values=seen.values,
                    batch_statistics=seen.training,
                    eps=seen.eps,
                    updates=updates.get(name),
                    low_variance=_measured(row[0]),
                    mean_shift=_measured(row[1]),
                    deviation_ratio=_measured(row[2]),
                )
            )
        return tuple(found)


def _measured(value: float) -> float | None:
    return None if math.isnan(value) else value


def _updates(names: Sequence[str], modules: dict[str, nn.Module]) -> dict[str, int]:
    """How often the running statistics of each had been updated before this step."""
    counted = {
        name: module.num_batches_tracked
        for name in dict.fromkeys(names)
        if isinstance(module := modules.get(name), nn.modules.batchnorm._BatchNorm)
        and module.num_batches_tracked is not None
    }
    now = dict(zip(counted, listed([c.reshape(1) for c in counted.values()]), strict=True))
    return {
        name: max(0, int(count) - (names.count(name) if modules[name].training else 0))
        for name, (count,) in now.items()
    }


def _numbers(seen: Sequence[_Seen]) -> list[list[float]]:
    """Share of channels of low variance, mean shift and deviation ratio of each call; NaN: not measured."""
    rows = [[math.nan] * 3 for _ in seen]
    groups: dict[Any, list[int]] = {}
    for position, item in enumerate(seen):
        if item.training and (item.batch is not None or item.after is not None):
            kept = item.batch if item.batch is not None else item.after
            alike = (None if pair is None else (pair.dtype, pair.device) for pair in (kept, item.before))
            key = (item.channels, *alike, item.batch is None)
            groups.setdefault(key, []).append(position)
    chunks = [_reduced([seen[position] for position in members]) for members in groups.values()]
    for members, numbers in zip(groups.values(), listed(chunks), strict=True):
        for k, position in enumerate(members):
            rows[position] = numbers[3 * k : 3 * k + 3]
    return rows


def _reduced(members: Sequence[_Seen]) -> Tensor:
    """The three numbers of each of some calls that are alike, on their device, flat."""
    before = _stacked([item.before for item in members])
    statistics, uncertainty = _batch_statistics(members, before)
    means, variances = statistics.unbind(1)
    eps = _column([item.eps for item in members], means)
    low = (variances + uncertainty < eps).double().mean(1)
    if before is None:
        nothing = torch.full_like(low, math.nan)
        return torch.stack((low, nothing, nothing), 1).flatten()
    running_means, running_variances = before.unbind(1)
    running = (running_variances + eps).sqrt()
    shift = ((running_means - means).abs() / running).median(1).values
    ratio = (running / (variances.clamp_min(0) + eps).sqrt()).median(1).values
    return torch.stack((low, shift, ratio), 1).flatten()


def _batch_statistics(members: Sequence[_Seen], before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means and variances (divided by m) of each batch, [calls, 2, channels], and by how much a variance may be off."""
    batch, after = (_stacked([getattr(item, name) for item in members]) for name in ("batch", "after"))
    if batch is not None:
        return batch, torch.zeros_like(batch[:, 1])
    assert before is not None
    assert after is not None
    momentum = _column([item.momentum for item in members], after)
    # The op has set running = (1 - momentum) running + momentum batch, the variance divided by m - 1.
    statistics = (after - (1 - momentum.unsqueeze(2)) * before) / momentum.unsqueeze(2)
    statistics[:, 1] *= _column([(item.values - 1) / item.values for item in members], after)
    return statistics, before[:, 1] * (_ROUNDING / momentum)


def _stacked(statistics: Sequence[Tensor | None]) -> Tensor | None:
    """Those of several calls in double precision; None without."""
    known = [pair for pair in statistics if pair is not None]
    return torch.stack(known).double() if known else None


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    """A number a call."""
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).unsqueeze(1)
