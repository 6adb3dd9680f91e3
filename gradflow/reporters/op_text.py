"""What a branch consists of, in a few characters: ``LN 3·lin attn lin``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

_SHORT = {
    "layer_norm": "LN",
    "rms_norm": "RMS",
    "batch_norm": "BN",
    "group_norm": "GN",
    "instance_norm": "IN",
    "addmm": "lin",
    "linear": "lin",
    "conv1d": "conv",
    "conv2d": "conv",
    "conv3d": "conv",
    "conv_transpose1d": "convT",
    "conv_transpose2d": "convT",
    "conv_transpose3d": "convT",
    "scaled_dot_product_attention": "attn",
    "multi_head_attention_forward": "attn",
    "avg_pool2d": "pool",
    "max_pool2d": "pool",
    "adaptive_avg_pool2d": "pool",
}
_ARITHMETIC = """
cat stack neg sub rsub pad cumsum repeat repeat_interleave where masked_fill mean pow rsqrt clamp exp zeros_like sum
sin cos sqrt square var tril triu roll
"""
_DULL = frozenset(_ARITHMETIC.split())
"""Arithmetic between the layers, which says nothing at this distance."""
_PIECES = (
    (("matmul", "softmax", "matmul"), "attn"),
    (("bmm", "softmax", "bmm"), "attn"),
    (("pow", "mean", "rsqrt"), "RMS"),
    (("pow", "tanh"), "gelu"),
)


def branch_text(ops: Sequence[str]) -> str:
    """The layers, norms and nonlinearities among the ops, repeats counted; "…" where ops were left out."""
    rest = len(ops) > 1 and ops[-1].endswith(" more")
    names = [_SHORT.get(op, op) for op in _joined(ops[:-1] if rest else ops) if op not in _DULL]
    counted = [(name, len(list(run))) for name, run in groupby(names)]
    words = [name if count == 1 else f"{count}·{name}" for name, count in counted]
    return " ".join([*words, "…"] if rest else words)


def _joined(ops: Sequence[str]) -> list[str]:
    """Ops with those that make up a known layer together replaced by its name."""
    found: list[str] = []
    at = 0
    while at < len(ops):
        for piece, name in _PIECES:
            if tuple(ops[at : at + len(piece)]) == piece:
                found.append(name)
                at += len(piece)
                break
        else:
            found.append(ops[at])
            at += 1
    return found
