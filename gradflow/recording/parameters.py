"""Parameters -> records, after backward, while the gradients are still there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gradflow.recording.cuts import CutFinder
from gradflow.recording.layout import NamedParameter
from gradflow.recording.tensor_stats import CHUNK, norm_and_nonfinite
from gradflow.trace_model import Coverage, ParameterRecord


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
    values = _norms(item.parameter for item in named)
    gradients = _norms(item.parameter.grad for item in named)
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
    coverage = _coverage(item, gradient, cuts, called)
    norm = None if value is None else value[0]
    gradient_norm = None if gradient is None else gradient[0]
    both = norm is not None and gradient_norm is not None
    return ParameterRecord(
        name=item.names[0],
        aliases=item.names[1:],
        module=item.owner,
        shape=tuple(item.parameter.shape),
        dtype=str(item.parameter.dtype).removeprefix("torch."),
        coverage=coverage,
        norm=norm,
        gradient_norm=gradient_norm,
        gradient_nonfinite=None if gradient is None else gradient[1],
        elasticity=norm * gradient_norm if norm is not None and gradient_norm is not None else None,
        gradient_ratio=gradient_norm / norm if both and norm and gradient_norm is not None else None,
        value_nonfinite=None if value is None else value[1],
        module_type=item.owner_type,
        requires_grad=item.parameter.requires_grad,
        in_optimizer=None if optimized is None else id(item.parameter) in optimized,
        cut=cuts.find(id(item.parameter)) if coverage is Coverage.NO_GRAD else None,
    )


def _coverage(
    item: NamedParameter, gradient: tuple[float, int] | None, cuts: CutFinder, called: frozenset[str]
) -> Coverage:
    if gradient is not None:
        return Coverage.MEASURED
    if not item.parameter.requires_grad:
        return Coverage.FROZEN
    if cuts.is_consumed(id(item.parameter)):
        return Coverage.NO_GRAD
    return Coverage.UNUSED if item.owner in called else Coverage.NEVER_CALLED


def _norms(tensors: Iterable[Tensor | None]) -> list[tuple[float, int] | None]:
    """(norm, non-finite count) of each tensor; small ones in one batch a device."""
    listed = list(tensors)
    found: list[tuple[float, int] | None] = [None] * len(listed)
    small: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for position, tensor in enumerate(listed):
        if tensor is None or not _is_measurable(tensor):
            continue
        if tensor.layout is torch.strided and tensor.dtype is torch.float32 and 0 < tensor.numel() <= CHUNK:
            small.setdefault((tensor.device, tensor.dtype), []).append((position, tensor.detach()))
        else:
            found[position] = norm_and_nonfinite(tensor)
    for members in small.values():
        norms = torch.stack(list(torch._foreach_norm([tensor for _, tensor in members]))).tolist()
        for (position, tensor), norm in zip(members, norms, strict=True):
            found[position] = (norm, 0) if norm < float("inf") else norm_and_nonfinite(tensor)
    return found


def _is_measurable(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and not tensor.is_meta
