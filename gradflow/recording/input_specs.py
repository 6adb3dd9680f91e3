"""The ``--input`` grammar: "8x3x32x32", "ids=4x128:int64:0..999"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gradflow.errors import InputError, UsageError

GRAMMAR = "[NAME=]SHAPE[:DTYPE[:LOW..HIGH]], as in 8x3x32x32 or ids=4x128:int64:0..999"

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float": torch.float32,
    "fp32": torch.float32,
    "float64": torch.float64,
    "double": torch.float64,
    "float16": torch.float16,
    "half": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
    "int64": torch.int64,
    "long": torch.int64,
    "int32": torch.int32,
    "int": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
FLOAT_DTYPES = tuple(name for name, dtype in DTYPES.items() if dtype.is_floating_point)

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER})\Z")
_LARGEST_ID = 9
"""Of integers without a range: small enough for nearly every table of embeddings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """One tensor to draw."""

    name: str | None
    """The forward's argument; None for the next positional one."""
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    """None: float32, or what ``--dtype`` says."""
    low: float | None = None
    high: float | None = None
    """The largest value, itself included for integers."""

    def draw(self, generator: torch.Generator, float_dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Draw the tensor on the CPU: N(0, 1) for floats without a range, uniform otherwise."""
        dtype = self.dtype or float_dtype
        try:
            return self._draw(generator, dtype)
        except RuntimeError as error:
            size = "x".join(map(str, self.shape))
            raise InputError(f"an input of {size} {dtype} cannot be made: {error}") from error

    def _draw(self, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
        if dtype == torch.bool:
            return torch.randint(0, 2, self.shape, generator=generator, device="cpu").bool()
        if not (dtype.is_floating_point or dtype.is_complex):
            low = int(self.low or 0)
            high = int(self.high) if self.high is not None else low + _LARGEST_ID
            return torch.randint(low, high + 1, self.shape, generator=generator, dtype=dtype, device="cpu")
        if self.low is None or self.high is None:
            wide = torch.complex64 if dtype.is_complex else torch.float32
            return torch.randn(self.shape, generator=generator, dtype=wide, device="cpu").to(dtype)
        uniform = torch.rand(self.shape, generator=generator, device="cpu")
        return (self.low + (self.high - self.low) * uniform).to(dtype)


def parse_input(text: str) -> InputSpec:
    """Read one ``--input`` value.

    Raises:
        InputError: It does not follow the grammar; the message shows it.
    """
    head, equals, body = text.strip().rpartition("=")
    name = head.strip() if equals else None
    shape, *rest = body.split(":")
    values = rest.pop() if rest and ".." in rest[-1] else None
    if len(rest) > 1:
        raise _bad(text, "it has too many parts")
    if name is not None and not name.isidentifier():
        raise _bad(text, f"{name!r} is not the name of an argument")
    low, high = _read_range(text, values)
    dtype = _read_dtype(text, rest[0] if rest else None)
    if dtype is None and low is not None and high is not None and low == int(low) and high == int(high):
        dtype = torch.int64
    return InputSpec(name=name, shape=_read_shape(text, shape), dtype=dtype, low=low, high=high)


def parse_inputs(texts: tuple[str, ...]) -> tuple[InputSpec, ...]:
    """Read every ``--input`` value, in order; a name may come once."""
    specs = tuple(parse_input(text) for text in texts)
    names = [spec.name for spec in specs if spec.name is not None]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--input {name}=… is given twice")
    return specs


def parse_float_dtype(text: str) -> torch.dtype:
    """Read ``--dtype``."""
    dtype = DTYPES.get(text.lower().removeprefix("torch."))
    if dtype is None or not dtype.is_floating_point:
        raise UsageError(f"--dtype {text!r} is not a floating dtype; one of {', '.join(FLOAT_DTYPES)}")
    return dtype


def _bad(text: str, why: str) -> InputError:
    return InputError(f"--input {text!r} cannot be read: {why}; the form is {GRAMMAR}")


def _read_shape(text: str, shape: str) -> tuple[int, ...]:
    if shape.strip().lower() in ("scalar", "()"):
        return ()
    # The header of a report writes shapes with ×, and a person may paste one.
    sizes = shape.lower().replace("×", "x").split("x")
    if not all(size.strip().isdecimal() for size in sizes):
        raise _bad(text, f"{shape!r} is not a shape of whole numbers joined by x (or `scalar`)")
    return tuple(int(size) for size in sizes)


def _read_dtype(text: str, dtype: str | None) -> torch.dtype | None:
    if not dtype:
        return None
    found = DTYPES.get(dtype.strip().lower().removeprefix("torch."))
    if found is None:
        raise _bad(text, f"{dtype!r} is not a dtype (one of {', '.join(DTYPES)})")
    return found


def _read_range(text: str, values: str | None) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    match = _RANGE.match(values.strip())
    if match is None:
        raise _bad(text, f"{values!r} is not a range LOW..HIGH")
    low, high = float(match["low"]), float(match["high"])
    if high < low:
        raise _bad(text, f"the range {values} ends before it begins")
    return low, high
