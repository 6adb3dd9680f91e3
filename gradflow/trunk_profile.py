"""The gradient along the trunk, as a handful of scale-free numbers (theory, section 0)."""

from __future__ import annotations

from dataclasses import dataclass

from gradflow.trace_model import Trunk


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkProfile:
    """NaN stands for "not defined": fewer than two tensors, or a gradient of zero on both sides."""

    gain: float
    """J = g_0 / g_K: what is left of the last tensor's gradient at the first."""
    slope: float
    """Theil-Sen slope of ln g_k in k; exp(-slope) is the gain of one layer going back."""
    largest_drop: float
    """D = max_k g_{k+1} / g_k."""
    largest_drop_at: str
    """"layers.3–layers.4": the two tensors around the largest drop; "" where there is none."""
    signal_gain: float
    """c_K / c_0: what is left of the centred signal at the last tensor."""
    gains: tuple[float, ...] = ()
    """g_k / g_K, first tensor to last."""


def profile(trunk: Trunk) -> TrunkProfile:
    """Summarise a trunk."""
    raise NotImplementedError
