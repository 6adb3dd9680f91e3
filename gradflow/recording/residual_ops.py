"""Which ops leave a value what it is, which a shortcut may hold, and which bend it."""

from __future__ import annotations

from collections.abc import Sequence

from gradflow.recording.dataflow import Node
from gradflow.recording.weight_ops import NORM_OPS, is_weight_op

ADD_OPS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
SUB_OPS = frozenset({"sub", "sub_", "__sub__", "__isub__", "subtract", "subtract_"})
WEIGHTED_SUMS = frozenset({"addcmul", "addcmul_", "lerp", "lerp_"})
MATRIX_SUMS = frozenset({"addmm", "addmm_", "baddbmm", "baddbmm_"})
STACKED_SUMS = frozenset({"sum", "mean"})
"""Of the dimension along which tensors were stacked."""
_MEASURES = "pow __pow__ square abs norm vector_norm linalg_vector_norm linalg_norm linalg_matrix_norm"
MEASURE_OPS = frozenset(_MEASURES.split())
"""What a difference is read by that is an error and no stream."""
SUM_OPS = ADD_OPS | SUB_OPS | WEIGHTED_SUMS | MATRIX_SUMS | STACKED_SUMS
"""Ops that may add a skip and a branch."""
CONCAT_OPS = frozenset({"cat", "concat", "concatenate"})
SCALE_OPS = frozenset(
    {
        "mul",
        "mul_",
        "__mul__",
        "__rmul__",
        "__imul__",
        "multiply",
        "div",
        "div_",
        "__truediv__",
        "true_divide",
    }
)
DIVISIONS = frozenset({"div", "div_", "__truediv__", "true_divide"})
PRODUCT_OPS = frozenset({"matmul", "__matmul__", "bmm", "baddbmm", "einsum"})
"""Matrix products, of two tensors of the data or of one and a weight."""

LOOKUPS = frozenset({"embedding", "embedding_bag"})
"""Ops that turn ids into activations."""

_VALUE = """
to float half bfloat16 double type type_as contiguous view reshape flatten unflatten squeeze unsqueeze view_as
reshape_as clone permute transpose t T mT movedim swapaxes moveaxis detach data chunk split __getitem__ narrow
roll alias expand expand_as dropout dropout_ dropout1d dropout2d dropout3d feature_dropout alpha_dropout
unbind select index_select requires_grad_ squeeze_ unsqueeze_ as_strided
"""
VALUE_OPS = frozenset(_VALUE.split())
"""The same values: moved, cast, sliced or thinned out."""
COPY_OPS = frozenset({"alias", "clone", "contiguous"})
"""The same values in the same places."""

_SHORTCUT = """
pad constant_pad_nd avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d
adaptive_avg_pool2d adaptive_avg_pool3d cat interpolate upsample pixel_unshuffle
"""
SHAPING_OPS = frozenset(_SHORTCUT.split())
"""What a projection shortcut may use besides, to make its shape fit."""

_LINEAR = "sub rsub neg mean sum zeros_like stack where masked_fill masked_fill_ fill_ copy_ __setitem__"
_SUMS = ADD_OPS | SUB_OPS | WEIGHTED_SUMS
STRAIGHT_OPS = VALUE_OPS | SHAPING_OPS | _SUMS | SCALE_OPS | NORM_OPS | frozenset(_LINEAR.split())
"""Ops that bend nothing: a branch of these and weight layers alone is one linear map."""


def counts_as_branch(node: Node, nodes: Sequence[Node]) -> bool:
    """A weight layer, or a normalisation that owns a parameter: what makes a branch a branch."""
    return is_weight_op(node, nodes) or (node.op in NORM_OPS and bool(node.parameters))


def is_nonlinear(node: Node, nodes: Sequence[Node]) -> bool:
    """Neither a weight layer nor one of the ops that bend nothing."""
    return node.op not in STRAIGHT_OPS and not is_weight_op(node, nodes)


def is_product_of_data(node: Node, nodes: Sequence[Node]) -> bool:
    """A matrix product of two tensors that both come from the model's input: attention scores, say."""
    return node.op in PRODUCT_OPS and not node.parameters and len(data_inputs(node, nodes)) > 1


def data_inputs(node: Node, nodes: Sequence[Node]) -> list[int]:
    """The inputs of an op that come from the model's input."""
    return [i for i in node.inputs if nodes[i].from_data]
