"""Telling a bias on attention scores from a residual: ``softmax(q @ k.T + bias)`` adds nothing to a stream.

A bias that is made from data (positions, pairs, a layout) reaches the scores of a later layer through the layers
before it as well, so that those look like a branch of it. Two things give it away: the branch ends in a product of
two tensors made from data, and nothing but a softmax reads the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

from gradflow.recording.dataflow import Node
from gradflow.recording.residual_ops import ADD_OPS, SCALE_OPS, VALUE_OPS, data_inputs, is_product_of_data

_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax", "log_softmax"})
_ON_SCORES = (
    ADD_OPS
    | SCALE_OPS
    | VALUE_OPS
    | frozenset({"masked_fill", "masked_fill_", "where", "sub", "amax", "max"})
)
"""What scores may go through on their way to the softmax: masks, scales, and its own maximum."""


def are_scores(total: int, branch: int, nodes: Sequence[Node]) -> bool:
    """Does an add make attention scores?

    Args:
        total: The node of the sum.
        branch: The node of its branch operand.
        nodes: Of the whole forward.
    """
    return _is_product(branch, nodes) and _only_softmax_reads(total, nodes)


def _is_product(index: int, nodes: Sequence[Node]) -> bool:
    node = nodes[index]
    while node.op in VALUE_OPS | SCALE_OPS and len(data_inputs(node, nodes)) == 1:
        node = nodes[data_inputs(node, nodes)[0]]
    return is_product_of_data(node, nodes)


def _only_softmax_reads(index: int, nodes: Sequence[Node]) -> bool:
    scores, read = {index}, False
    for later in range(index + 1, len(nodes)):
        node = nodes[later]
        if not scores.isdisjoint(node.inputs):
            if node.op in _SOFTMAX:
                read = True
            elif node.op in _ON_SCORES:
                scores.add(node.index)
            else:
                return False
    return read
