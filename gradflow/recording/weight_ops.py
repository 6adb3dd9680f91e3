"""Which ops are weight layers: linear, convolution, recurrent and attention ops fed by a parameter."""

from __future__ import annotations

from collections.abc import Sequence

from gradflow.recording.dataflow import Node

LINEAR_OPS = frozenset({"linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "bilinear"})
LINEAR_OPS |= {"einsum", "__matmul__", "__rmatmul__", "tensordot", "dot"}
CONV_OPS = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
)
CONV_OPS |= {"_conv_forward", "conv_tbc", "deform_conv2d"}
RECURRENT_OPS = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell"})
RECURRENT_OPS |= {"rnn_tanh_cell", "rnn_relu_cell"}
ATTENTION_OPS = frozenset({"multi_head_attention_forward", "_native_multi_head_attention"})
LAYER_OPS = LINEAR_OPS | CONV_OPS
WEIGHT_OPS = LAYER_OPS | RECURRENT_OPS | ATTENTION_OPS
NORM_OPS = frozenset(
    {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm"}
)


def is_weight_op(node: Node, nodes: Sequence[Node]) -> bool:
    """True where a weight, direct or computed (a parametrisation), meets values that are not weights only.

    A product of two tensors that both come from the input (attention scores) is no weight layer.
    """
    if node.op not in WEIGHT_OPS or not node.from_parameter:
        return False
    if node.parameters:
        return True
    return any(nodes[i].from_parameter and not nodes[i].from_data for i in node.inputs)


def weights_of(node: Node, nodes: Sequence[Node]) -> frozenset[int]:
    """The parameters behind a weight layer's weight: ids of those consumed, or that it is computed from."""
    if node.parameters:
        return frozenset(node.parameters)
    found: set[int] = set()
    seen: set[int] = set()
    waiting = list(node.inputs)
    while waiting:
        index = waiting.pop()
        source = nodes[index]
        if index not in seen and source.from_parameter and not source.from_data:
            seen.add(index)
            found.update(source.parameters)
            waiting.extend(source.inputs)
    return frozenset(found)
