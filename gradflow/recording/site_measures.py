"""The two operands of an add, measured together while they are both still there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradflow.recording.tensor_stats import batch_dimension, is_transformed, real_values

PIECE = 65_536
"""Products are taken of this many elements at a time: they stay in the cache, in memory that is used again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperandProducts:
    """Inner products of skip and branch, a row a vector (token or sample); float64, on the device."""

    skip: Tensor
    branch: Tensor
    both: Tensor

    def numbers(self) -> SiteNumbers:
        """Transfer and combine."""
        skip, branch, both = (rows.tolist() for rows in (self.skip, self.branch, self.both))
        total_skip, total_branch, total_both = math.fsum(skip), math.fsum(branch), math.fsum(both)
        skip_norm, branch_norm = math.sqrt(total_skip), math.sqrt(total_branch)
        scale = skip_norm * branch_norm
        known = [row for row in zip(skip, branch, both, strict=True) if row[0] > 0]
        return SiteNumbers(
            skip_norm=skip_norm,
            branch_norm=branch_norm,
            rho=_ratio(branch_norm, skip_norm),
            cosine=total_both / scale if scale else None,
            block_influence=_mean([_influence(*row) for row in known]),
            angular_distance=_mean([_angle(*row) / math.pi for row in known]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteNumbers:
    """What skip and branch are to each other; fields as in ``ResidualRecord``."""

    skip_norm: float | None = None
    branch_norm: float | None = None
    rho: float | None = None
    cosine: float | None = None
    block_influence: float | None = None
    angular_distance: float | None = None


NOT_MEASURED = SiteNumbers()


def operand_products(skip: Tensor, branch: Tensor, batch_size: int) -> OperandProducts | None:
    """Measure two operands of one shape; None where their values cannot be read."""
    if is_transformed(skip) or is_transformed(branch) or skip.is_meta or not skip.numel():
        return None
    a, b = (_rows(real_values(operand), batch_size) for operand in (skip, branch))
    return OperandProducts(skip=_squares(a), branch=_squares(b), both=_dots(a, b))


def scaled_products(products: OperandProducts | None, skip: float, branch: float) -> OperandProducts | None:
    """Products of the same operands, each times a number."""
    if products is None or (skip == 1.0 and branch == 1.0):
        return products
    return OperandProducts(
        skip=products.skip * skip**2, branch=products.branch * branch**2, both=products.both * (skip * branch)
    )


def _ratio(branch: float, skip: float) -> float | None:
    if skip == 0.0:
        return math.inf if branch > 0.0 else None
    return branch / skip


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _influence(skip: float, branch: float, both: float) -> float:
    """1 - cos(x, x + F) from the squared norms and the inner product, without cancellation.

    With F = a x + (a part of length t |x| at right angles): 1 - (1 + a) / sqrt((1 + a)^2 + t^2).
    """
    along = 1.0 + both / skip
    across = max(branch / skip - (both / skip) ** 2, 0.0)
    length = math.hypot(along, math.sqrt(across))
    if length == 0.0 or not math.isfinite(length):
        return math.nan
    return across / (length * (length + along)) if along > 0 else 1.0 - along / length


def _angle(skip: float, branch: float, both: float) -> float:
    """The angle between x and x + F, in radians; NaN where the sum is zero."""
    along = 1.0 + both / skip
    across = math.sqrt(max(branch / skip - (both / skip) ** 2, 0.0))
    length = math.hypot(along, across)
    return math.atan2(across, along) if 0.0 < length < math.inf else math.nan


def _rows(values: Tensor, batch_size: int) -> Tensor:
    """[vectors, elements]: the tokens of a (batch, tokens, features) stream, else whole samples."""
    if values.dtype is not torch.float64:
        values = values.float()
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
