"""Is this add a residual? Pure questions to the dataflow graph, asked while the add runs.

An add is residual where one operand, the skip, is a tensor that the other, the branch, was made from
(identity, scaled), or where both were made from one tensor and the skip only fits its shape (projection).
Definitions: the residual page of the documentation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gradflow.recording.dataflow import INPUT_OP, Node
from gradflow.recording.norm_ops import is_norm
from gradflow.recording.residual_ops import (
    ADD_OPS,
    LOOKUPS,
    PRODUCT_OPS,
    SCALE_OPS,
    SHAPING_OPS,
    STACKED_SUMS,
    SUB_OPS,
    VALUE_OPS,
    counts_as_branch,
    data_inputs,
    is_nonlinear,
    is_product_of_data,
)
from gradflow.recording.weight_ops import CONV_OPS, NORM_OPS, is_weight_op, weights_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """What the questions are asked of."""

    nodes: Sequence[Node]
    factors: Mapping[int, float]
    """Of a scaling op by a number: the number."""
    parameters: Mapping[int, Tensor]
    """By ``id``."""
    complements: Mapping[int, Tensor] = field(default_factory=dict)
    """Of an imagined product with 1 - w: the parameter w."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A residual add, described by its two sides; every number is a node.

    Attributes:
        skip: The operand that brings the stream.
        branch: The operand that brings F.
        source: The tensor that both were made from.
        kind: "identity", "projection", "scaled", "gated" or "low_rank".
        inside: What lies between the source and the branch, the branch included.
        shortcut: What lies between the source and the skip, nearest the skip first; empty for a bare skip.
        mixes: Of a gated one: the gate is a matrix that mixes parallel streams (hyper-connections).
    """

    skip: int
    branch: int
    source: int
    kind: str
    inside: tuple[int, ...]
    shortcut: tuple[int, ...]
    mixes: bool = False


def find_bare(left: int, right: int, graph: Graph, *, left_only: bool = False) -> Branch | None:
    """Describe the add of two nodes where one is a tensor that the other was made from, a factor apart.

    With ``left_only`` only the first one can be the skip.
    """
    found = _bare(left, right, graph) or (None if left_only else _bare(right, left, graph))
    return None if found is None or is_position(found.skip, graph.nodes) else found


def find_shaped(left: int, right: int, graph: Graph, *, left_only: bool = False) -> Branch | None:
    """Describe the add of two nodes where one is such a tensor made to fit, or gated."""
    for skip, branch in ((left, right),) if left_only else ((left, right), (right, left)):
        found = _gated(skip, branch, graph) or _projection(skip, branch, graph)
        if found is not None and not is_position(found.skip, graph.nodes):
            return found
    return None


def is_position(source: int, nodes: Sequence[Node]) -> bool:
    """Sines of positions or the like: bent out of a mask alone, with no given or looked-up value in it.

    Models add such a tensor again in every block. What comes later was made from it too, yet it is no stream:
    no activation flows along it.
    """
    waiting, seen, bends = [source], {source}, False
    while waiting:
        node = nodes[waiting.pop()]
        if node.op == INPUT_OP:
            if node.floating:
                return False
            continue
        if counts_as_branch(node, nodes) or node.op in LOOKUPS:
            return False
        bends = bends or is_nonlinear(node, nodes)
        before = [i for i in data_inputs(node, nodes) if i not in seen]
        seen.update(before)
        waiting += before
    return bends


def between(source: int, branch: int, nodes: Sequence[Node]) -> tuple[int, ...]:
    """Nodes on the way from a source to a branch, the branch included; empty where there is no way."""
    above = {branch}
    waiting = [branch]
    while waiting:
        for i in nodes[waiting.pop()].inputs:
            if i >= source and i not in above:
                above.add(i)
                waiting.append(i)
    if source not in above or source == branch:
        return ()
    reached = {source}
    for i in sorted(above):
        if any(j in reached for j in nodes[i].inputs):
            reached.add(i)
    return tuple(sorted(reached - {source}))


def parallel_branches(branch: int, source: int, nodes: Sequence[Node]) -> int:
    """How many branches of one source an operand is the sum of: attention and MLP side by side make two."""
    _, branch = factors_of(branch, nodes)
    node = nodes[branch]
    if node.op in STACKED_SUMS and len(node.inputs) == 1 and nodes[node.inputs[0]].op == "stack":
        sides = nodes[node.inputs[0]].inputs
    else:
        sides = node.inputs if node.op in ADD_OPS | SUB_OPS else ()
    if len(sides) != 2:
        return 1
    ways = [between(source, side, nodes) for side in sides]
    apart = sides[0] not in ways[1] and sides[1] not in ways[0]
    if not apart or not all(any(counts_as_branch(nodes[i], nodes) for i in way) for way in ways):
        return 1
    return sum(parallel_branches(side, source, nodes) for side in sides)


def factors_of(index: int, nodes: Sequence[Node]) -> tuple[tuple[int, ...], int]:
    """The scaling ops that stand last on the way to a node, last first, and the node before them.

    The weight with which a normalisation in plain ops ends is a part of the norm, and no factor.
    """
    found: list[int] = []
    while True:
        node = nodes[index]
        data = data_inputs(node, nodes)
        if is_norm(node, nodes):
            last = nodes[found[-1]] if found and node.op in SCALE_OPS else node
            affine = last is not node and last.module == node.module and bool(weights_of(last, nodes))
            return tuple(found[:-1] if affine else found), found[-1] if affine else index
        if len(data) != 1 or not (node.op in VALUE_OPS or node.op in SCALE_OPS):
            return tuple(found), index
        if node.op in SCALE_OPS:
            found.append(index)
        index = data[0]


def _bare(skip: int, branch: int, graph: Graph) -> Branch | None:
    """Identity or scaled: the skip is the source itself, value-preserving ops and factors followed back."""
    nodes = graph.nodes
    passed: list[int] = []
    scaled = False
    index = skip
    while True:
        inside = between(index, branch, nodes)
        if inside:
            if not any(counts_as_branch(nodes[i], nodes) for i in inside):
                return None
            kind = "scaled" if scaled else "identity"
            return Branch(
                skip=skip, branch=branch, source=index, kind=kind, inside=inside, shortcut=tuple(passed)
            )
        node = nodes[index]
        data = data_inputs(node, nodes)
        if len(data) != 1 or not (node.op in SCALE_OPS or (node.op in VALUE_OPS and not node.parameters)):
            return None
        scaled = scaled or node.op in SCALE_OPS
        passed.append(index)
        index = data[0]


def _gated(skip: int, branch: int, graph: Graph) -> Branch | None:
    """A skip times something made from the data: highway layers, cells, a mixture of parallel streams."""
    nodes = graph.nodes
    while nodes[skip].op in VALUE_OPS and len(data_inputs(nodes[skip], nodes)) == 1:
        skip = data_inputs(nodes[skip], nodes)[0]
    gate = nodes[skip]
    mixes = gate.op in PRODUCT_OPS
    if not (mixes or gate.op in SCALE_OPS) or len(data_inputs(gate, nodes)) != 2:
        return None
    for stream, factor in (gate.inputs, gate.inputs[::-1]):
        inside = between(stream, branch, nodes)
        if mixes and not _mixes_streams(factor, stream, gate, nodes):
            continue
        if any(counts_as_branch(nodes[i], nodes) for i in inside):
            return Branch(
                skip=skip,
                branch=branch,
                source=stream,
                kind="gated",
                inside=inside,
                shortcut=(skip,),
                mixes=mixes,
            )
    return None


def _mixes_streams(matrix: int, stream: int, product: Node, nodes: Sequence[Node]) -> bool:
    """A square matrix made from the parallel streams that it mixes, and not by comparing positions (attention)."""
    shape = nodes[matrix].shape
    if nodes[stream].shape != product.shape or shape[-1:] != shape[-2:-1]:
        return False
    made = between(stream, matrix, nodes)
    return bool(made) and not any(is_product_of_data(nodes[i], nodes) for i in made)


def _projection(skip: int, branch: int, graph: Graph) -> Branch | None:
    """Projection or low rank: both sides come from one tensor, and the skip only makes its shape fit."""
    nodes = graph.nodes
    passed: list[int] = []
    index = skip
    while _fits_shape(index, passed, graph):
        passed.append(index)
        index = data_inputs(nodes[index], nodes)[0]
        inside = between(index, branch, nodes)
        if inside:
            kind = _projected_kind(passed, inside, nodes)
            if kind is None:
                return None
            return Branch(
                skip=skip, branch=branch, source=index, kind=kind, inside=inside, shortcut=tuple(passed)
            )
    return None


def _fits_shape(index: int, passed: Sequence[int], graph: Graph) -> bool:
    """The node may stand on a shortcut: slices, pads, pools, norms, and one pointwise linear map in all."""
    nodes = graph.nodes
    node = nodes[index]
    if len(data_inputs(node, nodes)) != 1:
        return False
    if is_weight_op(node, nodes):
        return _is_pointwise(node, graph) and not any(is_weight_op(nodes[i], nodes) for i in passed)
    if node.op in ADD_OPS:
        return bool(node.parameters)  # a bias
    return node.op in VALUE_OPS or node.op in SHAPING_OPS or node.op in NORM_OPS or node.op in SCALE_OPS


def _is_pointwise(node: Node, graph: Graph) -> bool:
    """A linear map of each position by itself."""
    if node.op not in CONV_OPS:
        return True
    weights = [graph.parameters[i] for i in weights_of(node, graph.nodes) if i in graph.parameters]
    return all(size == 1 for weight in weights if weight.dim() > 2 for size in weight.shape[2:])


def _projected_kind(shortcut: Sequence[int], inside: Sequence[int], nodes: Sequence[Node]) -> str | None:
    own = [i for i in shortcut if is_weight_op(nodes[i], nodes)]
    others = [i for i in inside if is_weight_op(nodes[i], nodes)]
    used = {weight for i in own for weight in weights_of(nodes[i], nodes)}
    if any(used & weights_of(nodes[i], nodes) for i in others):
        return None  # one weight on both sides: a recurrence, not a shortcut
    bends = any(is_nonlinear(nodes[i], nodes) for i in inside)
    if len(others) > len(own) and bends:
        return "projection"
    narrow = len(others) == 2 and len(own) == 1 and nodes[others[0]].shape[-1:] < nodes[others[1]].shape[-1:]
    return "low_rank" if narrow and not bends else None
