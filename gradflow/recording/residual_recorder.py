"""Residual sites as they happen: found when the add runs, measured while both operands are still there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradflow.recording.dataflow import Dataflow, Frame, Node, user_frames, user_source
from gradflow.recording.gradient_split import GradientSplit, start_split
from gradflow.recording.overwritten import describe_overwrite
from gradflow.recording.residual_ops import (
    ADD_OPS,
    CONCAT_OPS,
    DIVISIONS,
    SCALE_OPS,
    VALUE_OPS,
    counts_as_branch,
    data_inputs,
)
from gradflow.recording.residual_sites import Branch, Graph, between, find_bare, find_shaped
from gradflow.recording.site_measures import OperandProducts, operand_products
from gradflow.recording.tensor_stats import is_transformed
from gradflow.trace_model import OverwrittenSkip

Finder = Callable[[int, int, Graph], Branch | None]
SMALL_FACTOR = 4_096
"""A factor that is a tensor (a stochastic-depth mask) is read up to this many elements."""


@dataclass(slots=True, kw_only=True)
class Site:
    """One residual site of a step, before it is frozen."""

    found: Branch
    products: OperandProducts | None
    in_place: bool
    broadcast: bool
    call: int
    branches: int = 1
    node: int = -1
    skip_tensor: weakref.ref[Tensor] | None = None
    split: GradientSplit | None = None
    """None where skip and branch are not summed."""
    overwritten: OverwrittenSkip | None = None
    overwritten_at: int = -1
    """The node of the op that did it."""


@dataclass(frozen=True, slots=True)
class _Overwrite:
    """An in-place op that is no add: which calls it ran in, and from where."""

    scopes: tuple[int, ...]
    frames: tuple[Frame, ...]


class SiteRecorder:
    """Watches the adds of a step.

    Args:
        parameters: The model's, by ``id``.
        batch_size: N, to tell samples apart.
        scopes: Serial numbers of the calls that are running, outermost first; empty outside the model.
        calls: How often a module has been called so far.
        probe: Has a tensor measured, and its gradient; returns where.
    """

    def __init__(
        self,
        parameters: dict[int, Tensor],
        *,
        batch_size: int,
        scopes: Sequence[int],
        calls: Callable[[str], int],
        probe: Callable[[Tensor], int],
    ) -> None:
        self.sites: dict[int, Site] = {}
        self.graph: Graph
        self._parameters = parameters
        self._batch_size = batch_size
        self._scopes = scopes
        self._calls = calls
        self._probe = probe
        self._factors: dict[int, float] = {}
        self._overwrites: dict[int, _Overwrite] = {}
        self._pending: Site | None = None

    def attach(self, dataflow: Dataflow) -> None:
        """Say whose nodes to ask."""
        self._dataflow = dataflow
        self.graph = Graph(nodes=dataflow.nodes, factors=self._factors, parameters=self._parameters)

    def in_order(self) -> list[Site]:
        """All sites, in execution order: that of their records."""
        return [self.sites[node] for node in sorted(self.sites)]

    def main(self) -> list[Site]:
        """The adds that the trunk can run through, in execution order: of a stream, or of a layer's update."""
        kinds = ("identity", "projection", "scaled", "low_rank")
        return [site for site in self.in_order() if site.found.kind in kinds and not site.broadcast]

    def end_forward(self, *, split: bool) -> None:
        """Have the gradient at every site split, where asked to; call it between forward and backward."""
        for site in self.sites.values():
            if split and site.split is not None:
                site.split.listen()

    def before(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
        """Look at an add that is about to run: an in-place one is about to overwrite an operand."""
        self._pending = None
        operands = _two_tensors(args, kwargs)
        if not self._scopes or operands is None:
            return
        nodes = [self._dataflow.node_of(operand) for operand in operands]
        left, right = nodes
        if left is None or right is None or not (left.from_data and right.from_data):
            return
        if not left.shape or not left.floating or not right.floating or left.index == right.index:
            return
        in_place = op.endswith("_") and op not in ("__add__", "__radd__")
        if left.shape == right.shape:
            self._pending = (
                self._plain(find_bare, operands, left, right, in_place)
                or self._joined(operands, left, right, in_place)
                or self._plain(find_shaped, operands, left, right, in_place)
            )
        else:
            self._pending = self._broadcast(left, right, in_place)

    def after(self, node: Node, tensor: Tensor, args: tuple[Any, ...]) -> None:
        """Note what an op was, and where a site's sum went."""
        if node.op in SCALE_OPS:
            self._note_factor(node, args)
        elif node.op in ADD_OPS:
            if self._pending is not None:
                self._place(self._pending, node, tensor)
                self._pending = None
            return
        elif node.op in CONCAT_OPS and self._scopes:
            self._note_concat(node)
        if args and tensor is args[0] and node.from_data and node.op not in VALUE_OPS:
            self._overwrites[node.index] = _Overwrite(tuple(self._scopes), user_frames())

    def _plain(
        self, find: Finder, operands: Sequence[Tensor], left: Node, right: Node, in_place: bool
    ) -> Site | None:
        found = find(left.index, right.index, self.graph)
        if found is None:
            return None
        skip, branch = operands if found.skip == left.index else operands[::-1]
        if found.kind == "gated":
            skip, branch = operands if found.branch == right.index else operands[::-1]
        products = operand_products(skip, branch, self._batch_size)
        site = self._site(found, products, in_place)
        site.skip_tensor = weakref.ref(skip)
        site.split = start_split(self._dataflow.tensor_of(found.source), branch)
        site.overwritten, site.overwritten_at = self._overwritten(found, skip_is_left=skip is operands[0])
        return site

    def _joined(self, operands: Sequence[Tensor], left: Node, right: Node, in_place: bool) -> Site | None:
        """``(x + a(x)) + b(x)``: the second branch of a site that was just found."""
        nodes = self.graph.nodes
        for total, other, tensor, added in (
            (left, right, operands[0], operands[1]),
            (right, left, operands[1], operands[0]),
        ):
            earlier = self.sites.get(_through_values(total.index, nodes))
            if earlier is None or earlier.found.kind not in ("identity", "scaled"):
                continue
            inside = between(earlier.found.source, other.index, nodes)
            if earlier.node in inside or not any(counts_as_branch(nodes[i], nodes) for i in inside):
                continue  # made from the sum itself, it is no branch beside the first
            skip = earlier.skip_tensor() if earlier.skip_tensor is not None else None
            whole = (
                None
                if skip is None or skip.shape != tensor.shape
                else (tensor.detach() - skip.detach()) + added.detach()
            )
            del self.sites[earlier.node]
            found = Branch(
                skip=earlier.found.skip,
                branch=other.index,
                source=earlier.found.source,
                kind=earlier.found.kind,
                inside=tuple(sorted({*earlier.found.inside, *inside})),
                shortcut=earlier.found.shortcut,
            )
            products = (
                None if skip is None or whole is None else operand_products(skip, whole, self._batch_size)
            )
            site = self._site(found, products, in_place)
            site.branches, site.skip_tensor = earlier.branches + 1, earlier.skip_tensor
            site.split = earlier.split
            if site.split is not None:
                site.split.add_branch(added)
            return site
        return None

    def _broadcast(self, left: Node, right: Node, in_place: bool) -> Site | None:
        """A stream that the add expands, in a dimension other than the batch: hardly ever meant."""
        found = find_bare(left.index, right.index, self.graph)
        if found is None:
            return None
        skip, branch = (left, right) if found.skip == left.index else (right, left)
        if len(skip.shape) > len(branch.shape) or not _expands(skip.shape, branch.shape):
            return None
        if not _is_closed(found, self.graph.nodes):
            return None  # a statistic put back (mean + std * y), not a stream
        site = self._site(found, None, in_place)
        site.broadcast = True
        return site

    def _site(self, found: Branch, products: OperandProducts | None, in_place: bool) -> Site:
        return Site(found=found, products=products, in_place=in_place, broadcast=False, call=0)

    def _place(self, site: Site, node: Node, tensor: Tensor) -> None:
        site.node = node.index
        site.call = self._calls(node.module)
        if site.split is not None:
            site.split.add_sum(tensor)
        node.source = user_source()
        if node.probe is None:
            node.probe = self._probe(_hookable(tensor) if site.in_place else tensor)
        source = self.graph.nodes[site.found.source]
        if source.probe is None:
            alive = self._dataflow.tensor_of(source.index)
            if alive is not None and alive.is_floating_point():
                source.probe = self._probe(alive)
        self.sites[node.index] = site

    def _overwritten(self, found: Branch, *, skip_is_left: bool) -> tuple[OverwrittenSkip | None, int]:
        """The first in-place op of the running forward that wrote over what the skip carries, and its node.

        Of several in a row (a ReLU, then a dropout) those before one that was meant do not count.
        """
        if found.kind not in ("identity", "scaled"):
            return None, -1
        frames = user_frames()
        add = frames[0] if frames else None
        blamed: OverwrittenSkip | None = None
        index, at = found.source, -1
        while (wrote := self._overwrites.get(index)) is not None and self._scopes[-1] in wrote.scopes:
            node = self.graph.nodes[index]
            said = describe_overwrite(
                op=node.op.strip("_"),
                name=node.place,
                frames=wrote.frames,
                add=add,
                skip_is_left=skip_is_left,
            )
            if blamed is not None and said.rebound is not blamed.rebound:
                break
            blamed, at = said, index
            if said.rebound is True or not node.inputs:
                break
            index = node.inputs[0]
        return blamed, at

    def _note_factor(self, node: Node, args: tuple[Any, ...]) -> None:
        factor = _factor(args, {id(t) for t in args if isinstance(t, Tensor) and self._is_data(t)})
        if factor is not None:
            self._factors[node.index] = 1.0 / factor if node.op in DIVISIONS and factor else factor

    def _is_data(self, tensor: Tensor) -> bool:
        node = self._dataflow.node_of(tensor)
        return (node is not None and (node.from_data or node.from_parameter)) or id(
            tensor
        ) in self._parameters

    def _note_concat(self, node: Node) -> None:
        nodes = self.graph.nodes
        for skip in node.inputs:
            source = _through_values(skip, nodes)
            for branch in node.inputs:
                inside = between(source, branch, nodes) if branch != skip and nodes[skip].from_data else ()
                if any(counts_as_branch(nodes[i], nodes) for i in inside):
                    found = Branch(
                        skip=skip, branch=branch, source=source, kind="concat", inside=inside, shortcut=()
                    )
                    site = self._site(found, None, False)
                    site.node, site.call, node.source = node.index, self._calls(node.module), user_source()
                    self.sites[node.index] = site
                    return


def _two_tensors(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> tuple[Tensor, Tensor] | None:
    """The operands of an add of two tensors, unscaled."""
    values = [*args[:2]]
    if kwargs:
        values += [kwargs[name] for name in ("input", "other") if name in kwargs]
        if kwargs.get("alpha", 1) != 1:
            return None
    if len(values) != 2 or not all(isinstance(value, Tensor) for value in values):
        return None
    left, right = values
    return None if is_transformed(left) or is_transformed(right) else (left, right)


def _through_values(index: int, nodes: Sequence[Node]) -> int:
    while True:
        data = data_inputs(nodes[index], nodes)
        if nodes[index].op not in VALUE_OPS or len(data) != 1:
            return index
        index = data[0]


def _hookable(tensor: Tensor) -> Tensor:
    """The tensor, or of a view that was written into its base: a hook on such a view is lost at the next write."""
    base = tensor._base if tensor._is_view() else None
    return base if base is not None and base.numel() == tensor.numel() else tensor


def _is_closed(found: Branch, nodes: Sequence[Node]) -> bool:
    """Everything in the branch comes from the source alone."""
    inside = {found.source, *found.inside}
    return all(j in inside for i in found.inside for j in data_inputs(nodes[i], nodes))


def _expands(skip: Sequence[int], branch: Sequence[int]) -> bool:
    """The skip grows in a dimension that is not the batch's."""
    padded = (1,) * (len(branch) - len(skip)) + tuple(skip)
    grows = [have == 1 and want > 1 for have, want in zip(padded, branch, strict=True)]
    return any(grows[1:]) or (len(skip) < len(branch) and any(grows))


def _factor(args: tuple[Any, ...], data: set[int]) -> float | None:
    """The number an op multiplies by, or the RMS of a constant tensor of a few elements."""
    for value in args[:2]:
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, Tensor) and id(value) not in data and _is_readable(value):
            return float(value.detach().double().square().mean().sqrt().item())
    return None


def _is_readable(tensor: Tensor) -> bool:
    """Small, real and here: reading it costs nothing."""
    small = 0 < tensor.numel() <= SMALL_FACTOR
    return small and tensor.device.type == "cpu" and not tensor.is_complex() and not is_transformed(tensor)
