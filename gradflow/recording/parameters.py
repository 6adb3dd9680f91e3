"""Parameters -> records, after backward, while the gradients are still there."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from gradflow.recording import kernels
from gradflow.recording.cuts import CutFinder
from gradflow.recording.drafts import drafting
from gradflow.recording.layout import NamedParameter
from gradflow.recording.tensor_stats import CHUNK, dtype_name, norm_and_nonfinite
from gradflow.trace_model import Coverage, ParameterRecord

_PARAMETER = drafting(ParameterRecord)


def parameter_records(
    named: Sequence[NamedParameter],
    cuts: CutFinder,
    called: frozenset[str],
    optimized: frozenset[int] | None,
) -> tuple[ParameterRecord, ...]:
    """Measure every parameter and its gradient.

    Args:
        named: Every parameter of the model, once.
        cuts: Of the step that has just run.
        called: Fully qualified names of the modules that ran.
        optimized: ``id`` of each parameter of the optimizer; None where no optimizer is known.
    """
    norms = _norms([*(item.parameter for item in named), *(item.parameter.grad for item in named)])
    values, gradients = norms[: len(named)], norms[len(named) :]
    return tuple(
        _record(item, value, gradient, cuts, called, optimized)
        for item, value, gradient in zip(named, values, gradients, strict=True)
    )


def _record(
    item: NamedParameter,
    value: tuple[float, int] | None,
    gradient: tuple[float, int] | None,
    cuts: CutFinder,
    called: frozenset[str],
    optimized: frozenset[int] | None,
) -> ParameterRecord:
    parameter = item.parameter
    norm, value_nonfinite = value or (None, None)
    gradient_norm, gradient_nonfinite = gradient or (None, None)
    elasticity = ratio = cut = None
    if gradient_norm is None:
        coverage = _coverage(item, cuts, called)
        cut = cuts.find(id(parameter)) if coverage is Coverage.NO_GRAD else None
    else:
        coverage = Coverage.MEASURED
        elasticity = None if norm is None else norm * gradient_norm
        ratio = gradient_norm / norm if norm else None
    return _PARAMETER(
        name=item.names[0],
        aliases=item.names[1:],
        module=item.owner,
        shape=tuple(parameter.shape),
        dtype=dtype_name(parameter.dtype),
        coverage=coverage,
        norm=norm,
        gradient_norm=gradient_norm,
        gradient_nonfinite=gradient_nonfinite,
        elasticity=elasticity,
        gradient_ratio=ratio,
        value_nonfinite=value_nonfinite,
        module_type=item.owner_type,
        requires_grad=parameter.requires_grad,
        in_optimizer=None if optimized is None else id(parameter) in optimized,
        cut=cut,
    )


def _coverage(item: NamedParameter, cuts: CutFinder, called: frozenset[str]) -> Coverage:
    """Of a parameter that has no gradient."""
    if not item.parameter.requires_grad:
        return Coverage.FROZEN
    if cuts.is_consumed(id(item.parameter)):
        return Coverage.NO_GRAD
    return Coverage.UNUSED if item.owner in called else Coverage.NEVER_CALLED


def _norms(tensors: Sequence[Tensor | None]) -> list[tuple[float, int] | None]:
    """(norm, non-finite count) of each tensor; small ones in one batch a device."""
    found = _norms_at_once(tensors)
    small: defaultdict[torch.device, list[int]] = defaultdict(list)
    for position, tensor in enumerate(tensors):
        if found[position] is not None:
            continue
        if tensor is not None and _is_small(tensor):
            small[tensor.device].append(position)
        elif tensor is not None and _is_measurable(tensor):
            found[position] = norm_and_nonfinite(tensor)
    for device, positions in small.items():
        members = [tensor for tensor in map(tensors.__getitem__, positions) if tensor is not None]
        with torch.no_grad():
            norms = _numbers(torch._foreach_norm(members), device)
        for position, tensor, norm in zip(positions, members, norms, strict=True):
            found[position] = (norm, 0) if norm < math.inf else norm_and_nonfinite(tensor)
    return found


def _norms_at_once(tensors: Sequence[Tensor | None]) -> list[tuple[float, int] | None]:
    """What the kernels can say, in one call; None for the rest."""
    found: list[tuple[float, int] | None] = [None] * len(tensors)
    readable = [
        i for i, t in enumerate(tensors) if t is not None and t.layout is torch.strided and t.is_contiguous()
    ]
    squares = kernels.squares([tensor for i in readable if (tensor := tensors[i]) is not None])
    for position, square in zip(readable, squares, strict=True):
        found[position] = None if square is None else (math.sqrt(square), 0)
    return found


def _numbers(values: Sequence[Tensor], device: torch.device) -> list[float]:
    """0-d tensors as numbers; on the CPU there is nothing to transfer, and stacking would cost more than looking."""
    if device.type == "cpu":
        return [value.item() for value in values]
    numbers: list[float] = torch.stack(tuple(values)).tolist()
    return numbers


def _is_small(tensor: Tensor) -> bool:
    """True where one float32 accumulator is accurate enough."""
    return (
        tensor.dtype is torch.float32
        and tensor.layout is torch.strided
        and 0 < tensor.numel() <= CHUNK
        and not tensor.is_meta
    )


def _is_measurable(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and not tensor.is_meta
