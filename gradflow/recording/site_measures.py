"""The two operands of an add, measured together while they are both still there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradflow.recording import kernels
from gradflow.recording.tensor_stats import batch_dimension, is_transformed, real_values

Array = npt.NDArray[np.float64]
PIECE = 65_536
"""Products are taken of this many elements at a time: they stay in the cache, in memory that is used again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperandProducts:
    """Inner products of skip and branch, a column a vector (token or sample)."""

    rows: Tensor
    """Squares of the skip, squares of the branch, products of both: float64 [3, vectors], on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteNumbers:
    """What skip and branch are to each other; fields as in ``ResidualRecord``."""

    skip_norm: float | None = None
    branch_norm: float | None = None
    rho: float | None = None
    cosine: float | None = None
    block_influence: float | None = None
    angular_distance: float | None = None


_NOT_MEASURED = SiteNumbers()


def site_numbers(measured: Sequence[OperandProducts | None]) -> list[SiteNumbers]:
    """Transfer what was measured of each site and combine it, that of all sites at once."""
    rows = [products.rows.cpu() for products in measured if products is not None]
    if not rows:
        return [_NOT_MEASURED for _ in measured]
    whole = torch.cat(rows, 1).numpy()
    turns = _turns(whole)
    ends = accumulate(part.shape[1] for part in rows)
    parts = (slice(end - part.shape[1], end) for part, end in zip(rows, ends, strict=True))
    return [
        _NOT_MEASURED if products is None else _combined(whole[:, part := next(parts)], turns[:, part])
        for products in measured
    ]


def _combined(rows: Array, turns: Array) -> SiteNumbers:
    total_skip, total_branch, total_both = rows.sum(1).tolist()
    skip_norm, branch_norm = math.sqrt(total_skip), math.sqrt(total_branch)
    scale = skip_norm * branch_norm
    begun = rows[0] > 0
    influence, angle = turns[:, begun].mean(1).tolist() if begun.any() else (None, None)
    return SiteNumbers(
        skip_norm=skip_norm,
        branch_norm=branch_norm,
        rho=_ratio(branch_norm, skip_norm),
        cosine=total_both / scale if scale else None,
        block_influence=influence,
        angular_distance=angle,
    )


def operand_products(skip: Tensor, branch: Tensor, batch_size: int) -> OperandProducts | None:
    """Measure two operands of one shape; None where their values cannot be read."""
    if is_transformed(skip) or is_transformed(branch) or skip.is_meta or not skip.numel():
        return None
    a, b = (_rows(real_values(operand), batch_size) for operand in (skip, branch))
    found = kernels.row_products(a, b)
    if found is not None:
        return OperandProducts(rows=found)
    a, b = (rows if rows.dtype is torch.float64 else rows.float() for rows in (a, b))
    return OperandProducts(rows=torch.stack((_squares(a), _squares(b), _dots(a, b))))


def scaled_products(products: OperandProducts | None, skip: float, branch: float) -> OperandProducts | None:
    """Products of the same operands, each times a number."""
    if products is None or (skip == 1.0 and branch == 1.0):
        return products
    factors = (skip**2, branch**2, skip * branch)
    return OperandProducts(
        rows=torch.stack([row * factor for row, factor in zip(products.rows, factors, strict=True)])
    )


def _ratio(branch: float, skip: float) -> float | None:
    if skip == 0.0:
        return math.inf if branch > 0.0 else None
    return branch / skip


def _turns(rows: Array) -> Array:
    """1 - cos(x, x + F) of each vector, and their angle over pi, from [skip, branch, both].

    With F = a x + (a part of length t |x| at right angles): 1 - (1 + a) / sqrt((1 + a)^2 + t^2), without cancellation.
    NaN where x or the sum is zero, or not finite.
    """
    skip, branch, both = rows
    with np.errstate(all="ignore"):
        along = both / skip
        across = np.maximum(branch / skip - along * along, 0)
        along = along + 1
        length = np.hypot(along, np.sqrt(across))
        near = across / (length * (length + along))
        influence = np.where(along > 0, near, 1 - along / length)
        angle = np.arctan2(np.sqrt(across), along) / math.pi
    undefined = (length == 0) | ~np.isfinite(length)
    return np.where(undefined, math.nan, np.stack((influence, angle)))


def _rows(values: Tensor, batch_size: int) -> Tensor:
    """[vectors, elements]: the tokens of a (batch, tokens, features) stream, else whole samples."""
    if values.dim() == 3:
        return values.reshape(-1, values.shape[-1])
    axis = batch_dimension(values.shape, batch_size)
    if axis is None:
        return values.reshape(1, -1)
    return values.movedim(axis, 0).reshape(values.shape[axis], -1)


def _squares(rows: Tensor) -> Tensor:
    """Squared norms of rows, float64."""
    if rows.shape[1] > PIECE:
        return _dots(rows, rows)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.double().square()


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows, float64."""
    if a.device.type != "cpu":
        return (a * b).sum(1).double()
    if a.shape[1] > PIECE:
        columns = zip(torch.split(a, PIECE, 1), torch.split(b, PIECE, 1), strict=True)
        return torch.stack([_dots(left, right) for left, right in columns]).sum(0)
    height = PIECE // a.shape[1]
    pieces = zip(torch.split(a, height), torch.split(b, height), strict=True)
    return torch.cat([(left * right).sum(1) for left, right in pieces]).double()
