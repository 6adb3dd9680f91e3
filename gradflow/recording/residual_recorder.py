"""Residual sites as they happen: found when the add runs, measured while both operands are still there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Protocol

import torch
from torch import Tensor

from gradflow.recording.attention_scores import are_scores
from gradflow.recording.dataflow import Dataflow, Frame, Node, user_frames, user_source
from gradflow.recording.gradient_split import GradientSplit, start_split
from gradflow.recording.overwritten import describe_overwrite
from gradflow.recording.residual_ops import (
    ADD_OPS,
    CONCAT_OPS,
    COPY_OPS,
    DIVISIONS,
    MEASURE_OPS,
    SCALE_OPS,
    SUB_OPS,
    SUM_OPS,
    VALUE_OPS,
    counts_as_branch,
    data_inputs,
)
from gradflow.recording.residual_sites import Branch, Graph, between, factors_of, find_bare, find_shaped
from gradflow.recording.site_measures import OperandProducts, operand_products, scaled_products
from gradflow.recording.site_operands import Operand, OperandReader, Summed
from gradflow.trace_model import OverwrittenSkip

WATCHED_OPS = SUM_OPS | SCALE_OPS | CONCAT_OPS | {"stack"}
"""Ops that ``SiteRecorder.after`` has to be told of, with those in place, of custom functions and other libraries."""


class Finder(Protocol):
    """Asks whether a sum is a site."""

    def __call__(self, left: int, right: int, graph: Graph, *, left_only: bool) -> Branch | None:
        """Describe the site."""


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
    handed: int = -1
    """The node of the tensor that the op was handed for the skip; another than the skip's where the op scales it."""
    inputs: tuple[int, int] | None = None
    """Skip and branch as nodes, where the op made one of them by itself."""
    skip_tensor: weakref.ref[Tensor] | None = None
    skip_factor: float = 1.0
    """What the add multiplied that tensor by."""
    split: GradientSplit | None = None
    """None where skip and branch are not summed."""
    overwritten: OverwrittenSkip | None = None
    branch_handed: int = -1
    """The node of the tensor that the add was handed for its branch."""
    overwritten_at: int = -1
    """The node of the op that did it."""
    joined_by: str = ""
    """Of an opaque site: what joins skip and branch."""


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
        self._complements: dict[int, Tensor] = {}
        self._overwrites: dict[int, _Overwrite] = {}
        self._pending: Site | None = None

    def attach(self, dataflow: Dataflow) -> None:
        """Say whose nodes to ask."""
        self._dataflow = dataflow
        dataflow.unseen = self._note_unseen
        self._operands = OperandReader(dataflow, self._factors, self._complements, self._parameters)
        self.graph = Graph(
            nodes=dataflow.nodes,
            factors=self._factors,
            parameters=self._parameters,
            complements=self._complements,
        )

    def in_order(self) -> list[Site]:
        """All sites, in execution order: that of their records."""
        return [self.sites[node] for node in sorted(self.sites)]

    def main(self) -> list[Site]:
        """The adds that the trunk can run through, in execution order: of a stream, or of a layer's update."""
        kinds = ("identity", "projection", "scaled", "low_rank")
        return [
            site
            for site in self.in_order()
            if (site.found.kind in kinds or site.found.mixes) and not site.broadcast
        ]

    def end_forward(self, *, split: bool) -> None:
        """Have the gradient at every site split, where asked to; call it between forward and backward.

        Only then is it known who reads a sum, and attention scores with a bias made from data are no site.
        """
        self._operands.release()
        self._drop_errors()
        self._drop_scores()
        for site in self.sites.values():
            if split and site.split is not None:
                site.split.listen()

    def _drop_scores(self) -> None:
        nodes = self.graph.nodes
        for index in [i for i, site in self.sites.items() if are_scores(i, site.found.branch, nodes)]:
            del self.sites[index]

    def _drop_errors(self) -> None:
        """``(x - f(x)).square()`` measures how far f(x) is from x; nothing else reads the difference."""
        nodes = self.graph.nodes
        asked = {index: True for index in self.sites if nodes[index].op in SUB_OPS}
        if not asked:
            return
        read: set[int] = set()
        for node in nodes:
            for i in asked.keys() & set(node.inputs):
                read.add(i)
                squares = node.op in SCALE_OPS and set(node.inputs) == {i}
                asked[i] = asked[i] and (squares or node.op in MEASURE_OPS)
        for index in read:
            if asked[index]:
                del self.sites[index]

    def before(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
        """Look at an add that is about to run: an in-place one is about to overwrite an operand."""
        self._pending = None
        if not self._scopes:
            return
        if op == "stack":
            self._operands.note_stack(args, kwargs)
            return
        summed = self._operands.read(op, args, kwargs)
        if summed is None:
            return
        in_place = op.endswith("_") and (not op.endswith("__") or op.startswith("__i"))
        self._pending = self._find(summed, in_place)
        if self._pending is None:
            self._dataflow.forget(summed.imagined)
        elif not summed.whole:
            self._pending.inputs = (summed.left.node.index, summed.right.node.index)

    def _find(self, summed: Summed, in_place: bool) -> Site | None:
        if summed.left.node.shape == summed.right.node.shape:
            return (
                self._plain(find_bare, summed, in_place)
                or self._joined(summed, in_place)
                or self._plain(find_shaped, summed, in_place)
            )
        plain = summed.whole and not summed.left_only
        return self._broadcast(summed.left.node, summed.right.node, in_place) if plain else None

    def after(self, node: Node, tensor: Tensor, args: tuple[Any, ...]) -> None:
        """Note what an op was, and where a site's sum went; which have to be told, see ``WATCHED_OPS``."""
        if self._dataflow.joining is not None or "::" in node.op:
            self._note_opaque(node, tensor)
            return
        if node.op in SUM_OPS and self._pending is not None:
            self._place(self._pending, node, tensor)
            self._pending = None
            return
        if node.op in ADD_OPS:
            if len(args) == 2 and isinstance(args[1], int) and args[1] == 0:
                node.op = "alias"  # ``sum([x, f])`` begins with 0 + x
            return
        if node.op in SCALE_OPS:
            self._note_factor(node, args)
        elif node.op == "stack":
            self._operands.keep_stack(node)
        elif node.op in CONCAT_OPS and self._scopes:
            self._note_concat(node)
        if args and tensor is args[0] and node.from_data and node.op not in VALUE_OPS:
            self._overwrites[node.index] = _Overwrite(tuple(self._scopes), user_frames())

    def _plain(self, find: Finder, summed: Summed, in_place: bool) -> Site | None:
        left, right = summed.left, summed.right
        found = find(left.node.index, right.node.index, self.graph, left_only=summed.left_only)
        if found is None:
            return None
        # Of a gated site the skip is what the gate reads, views passed.
        first = found.branch == right.node.index if found.kind == "gated" else found.skip == left.node.index
        skip, branch = (left, right) if first else (right, left)
        site = self._site(found, self._products(skip, branch), in_place)
        site.handed, site.skip_tensor, site.skip_factor = skip.handed, skip.reference, skip.factor
        site.branch_handed = branch.handed
        site.split = start_split(self._dataflow.tensor_of(found.source), branch.landings())
        site.overwritten, site.overwritten_at = self._overwritten(found, skip_is_left=first)
        if found.kind in ("identity", "scaled"):
            self._take_branches(found)
        return site

    def _products(self, skip: Operand, branch: Operand) -> OperandProducts | None:
        with torch.no_grad():
            products = operand_products(skip.value(), branch.value(), self._batch_size)
        return scaled_products(products, skip.factor, branch.factor)

    def _take_branches(self, found: Branch) -> None:
        """``x + (a(x) + b(x))``: what looked like a projection beside a branch were two branches."""
        inner = self.sites.get(factors_of(found.branch, self.graph.nodes)[1])
        if inner is not None and inner.found.kind == "projection" and inner.found.source == found.source:
            del self.sites[inner.node]

    def _joined(self, summed: Summed, in_place: bool) -> Site | None:
        """``(x + a(x)) + b(x)``: the second branch of a site that was just found."""
        nodes = self.graph.nodes
        left, right = summed.left, summed.right
        for total, added in ((left, right),) if summed.left_only else ((left, right), (right, left)):
            earlier = self.sites.get(_through_values(total.node.index, nodes))
            if earlier is None or earlier.found.kind not in ("identity", "scaled"):
                continue
            inside = between(earlier.found.source, added.node.index, nodes)
            if earlier.node in inside or not any(counts_as_branch(nodes[i], nodes) for i in inside):
                continue  # made from the sum itself, it is no branch beside the first
            del self.sites[earlier.node]
            found = Branch(
                skip=earlier.found.skip,
                branch=added.node.index,
                source=earlier.found.source,
                kind=earlier.found.kind,
                inside=tuple(sorted({*earlier.found.inside, *inside})),
                shortcut=earlier.found.shortcut,
            )
            site = self._site(found, self._joined_products(earlier, total, added), in_place)
            site.branches, site.handed = earlier.branches + 1, earlier.handed
            site.skip_tensor, site.skip_factor = earlier.skip_tensor, earlier.skip_factor
            site.overwritten, site.overwritten_at = earlier.overwritten, earlier.overwritten_at
            site.split = earlier.split
            if site.split is not None:
                site.split.add_branches(added.landings())
            return site
        return None

    def _joined_products(self, earlier: Site, total: Operand, added: Operand) -> OperandProducts | None:
        """Of the skip and the sum of both branches; None where the skip's tensor is gone."""
        skip, factor = self._skip_of(earlier)
        if skip is None or skip.shape != total.node.shape:
            return None
        with torch.no_grad():
            brought = skip.detach() if factor == 1.0 else skip.detach() * factor
            whole = (total.value() - brought) + added.value() * added.factor
            return operand_products(brought, whole, self._batch_size)

    def _skip_of(self, site: Site) -> tuple[Tensor | None, float]:
        """The tensor that the skip still is, and the number it counts times; of ``0.7 * x`` the x that is left."""
        tensor = site.skip_tensor() if site.skip_tensor is not None else None
        index, factor, nodes = site.handed, site.skip_factor, self.graph.nodes
        while tensor is None and len(nodes[index].inputs) == 1 and not nodes[index].parameters:
            if nodes[index].op in SCALE_OPS and index in self._factors:
                factor *= self._factors[index]
            elif nodes[index].op not in COPY_OPS:
                break
            index = nodes[index].inputs[0]
            tensor = self._dataflow.tensor_of(index)
        return tensor, factor

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
        return Site(
            found=found, products=products, in_place=in_place, broadcast=False, call=0, handed=found.skip
        )

    def _place(self, site: Site, node: Node, tensor: Tensor) -> None:
        if site.inputs is not None:
            node.inputs, node.parameters = site.inputs, ()
        if self._dataflow.functions:
            self._make_opaque(site, self._dataflow.functions[-1])
        if site.split is not None:
            site.split.add_sum(tensor)
        node.source = user_source()
        self._settle(site, node, tensor)

    def _settle(self, site: Site, node: Node, tensor: Tensor) -> None:
        site.node = node.index
        site.call = max(self._calls(node.module) - (not self._scopes), 0)
        if node.probe is None:
            node.probe = self._probe(_hookable(tensor) if site.in_place else tensor)
        source = self.graph.nodes[site.found.source]
        if source.probe is None:
            alive = self._dataflow.tensor_of(source.index)
            if alive is not None and alive.is_floating_point():
                source.probe = self._probe(alive)
        self.sites[node.index] = site

    def _note_opaque(self, node: Node, tensor: Tensor) -> None:
        """What a custom function or another library's op returned: did it join a stream and a branch of it?"""
        joining = self._dataflow.joining
        if joining is not None and next(reversed(self.sites), -1) >= joining.start:
            # Its forward was seen to add. What it returns is the sum, with a gradient.
            inner = next(
                (i for i in node.inputs if i in self.sites and self._dataflow.is_of(i, tensor)), None
            )
            if inner is not None:
                site, node.source = self.sites.pop(inner), self.graph.nodes[inner].source
                self._settle(site, node, tensor)
        elif self._scopes:
            self._join(node, tensor, node.op if joining is None else joining.name)

    def _note_unseen(self, node: Node, tensor: Tensor) -> None:
        """A scripted or compiled function is seen by nothing but the graph that autograd keeps."""
        self._join(node, tensor, "an unseen op")

    def _join(self, node: Node, tensor: Tensor, name: str) -> None:
        nodes = self.graph.nodes
        alike = [i for i in dict.fromkeys(node.inputs) if nodes[i].from_data and nodes[i].shape == node.shape]
        for left, right in combinations(alike, 2):
            found = find_bare(left, right, self.graph)
            if found is not None and node.shape and node.floating:
                site = self._site(found, None, False)
                self._make_opaque(site, name)
                node.source = user_source()
                self._settle(site, node, tensor)
                return

    def _make_opaque(self, site: Site, name: str) -> None:
        site.found, site.joined_by = replace(site.found, kind="opaque"), name
        site.split = GradientSplit(note=f"joined inside {name}, which is not looked into")

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
        self._operands.note_factor(node, args)
        factor = self._factors.get(node.index)
        if factor and node.op in DIVISIONS:
            self._factors[node.index] = 1.0 / factor

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
