"""Normalisations: torch's own, and those written in plain ops."""

from __future__ import annotations

from collections.abc import Sequence

from gradflow.recording.dataflow import Node
from gradflow.recording.residual_ops import DIVISIONS, SCALE_OPS, VALUE_OPS
from gradflow.recording.weight_ops import NORM_OPS

_LENGTHS = frozenset({"norm", "vector_norm", "linalg_vector_norm", "linalg_norm", "std", "std_mean"})
_STATISTICS = _LENGTHS | frozenset({"mean", "sum", "var", "var_mean"})
_ROOTS = frozenset({"sqrt", "rsqrt", "pow", "__pow__", "sqrt_", "rsqrt_"})
_INVERSES = frozenset({"rsqrt", "rsqrt_", "reciprocal", "pow", "__pow__", "__rtruediv__", "__rdiv__"})
_OTHERS = frozenset(
    {"square", "abs", "sub", "__sub__", "add", "__add__", "clamp", "clamp_min", "mul", "__mul__"}
)
_PLAIN = _STATISTICS | _ROOTS | _INVERSES | _OTHERS
STEPS = 12
"""A norm in plain ops takes fewer from its input to the factor."""


def is_norm(node: Node, nodes: Sequence[Node]) -> bool:
    """A normalisation op, or the product in which one in plain ops divides a tensor by its own spread."""
    if node.op in NORM_OPS or node.op == "normalize":
        return True
    if node.op not in SCALE_OPS or len(node.inputs) != 2:
        return False
    pairs = (node.inputs,) if node.op in DIVISIONS else (node.inputs, node.inputs[::-1])
    return any(_is_spread(spread, of, node.op in DIVISIONS, nodes) for of, spread in pairs)


def works_on_statistics(node: Node) -> bool:
    """One of the plain ops that such a norm consists of."""
    return node.op in _PLAIN


def _is_spread(index: int, of: int, divides: bool, nodes: Sequence[Node]) -> bool:
    """The node is a root mean square, a deviation or a length of a tensor, or the inverse of one."""
    rooted, inverted = False, divides
    for _ in range(STEPS):
        node = nodes[index]
        rooted = rooted or node.op in _ROOTS or node.op in _LENGTHS
        inverted = inverted or node.op in _INVERSES
        if node.op in _STATISTICS and node.inputs:
            whole = node.inputs[0]
            reduces = node.shape.numel() < nodes[whole].shape.numel()
            return rooted and inverted and reduces and bool(_line(whole, nodes) & _line(of, nodes))
        if len(node.inputs) != 1 or node.op not in _PLAIN | VALUE_OPS:
            return False
        index = node.inputs[0]
    return False


def _line(index: int, nodes: Sequence[Node]) -> set[int]:
    """A tensor and those it was made from by casts, powers and a subtraction."""
    found = {index}
    for _ in range(STEPS):
        node = nodes[index]
        if not node.inputs or node.op not in _PLAIN | VALUE_OPS:
            break
        index = node.inputs[0]
        found.add(index)
    return found
