"""What the two non-finite rules share: who is to blame, and what helps against which op."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradflow.trace_model import LayerRecord, NonFiniteOrigin, Trace

LOG_HINT = (
    "Keep its argument away from 0: log_softmax instead of log(softmax), log1p, or clamp(min=eps) before it"
)
DIVISION_HINT = "Keep the divisor away from 0: add eps to it, or clamp(min=eps)"
ROOT_HINT = "Add eps under the root: sqrt(x + eps); its slope at 0 is infinite"
OVERFLOW_HINT = (
    "Bring the values into the dtype's range: normalise or scale its inputs, use bfloat16 or float32 for it"
)
SPREAD_HINT = "Add eps to the variance, and give it at least two samples: the spread of one is 0 / 0"
EDGE_HINT = "Clamp its argument inside the open interval, for example clamp(-1 + eps, 1 - eps)"

OP_HINTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("log", "log2", "log10", "log_", "xlogy", "logit"), LOG_HINT),
    (("div", "truediv", "true_divide", "reciprocal", "rsqrt", "normalize"), DIVISION_HINT),
    (("sqrt", "norm", "vector_norm", "linalg_vector_norm", "cdist", "hypot"), ROOT_HINT),
    (
        ("exp", "expm1", "cosh", "sinh", "square"),
        "Bound its argument: logsumexp or softmax instead of exp, or clamp(max=...) before it",
    ),
    (
        ("pow", "float_power"),
        "Keep the base positive for a fractional or negative exponent, or add eps to it",
    ),
    (
        ("softmax", "_softmax", "scaled_dot_product_attention", "log_softmax"),
        "Look for a row that is masked everywhere (softmax of only -inf is NaN): leave each row one key, or "
        "mask with a large finite number",
    ),
    (("std", "var", "std_mean", "var_mean", "batch_norm"), SPREAD_HINT),
    (("acos", "asin", "arccos", "arcsin", "atanh", "arctanh", "acosh"), EDGE_HINT),
    (
        ("where", "masked_fill"),
        "Make the branch that is not taken finite too: where() multiplies its infinite gradient by 0, NaN",
    ),
    (("linear", "conv1d", "conv2d", "conv3d", "matmul", "bmm", "mm", "addmm", "einsum"), OVERFLOW_HINT),
)
GENERAL_HINT = (
    "Look at that forward for a log, a division, a root, an exp or a fully masked softmax, and guard its "
    "argument with eps or clamp"
)


def op_hint(op: str) -> str:
    """What to try for the op that produced the value; general advice where the op is unknown."""
    bare = op.strip("_").lower()
    return next((hint for ops, hint in OP_HINTS if bare in ops or op in ops), GENERAL_HINT)


def producer(origin: NonFiniteOrigin) -> str:
    """Name the producer for a sentence: "log in head.norm (model.py:31)"."""
    module = origin.name or "the model's own forward"
    words = f"{origin.op} in {module}" if origin.op else module
    return f"{words} ({origin.source})" if origin.source else words


def neighbours(origin: NonFiniteOrigin, carriers: int, verb: str) -> str:
    """The end of a sentence: the clean side, and how many other modules the value went on to."""
    clean = (
        "" if origin.last_finite in ("", origin.name) else f"; the last finite one is {origin.last_finite}"
    )
    noun = "module" if carriers == 1 else "modules"
    return clean + (f"; {verb} {carriers} other {noun}" if carriers else "")


def origin_of(trace: Trace, phase: str) -> NonFiniteOrigin | None:
    """Return the origin that was recorded for a phase, or None."""
    return next((origin for origin in trace.origins if origin.phase == phase), None)


def innermost(rows: Sequence[LayerRecord]) -> list[LayerRecord]:
    """Leave out the modules that only pass on what a module inside them already has."""
    names = {row.name for row in rows}
    return [row for row in rows if not any(_holds(row.name, name) for name in names)]


def _holds(outer: str, inner: str) -> bool:
    return inner != outer and (not outer or inner.startswith(outer + "."))


def nonfinite_activations(trace: Trace) -> list[LayerRecord]:
    """The rows whose activation holds a NaN or Inf, in execution order."""
    rows = [row for row in trace.layers if row.activation is not None and row.activation.nonfinite]
    return sorted(rows, key=lambda row: row.order)


def nonfinite_gradients(trace: Trace) -> list[LayerRecord]:
    """The rows whose gradient holds a NaN or Inf, in execution order."""
    return sorted((row for row in trace.layers if row.gradient_nonfinite), key=lambda row: row.order)


def loss_is_finite(trace: Trace) -> bool:
    """True also where there is no loss value (a probe)."""
    return all(math.isfinite(value) for value in trace.run.loss_values)
