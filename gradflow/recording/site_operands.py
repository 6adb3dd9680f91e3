"""The two operands of an op that may add a skip and a branch, as nodes and as values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gradflow.recording.dataflow import Dataflow, Node
from gradflow.recording.gradient_split import Landing, landing_of
from gradflow.recording.residual_ops import STACKED_SUMS, SUB_OPS
from gradflow.recording.sum_terms import Term, sum_terms
from gradflow.recording.tensor_stats import is_transformed

SMALL_FACTOR = 4_096
"""A factor that is a tensor (a stochastic-depth mask) is read up to this many elements."""


@dataclass(slots=True, kw_only=True)
class Operand:
    """One side of a sum.

    Attributes:
        node: Of what is added; an imagined one where the op makes it by itself.
        handed: The node of the tensor that the op is handed for it.
        value: What is added, but for ``factor``.
        landings: Where the gradient at the sum comes back to on this side.
        reference: The tensor, where nothing but ``factor`` is done to it.
    """

    node: Node
    handed: int
    value: Callable[[], Tensor]
    landings: Callable[[], tuple[Landing, ...]]
    factor: float = 1.0
    reference: weakref.ref[Tensor] | None = None


@dataclass(slots=True, kw_only=True)
class Summed:
    """What an op adds.

    Attributes:
        imagined: The nodes that were made up for it; they go where no site is found.
        left_only: Only the first operand can be a skip: ``x - f`` is a residual, ``f - x`` a difference.
        whole: The op adds two tensors as it is handed them.
    """

    left: Operand
    right: Operand
    imagined: list[Node] = field(default_factory=list)
    left_only: bool = False
    whole: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Element:
    """One of some tensors that were stacked."""

    node: int
    landing: Landing
    reference: weakref.ref[Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stack:
    dimension: int
    elements: tuple[_Element, ...]


class OperandReader:
    """Reads the operands of sums off the dataflow.

    Args:
        dataflow: That is recording.
        factors: Filled with the number that each scaling op multiplies by.
        complements: Filled with the weight w of each imagined product with 1 - w.
        parameters: The model's, by ``id``.
    """

    def __init__(
        self,
        dataflow: Dataflow,
        factors: dict[int, float],
        complements: dict[int, Tensor],
        parameters: Mapping[int, Tensor],
    ) -> None:
        self._dataflow = dataflow
        self._factors = factors
        self._complements = complements
        self._parameters = parameters
        self._stacks: dict[int, _Stack] = {}
        self._stacking: _Stack | None = None

    def read(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Summed | None:
        """The operands of an op that is about to run; None where it adds no two tensors of the data."""
        if op in STACKED_SUMS:
            return self._unstacked(op, args, kwargs) if self._stacks else None
        terms = sum_terms(op, args, kwargs)
        if terms is None:
            return None
        nodes = [self._dataflow.node_of(term.tensors[0]) for term in terms]
        # Of a product either factor may be the one that comes from the data: it is looked at again below.
        if nodes[0] is None or not (nodes[0].from_data and nodes[0].floating and nodes[0].shape):
            return None
        imagined: list[Node] = []
        left, right = (self._of_term(term, nodes[0].shape, imagined) for term in terms)
        if left is None or right is None or left.node is right.node:
            self._dataflow.forget(imagined)
            return None
        whole = all(term.bare for term in terms)
        return Summed(left=left, right=right, imagined=imagined, left_only=op in SUB_OPS, whole=whole)

    def note_stack(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
        """Look at tensors that are about to be stacked."""
        named = kwargs or {}
        tensors = args[0] if args else named.get("tensors")
        dimension = args[1] if len(args) > 1 else named.get("dim", 0)
        self._stacking = None
        if not isinstance(tensors, tuple | list) or len(tensors) < 2 or any(map(is_transformed, tensors)):
            return
        nodes = [self._dataflow.node_of(tensor) for tensor in tensors]
        found = [node.index for node in nodes if node is not None and node.from_data and node.floating]
        if len(found) == len(tensors):
            elements = tuple(
                _Element(node=index, landing=landing_of(tensor), reference=weakref.ref(tensor))
                for index, tensor in zip(found, tensors, strict=True)
            )
            self._stacking = _Stack(dimension=dimension, elements=elements)

    def keep_stack(self, node: Node) -> None:
        """The stacking that was looked at has made this node."""
        if self._stacking is not None:
            self._stacks[node.index] = self._stacking
            self._stacking = None

    def release(self) -> None:
        """Let go of what was stacked, once the forward is over."""
        self._stacks.clear()
        self._stacking = None

    def note_factor(self, node: Node, args: Sequence[Any]) -> None:
        """Note what a scaling op multiplies by, where it is a number or a small constant tensor."""
        data = {id(t) for t in args if isinstance(t, Tensor) and self._is_computed(t)}
        factor = _factor(args, data)
        if factor is not None:
            self._factors[node.index] = factor

    def _is_computed(self, tensor: Tensor) -> bool:
        node = self._dataflow.node_of(tensor)
        known = node is not None and (node.from_data or node.from_parameter)
        return known or id(tensor) in self._parameters

    def _of_term(self, term: Term, shape: Sequence[int], imagined: list[Node]) -> Operand | None:
        nodes = [self._dataflow.node_of(tensor) for tensor in term.tensors]
        carrier = next((node for node in nodes if node is not None and node.from_data), None)
        if carrier is None or not carrier.floating:
            return None
        if term.bare:
            node: Node = carrier
        elif not term.product or tuple(term.shape()) == tuple(shape):
            node = self._imagined(term, carrier, imagined)
        else:
            return None
        return Operand(
            node=node,
            handed=carrier.index,
            value=term.value,
            landings=lambda: tuple(map(landing_of, term.tensors)),
            factor=term.factor,
            reference=None if term.product else weakref.ref(term.tensors[0]),
        )

    def _imagined(self, term: Term, carrier: Node, imagined: list[Node]) -> Node:
        """What a term multiplies, as nodes that other spellings of the same would have."""
        dataflow = self._dataflow
        node = carrier
        if term.product:
            node = dataflow.imagine(term.product, term.tensors, term.shape())
            imagined.append(node)
        if term.product == "mul":
            self.note_factor(node, term.tensors)
            if term.complement and id(term.tensors[1]) in self._parameters:
                self._complements[node.index] = term.tensors[1]
        if term.factor != 1.0 and term.product == "mul":
            self._factors[node.index] = term.factor * self._factors.get(node.index, 1.0)
        elif term.factor != 1.0:
            node = dataflow.imagine("mul", (), node.shape, (node,))
            self._factors[node.index] = term.factor
            imagined.append(node)
        return node

    def _unstacked(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Summed | None:
        """``torch.stack([x, f]).sum(0)``: the oldest of the tensors beside the sum of the others."""
        named = kwargs or {}
        whole = args[0] if args else named.get("input")
        node = self._dataflow.node_of(whole) if isinstance(whole, Tensor) else None
        stack = None if node is None else self._stacks.get(node.index)
        if (
            stack is None
            or not isinstance(whole, Tensor)
            or not _is_over(stack.dimension, whole, args, named)
        ):
            return None
        factor = 1.0 if op == "sum" else 1.0 / len(stack.elements)
        order = sorted(range(len(stack.elements)), key=lambda at: stack.elements[at].node)
        if stack.elements[order[0]].node == stack.elements[order[1]].node:
            return None
        imagined: list[Node] = []
        left, right = (self._of_stack(stack, whole, at, factor, imagined) for at in (order[:1], order[1:]))
        return Summed(left=left, right=right, imagined=imagined, whole=False)

    def _of_stack(
        self, stack: _Stack, whole: Tensor, places: Sequence[int], factor: float, imagined: list[Node]
    ) -> Operand:
        dataflow, elements = self._dataflow, [stack.elements[at] for at in places]
        nodes = [dataflow.nodes[element.node] for element in elements]
        node = nodes[0]
        if len(nodes) > 1:
            node = dataflow.imagine("add", (), node.shape, nodes)
            imagined.append(node)
        if factor != 1.0:
            node = dataflow.imagine("mul", (), node.shape, (node,))
            self._factors[node.index] = factor
            imagined.append(node)

        def value() -> Tensor:
            first, *rest = (whole.detach().select(stack.dimension, at) for at in places)
            return sum(rest, first)

        return Operand(
            node=node,
            handed=elements[0].node,
            value=value,
            landings=lambda: tuple(element.landing for element in elements),
            factor=factor,
            reference=elements[0].reference if len(elements) == 1 else None,
        )


def _is_over(dimension: int, whole: Tensor, args: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """A reduction takes one dimension away, and it is this one."""
    over = args[1] if len(args) > 1 else named.get("dim", named.get("axis"))
    if isinstance(over, tuple | list) and len(over) == 1:
        over = over[0]
    kept = named.get("keepdim", len(args) > 2 and args[2])
    return isinstance(over, int) and not kept and (over - dimension) % whole.dim() == 0


def _factor(args: Sequence[Any], data: set[int]) -> float | None:
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
