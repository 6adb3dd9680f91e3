"""The module that would make a skip fit its branch, written as code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which dimension of a stream holds its features."""

    features: int
    """From 0."""
    positions: int
    """Dimensions after it that a convolution or pool walks over; 0 for features that stand last."""


def projection(have: Sequence[int], want: Sequence[int], layout: Layout, *, batch_norm: bool) -> str:
    """Code of a module that maps the one shape to the other; "" where there is none.

    Args:
        have: Shape of what it is given.
        want: Shape that it must return; as many dimensions.
        layout: Of both.
        batch_norm: End it with a batch normalisation, as the branch has one.

    Returns:
        ``nn.Linear`` where features stand last; else a pointwise convolution, with a stride where the branch is
        smaller and after an ``nn.Upsample`` where it is a whole number of times as large.
    """
    steps = [] if layout.positions else _linear(have, want, batch_norm=batch_norm)
    steps = _convolution(have, want, layout, batch_norm=batch_norm) if layout.positions else steps
    if not steps:
        return ""
    return steps[0] if len(steps) == 1 else f"nn.Sequential({', '.join(steps)})"


def stride_for(have: int, want: int) -> int | None:
    """The stride of a pointwise convolution from one size to the other: ceil(have / stride) = want."""
    if not 0 < want <= have:
        return None
    stride = math.ceil(have / want)
    return stride if math.ceil(have / stride) == want else None


def _linear(have: Sequence[int], want: Sequence[int], *, batch_norm: bool) -> list[str]:
    if tuple(have[:-1]) != tuple(want[:-1]) or not have:
        return []
    if batch_norm and len(have) == 2:  # BatchNorm1d takes (batch, features), not (batch, tokens, features)
        return [f"nn.Linear({have[-1]}, {want[-1]}, bias=False)", f"nn.BatchNorm1d({want[-1]})"]
    return [f"nn.Linear({have[-1]}, {want[-1]})"]


def _convolution(have: Sequence[int], want: Sequence[int], layout: Layout, *, batch_norm: bool) -> list[str]:
    axis, rank = layout.features, layout.positions
    if tuple(have[:axis]) != tuple(want[:axis]):
        return []
    before, after = have[axis + 1 :], want[axis + 1 :]
    factor = _factor(before, after)
    strides = [1] * rank if factor else [stride_for(a, b) for a, b in zip(before, after, strict=True)]
    if any(stride is None for stride in strides):
        return []
    steps = [f"nn.Upsample(scale_factor={factor})"] if factor else []
    if factor and have[axis] == want[axis]:
        return steps
    stride = (
        "" if set(strides) == {1} else f", stride={strides[0] if len(set(strides)) == 1 else (*strides,)}"
    )
    steps.append(f"nn.Conv{rank}d({have[axis]}, {want[axis]}, kernel_size=1{stride}, bias=False)")
    return [*steps, f"nn.BatchNorm{rank}d({want[axis]})"] if batch_norm and axis == 1 else steps


def _factor(before: Sequence[int], after: Sequence[int]) -> int:
    """How many times as large every position dimension becomes; 0 where that is no one whole number above 1."""
    factors = {b // a if a and b % a == 0 else 0 for a, b in zip(before, after, strict=True)}
    only = factors.pop() if len(factors) == 1 else 0
    return only if only > 1 else 0
