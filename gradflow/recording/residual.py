"""Dataflow graph -> residual sites: where a stream and a branch of it are added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradflow.recording.dataflow import Node
from gradflow.recording.weight_ops import NORM_OPS, is_weight_op

ADD_OPS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_VALUE = """
to float half bfloat16 double type type_as contiguous view reshape flatten unflatten squeeze unsqueeze view_as
reshape_as clone permute transpose t T mT movedim swapaxes detach data chunk split __getitem__ narrow roll
pad alias dropout dropout_ dropout2d feature_dropout
"""
VALUE_OPS = frozenset(_VALUE.split())
"""Ops whose result carries the same values, moved, cast, scaled by a constant or thinned out."""
SCALE_OPS = frozenset({"mul", "mul_", "__mul__", "__rmul__", "div", "div_", "__truediv__"})
_SHORTCUT = """
avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d cat
interpolate
"""
SHORTCUT_OPS = VALUE_OPS | NORM_OPS | frozenset(_SHORTCUT.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One residual add.

    Attributes:
        node: The sum.
        source: The node that both operands come from: the stream.
        kind: "identity" or "projection".
    """

    node: int
    source: int
    kind: str


def adds_two_streams(node: Node, nodes: Sequence[Node]) -> bool:
    """Cheap test at the time of the op: an add of two full-shaped tensors that both come from the input."""
    if node.op not in ADD_OPS or len(node.inputs) != 2 or node.parameters:
        return False
    left, right = (nodes[i] for i in node.inputs)
    return left.from_data and right.from_data and left.shape == right.shape == node.shape and node.floating


def residual_sites(nodes: Sequence[Node]) -> tuple[Site, ...]:
    """Every residual add, in execution order."""
    found = (_site(node, nodes) for node in nodes if adds_two_streams(node, nodes))
    return tuple(site for site in found if site is not None)


def _site(node: Node, nodes: Sequence[Node]) -> Site | None:
    left, right = node.inputs
    for skip, branch in ((left, right), (right, left)):
        source = _same_values(skip, nodes)
        inside = _between(branch, source, nodes)
        if source in inside and any(_counts(nodes[i], nodes) for i in inside if i != source):
            return Site(node=node.index, source=source, kind="identity")
    return _projection(node, nodes)


def _projection(node: Node, nodes: Sequence[Node]) -> Site | None:
    for skip, branch in (node.inputs, node.inputs[::-1]):
        source, shortcut = _shortcut_source(skip, nodes)
        if source is None or not any(_counts(nodes[i], nodes) for i in shortcut):
            continue
        inside = _between(branch, source, nodes)
        weights = sum(is_weight_op(nodes[i], nodes) for i in inside if i != source)
        own = sum(is_weight_op(nodes[i], nodes) for i in shortcut)
        if source in inside and weights > own:
            return Site(node=node.index, source=source, kind="projection")
    return None


def _shortcut_source(skip: int, nodes: Sequence[Node]) -> tuple[int | None, tuple[int, ...]]:
    """Follow a shortcut of slices, pools, norms and at most one linear map back to where it starts."""
    path: list[int] = []
    index, linear = skip, 0
    while True:
        node = nodes[index]
        linear += is_weight_op(node, nodes)
        if linear > 1 or not (node.op in SHORTCUT_OPS or is_weight_op(node, nodes)):
            return (index if path else None), tuple(path)
        path.append(index)
        data = [i for i in node.inputs if nodes[i].from_data]
        if len(data) != 1:
            return None, tuple(path)
        index = data[0]


def _same_values(index: int, nodes: Sequence[Node]) -> int:
    """Follow value-preserving ops back to the tensor the values come from."""
    while True:
        node = nodes[index]
        data = [i for i in node.inputs if nodes[i].from_data]
        if node.op not in VALUE_OPS or len(data) != 1 or node.parameters:
            return index
        index = data[0]


def _between(branch: int, source: int, nodes: Sequence[Node]) -> set[int]:
    """Ancestors of the branch, itself included, that are not older than the source."""
    seen = {branch} if branch >= source else set()
    waiting = list(seen)
    while waiting:
        for i in nodes[waiting.pop()].inputs:
            if i >= source and i not in seen:
                seen.add(i)
                waiting.append(i)
    return seen


def _counts(node: Node, nodes: Sequence[Node]) -> bool:
    """Makes a branch a branch: a weight layer, or a normalisation that owns a parameter."""
    return is_weight_op(node, nodes) or (node.op in NORM_OPS and bool(node.parameters))
