"""How far an overwritten skip is from what it should carry: the step once more, only where a site is accused.

The value before an in-place op is gone when the add shows that it mattered, and keeping every such value would
cost a copy of the stream. A second run of the same step knows which ops to keep one for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradflow.recording.dataflow import Dataflow
from gradflow.recording.residual_ops import ADD_OPS, SCALE_OPS, SUB_OPS
from gradflow.recording.residual_recorder import Site
from gradflow.recording.residual_sites import Graph
from gradflow.recording.weight_ops import weights_of

Signs = tuple[float, float]

SIGNS: dict[str, Signs] = dict.fromkeys(ADD_OPS, (1.0, 1.0)) | dict.fromkeys(SUB_OPS, (1.0, -1.0))
"""With which sign the first and the second operand enter what an op returns; other ops are not followed."""

_SLACK = 8
"""Tensors of unknown origin that get a node of their own just before an op's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccusedSite:
    """A site whose skip was overwritten, by nodes of the dataflow."""

    order: int
    """``order`` of its record."""
    overwrite: int
    """What the in-place op made."""
    skip: int
    """Of the tensor that the add is handed for it, as ``branch``."""
    branch: int
    factor: float | None
    """On the skip; None where it is no number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Fields as in ``OverwrittenSkip``."""

    change: float | None
    distance: float | None


def accused_sites(sites: Iterable[Site], graph: Graph) -> tuple[AccusedSite, ...]:
    """The sites, in the order of their records, whose overwriting was not seen to be meant."""
    return tuple(
        AccusedSite(
            order=order,
            overwrite=site.overwritten_at,
            skip=site.handed,
            branch=site.branch_handed,
            factor=_factor(site, graph),
        )
        for order, site in enumerate(sites)
        if site.overwritten is not None and site.overwritten.rebound is not True and site.branches == 1
    )


def _factor(site: Site, graph: Graph) -> float | None:
    """The product of the numbers that stand between the source and the skip."""
    factors = [i for i in site.found.shortcut if graph.nodes[i].op in SCALE_OPS]
    numbers = [graph.factors.get(i) for i in factors if not weights_of(graph.nodes[i], graph.nodes)]
    known = [number for number in numbers if number is not None]
    return math.prod(known) if len(known) == len(factors) else None


class OverwriteWitness(TorchFunctionMode):
    """Keeps what accused ops are about to overwrite, and measures at the adds; entered inside the dataflow.

    Args:
        dataflow: The one that is recording this run.
        accused: From the run before, of the same step.
    """

    def __init__(self, dataflow: Dataflow, accused: Iterable[AccusedSite]) -> None:
        super().__init__()
        self.proofs: dict[int, Proof] = {}
        """By the ``order`` of the site."""
        self._dataflow = dataflow
        self._by_operands = {frozenset((site.skip, site.branch)): site for site in accused}
        self._writes = {site.overwrite for site in self._by_operands.values()}
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        """By the node that an accused op made: the values before it, and the tensor that it wrote to."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        target = args[0] if args and isinstance(args[0], Tensor) else None
        kept = self._copy(target) if target is not None and self._is_near() else None
        tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
        if len(tensors) == 2:
            alone = "alpha" not in (kwargs or {})
            signs = SIGNS.get(getattr(func, "__name__", "")) if alone else None
            self._measure(tensors[0], tensors[1], signs)
        result = func(*args, **(kwargs or {}))
        if kept is not None and target is not None and result is target:
            node = self._dataflow.node_of(target)
            if node is not None and node.index in self._writes:
                self._kept[node.index] = kept, target
        return result

    def _is_near(self) -> bool:
        following = len(self._dataflow.nodes)
        return any(index in self._writes for index in range(following, following + _SLACK))

    def _copy(self, tensor: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return tensor.detach().clone()

    def _measure(self, left: Tensor, right: Tensor, signs: Signs | None) -> None:
        nodes = [self._dataflow.node_of(left), self._dataflow.node_of(right)]
        indices = [None if node is None else node.index for node in nodes]
        site = self._by_operands.get(frozenset(index for index in indices if index is not None))
        if site is None or site.overwrite not in self._kept:
            return
        first = indices[0] == site.skip
        skip, branch = (left, right) if first else (right, left)
        if signs is not None and not first:
            signs = signs[::-1]
        before, written = self._kept.pop(site.overwrite)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            self.proofs[site.order] = _proof(
                before, written.detach(), skip.detach(), branch.detach(), site.factor, signs
            )


def _proof(
    before: Tensor, written: Tensor, skip: Tensor, branch: Tensor, factor: float | None, signs: Signs | None
) -> Proof:
    x, after = before.double(), written.double()
    change = _ratio(_norm(after - x), _norm(x))
    if factor is None or signs is None or skip.shape != x.shape or branch.shape != x.shape:
        return Proof(change=change, distance=None)
    carried, meant = skip.double(), factor * x
    if not torch.allclose(carried, factor * after, rtol=1e-2, atol=1e-6):
        return Proof(change=change, distance=None)  # thinned out or moved on its way: not the same elements
    distance = _ratio(_norm(carried - meant), _norm(signs[0] * meant + signs[1] * branch.double()))
    return Proof(change=change, distance=distance)


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values).item())


def _ratio(part: float, whole: float) -> float | None:
    if whole == 0.0:
        return math.inf if part > 0.0 else None
    return part / whole
