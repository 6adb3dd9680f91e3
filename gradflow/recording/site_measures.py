"""The two operands of an add, measured together while they are both still there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradflow.recording import kernels
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
        rows = torch.stack((self.skip, self.branch, self.both)).cpu()
        total_skip, total_branch, total_both = rows.sum(1).tolist()
        skip_norm, branch_norm = math.sqrt(total_skip), math.sqrt(total_branch)
        scale = skip_norm * branch_norm
        influence, angle = _turns(rows[:, rows[0] > 0])
        return SiteNumbers(
            skip_norm=skip_norm,
            branch_norm=branch_norm,
            rho=_ratio(branch_norm, skip_norm),
            cosine=total_both / scale if scale else None,
            block_influence=influence,
            angular_distance=angle,
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
    found = kernels.row_products(a, b)
    if found is not None:
        return OperandProducts(skip=found[0], branch=found[1], both=found[2])
    a, b = (rows if rows.dtype is torch.float64 else rows.float() for rows in (a, b))
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


def _turns(rows: Tensor) -> tuple[float | None, float | None]:
    """Means over vectors of 1 - cos(x, x + F), and of their angle over pi, from [skip, branch, both] of each.

    With F = a x + (a part of length t |x| at right angles): 1 - (1 + a) / sqrt((1 + a)^2 + t^2), without cancellation.
    NaN where a sum is zero, or not finite; None without vectors.
    """
    skip, branch, both = rows
    if not skip.numel():
        return None, None
    along = both / skip
    across = (branch / skip - along.square()).clamp_min_(0)
    along = along + 1
    length = torch.hypot(along, across.sqrt())
    near = across / (length * (length + along))
    influence = torch.where(along > 0, near, 1 - along / length)
    angle = torch.atan2(across.sqrt(), along)
    undefined = (length == 0) | ~torch.isfinite(length)
    both_means = torch.stack((influence, angle / math.pi)).masked_fill_(undefined, math.nan).mean(1)
    return tuple(both_means.tolist())


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
