"""The many spellings of a sum of two tensors: what each op adds, term by term.

``torch.add(x, f, alpha=a)`` adds x and a f, ``torch.lerp(x, f, w)`` adds (1 - w) x and w f, ``torch.addmm(x, h, W)``
adds x and h W. A term is what is truly added, however much of it the op makes by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradflow.recording.residual_ops import ADD_OPS, MATRIX_SUMS, SUB_OPS, WEIGHTED_SUMS
from gradflow.recording.tensor_stats import is_transformed

Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One of the two things that an op adds: a number times a tensor, or times a product of two.

    Attributes:
        tensors: As they were handed to the op.
        product: How two of them are multiplied: "mul", "mm" or "bmm"; "" for one.
        factor: The number.
        complement: The second one enters as 1 minus itself.
    """

    tensors: tuple[Tensor, ...]
    product: str = ""
    factor: float = 1.0
    complement: bool = False

    @property
    def bare(self) -> bool:
        """The op adds a tensor that it was handed, as it is."""
        return not self.product and self.factor == 1.0

    def shape(self) -> Sequence[int]:
        """Of what is added."""
        first, *rest = self.tensors
        if not rest:
            return first.shape
        if self.product == "mul":
            return _broadcast(first.shape, rest[0].shape)
        return (*first.shape[:-1], rest[0].shape[-1])

    def value(self) -> Tensor:
        """What is added, but for the factor; a product is computed, and not kept."""
        first, *rest = (tensor.detach() for tensor in self.tensors)
        if not rest:
            return first
        other = 1 - rest[0] if self.complement else rest[0]
        return first * other if self.product == "mul" else first @ other


def _broadcast(first: Sequence[int], second: Sequence[int]) -> Sequence[int]:
    """Of two shapes that an op is about to multiply; what does not fit is for the op to say."""
    length = max(len(first), len(second))
    padded = [(1,) * (length - len(shape)) + tuple(shape) for shape in (first, second)]
    return tuple(b if a == 1 else a for a, b in zip(*padded, strict=True))


def sum_terms(op: str, args: Arguments, kwargs: Keywords) -> tuple[Term, Term] | None:
    """What an op adds; None where it does not add two tensors, or its operands cannot be read."""
    named = dict(kwargs or {})
    if op in ADD_OPS or op in SUB_OPS:
        terms = _plain(args, named, -1.0 if op in SUB_OPS else 1.0)
    elif op in WEIGHTED_SUMS:
        terms = _weighted(op, args, named)
    elif op in MATRIX_SUMS:
        terms = _matrix(op, args, named)
    else:
        return None
    if terms is None or any(is_transformed(tensor) for term in terms for tensor in term.tensors):
        return None
    return terms


def _plain(args: Arguments, named: dict[str, Any], sign: float) -> tuple[Term, Term] | None:
    values = _tensors((*args[:2], *(named[name] for name in ("input", "other") if name in named)), 2)
    factor = _number(named.get("alpha", 1))
    if values is None or factor is None:
        return None
    return Term(tensors=values[:1]), Term(tensors=values[1:], factor=sign * factor)


def _weighted(op: str, args: Arguments, named: dict[str, Any]) -> tuple[Term, Term] | None:
    if op.startswith("addcmul"):
        values = _tensors(_filled(args, named, ("input", "tensor1", "tensor2")), 3)
        factor = _number(named.get("value", 1))
        if values is None or factor is None:
            return None
        return Term(tensors=values[:1]), Term(tensors=values[1:], product="mul", factor=factor)
    filled = _filled(args, named, ("input", "end", "weight"))
    weight = filled[-1] if len(filled) == 3 else None
    ends = _tensors(filled[:2], 2)
    if ends is None:
        return None
    start, end = ends
    if isinstance(weight, Tensor):
        return (
            Term(tensors=(start, weight), product="mul", complement=True),
            Term(tensors=(end, weight), product="mul"),
        )
    number = _number(weight)
    if number is None:
        return None
    return Term(tensors=(start,), factor=1.0 - number), Term(tensors=(end,), factor=number)


def _matrix(op: str, args: Arguments, named: dict[str, Any]) -> tuple[Term, Term] | None:
    batched = op.startswith("baddbmm")
    names = ("input", "batch1", "batch2") if batched else ("input", "mat1", "mat2")
    values = _tensors(_filled(args, named, names), 3)
    alpha, beta = _number(named.get("alpha", 1)), _number(named.get("beta", 1))
    if values is None or alpha is None or not beta:
        return None  # beta=0 drops the first operand
    product = "bmm" if batched else "mm"
    return Term(tensors=values[:1], factor=beta), Term(tensors=values[1:], product=product, factor=alpha)


def _filled(args: Arguments, named: dict[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    """Positional arguments first, then those given by name."""
    return (*args[: len(names)], *(named[name] for name in names[len(args) :] if name in named))


def _tensors(values: Sequence[Any], count: int) -> tuple[Tensor, ...] | None:
    found = tuple(value for value in values if isinstance(value, Tensor))
    return found if len(found) == len(values) == count else None


def _number(value: Any) -> float | None:
    """A real number; an op may be given a tensor of no dimension in its place, and reading one would wait for it."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if real and math.isfinite(value) else None
