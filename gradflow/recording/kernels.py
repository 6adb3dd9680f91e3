"""Passes over tensors in C (``kernels.c``), where they were compiled when gradflow was installed.

Each takes a tensor once where stock ops take it three to six times, on one core, without waking others, and sums in
double precision. They read dense tensors on the CPU; of anything else, and of tensors with a NaN or an Inf in them,
they say None, and the caller asks stock ops. ``GRADFLOW_KERNELS=0`` has them always say so.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from bisect import bisect_left
from collections.abc import Sequence
from ctypes import byref, c_double, c_int, c_ssize_t, c_uint32, c_void_p, sizeof
from itertools import accumulate, pairwise
from pathlib import Path
from threading import Thread
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn

LIBRARY = Path(__file__).with_name("_kernels.dll" if sys.platform == "win32" else "_kernels.so")
"""Made by hatch_build.py."""
SOURCE = "kernels.c"
SWITCH = "GRADFLOW_KERNELS"
WORTH_A_THREAD = 2_000_000
"""Elements: to start a thread costs about what reading a tenth of them does."""
MOST_THREADS = 4
"""More do not make memory faster."""

_KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_PLAIN = frozenset({Tensor, nn.Parameter})
"""Of a subclass nobody knows where its values are."""
_SIGNATURES = {
    "square": (c_void_p, c_ssize_t, c_int),
    "moments": (c_void_p, c_ssize_t, c_int, c_void_p),
    "products": (c_void_p, c_void_p, c_ssize_t, c_int, c_void_p),
    "row_products": (c_void_p, c_ssize_t, c_void_p, c_ssize_t, c_ssize_t, c_ssize_t, c_int, c_void_p),
    "squares": (c_void_p, c_void_p, c_void_p, c_ssize_t, c_void_p),
    "units": (
        *(c_void_p, c_ssize_t, c_ssize_t, c_ssize_t, c_ssize_t, c_int, c_double),
        *(c_void_p, c_void_p, c_void_p),
    ),
    "survey": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    "rectifier": (c_void_p, c_void_p, c_void_p),
}
_RESULTS = {"square": c_double, "survey": c_int}


class _Functions(NamedTuple):
    square: ctypes._NamedFuncPointer
    moments: ctypes._NamedFuncPointer
    products: ctypes._NamedFuncPointer
    row_products: ctypes._NamedFuncPointer
    squares: ctypes._NamedFuncPointer
    units: ctypes._NamedFuncPointer
    survey: ctypes._NamedFuncPointer
    rectifier: ctypes._NamedFuncPointer


def load(library: Path = LIBRARY) -> _Functions | None:
    """The compiled functions; None where there are none of this source that load here, or they are switched off."""
    if os.environ.get(SWITCH) == "0" or not library.exists():
        return None
    try:
        loaded = ctypes.CDLL(str(library))
        if c_uint32.in_dll(loaded, "gradflow_source").value != crc32(library.with_name(SOURCE).read_bytes()):
            return None
        functions = _Functions(*(getattr(loaded, f"gradflow_{name}") for name in _Functions._fields))
    except (OSError, AttributeError, ValueError):
        return None
    for function, (name, signature) in zip(functions, _SIGNATURES.items(), strict=True):
        function.argtypes = signature
        function.restype = _RESULTS.get(name)
    return functions


_functions = load()


def is_loaded() -> bool:
    """Tell whether the compiled passes run in this process."""
    return _functions is not None


def _pointer(tensor: Tensor) -> int:
    """Where the values are; 0 where they cannot be read from memory as they stand."""
    if not tensor.is_cpu or type(tensor) not in _PLAIN or tensor.dtype not in _KINDS:
        return 0
    if tensor.layout is not torch.strided or tensor.is_neg() or tensor._is_zerotensor():
        return 0
    return tensor.data_ptr()


def square(flat: Tensor) -> float | None:
    """The sum of squares of a tensor in one dimension without gaps, or of any contiguous one; None: ask stock ops."""
    if _functions is None or not (pointer := _pointer(flat)):
        return None
    found: float = _functions.square(pointer, flat.numel(), _KINDS[flat.dtype])
    return found if found < math.inf else None


def squares(tensors: Sequence[Tensor]) -> list[float | None]:
    """The same of many contiguous tensors, on as many threads as torch runs where they are large."""
    if _functions is None:
        return [None] * len(tensors)
    count = len(tensors)
    places = [_pointer(tensor) for tensor in tensors]
    sizes = [tensor.numel() if place else 0 for tensor, place in zip(tensors, places, strict=True)]
    arrays = (
        (c_void_p * count)(*places),
        (c_ssize_t * count)(*sizes),
        (c_int * count)(*(_KINDS.get(tensor.dtype, 0) for tensor in tensors)),
    )
    found = (c_double * count)()

    def measure(begin: int, end: int) -> None:
        starts = (byref(array, begin * sizeof(array._type_)) for array in arrays)
        _functions.squares(*starts, end - begin, byref(found, begin * sizeof(c_double)))

    first, *others = _shares(sizes)
    threads = [Thread(target=measure, args=share) for share in others]
    for thread in threads:
        thread.start()
    measure(*first)
    for thread in threads:
        thread.join()
    return [value if place and value < math.inf else None for place, value in zip(places, found, strict=True)]


def _shares(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of about equally many elements, a thread each; one where waking a thread costs more than it saves."""
    ends = list(accumulate(sizes, initial=0))
    count = max(1, min(torch.get_num_threads(), MOST_THREADS, ends[-1] // WORTH_A_THREAD))
    cuts = [bisect_left(ends, ends[-1] * share / count) for share in range(count)] + [len(sizes)]
    return list(pairwise(cuts))


class Moments(NamedTuple):
    """Of one tensor."""

    total: float
    square: float
    low: float
    high: float


def moments(flat: Tensor) -> Moments | None:
    """Sum, sum of squares and extremes of a tensor in one dimension without gaps."""
    if _functions is None or not flat.numel() or not (pointer := _pointer(flat)):
        return None
    found = (c_double * 4)()
    _functions.moments(pointer, flat.numel(), _KINDS[flat.dtype], found)
    return Moments(*found) if found[1] < math.inf else None


def _places(a: Tensor, b: Tensor) -> tuple[int, int] | None:
    """Where two tensors of one type are, if both can be read."""
    here, there = _pointer(a), _pointer(b)
    return (here, there) if here and there and a.dtype is b.dtype else None


def products(a: Tensor, b: Tensor) -> tuple[float, float, float] | None:
    """Squared norms of two tensors in one dimension without gaps, and their inner product."""
    if _functions is None or (places := _places(a, b)) is None:
        return None
    found = (c_double * 3)()
    _functions.products(*places, a.numel(), _KINDS[a.dtype], found)
    first, second, both = found
    return (first, second, both) if first + second < math.inf else None


def row_products(a: Tensor, b: Tensor) -> Tensor | None:
    """The same of each pair of rows of [rows, elements]: float64 [3, rows]."""
    if _functions is None or (places := _places(a, b)) is None:
        return None
    here, there = places
    if a.stride(1) != 1 or b.stride(1) != 1:
        return None
    rows, elements = a.shape
    found = torch.empty((3, rows), dtype=torch.float64, device="cpu")
    _functions.row_products(
        *(here, a.stride(0), there, b.stride(0), rows, elements, _KINDS[a.dtype], found.data_ptr())
    )
    return found if math.isfinite(found.sum().item()) else None


def units(matrix: Tensor, depth: float, active: Tensor, sunk: Tensor) -> list[float] | None:
    """Reduce [samples, units] over samples, whatever its strides.

    Args:
        matrix: At least one sample and one unit.
        depth: How many standard deviations below 0 the mean of a sunk unit is.
        active: float32 [units], to be written to: how many samples are not 0.
        sunk: bool [units], to be written to.

    Returns:
        The mean; the variance over samples, averaged over units; the variance over units of their means; the mean
        square of those means; the largest magnitude; how many elements are not 0. None: ask stock ops.
    """
    if _functions is None or not (pointer := _pointer(matrix)):
        return None
    (rows, count), (by_row, by_unit) = matrix.shape, matrix.stride()
    found = (c_double * 6)()
    _functions.units(
        *(pointer, rows, by_row, count, by_unit, _KINDS[matrix.dtype], depth),
        *(found, active.data_ptr(), sunk.data_ptr()),
    )
    return found[:] if found[1] + found[3] < math.inf else None


class Survey(ctypes.Structure):
    """How the tensors of one shape and type, without gaps, are measured: ``kernels.c`` has the same."""

    _fields_ = (
        ("n", c_ssize_t),
        ("offset", c_ssize_t),
        ("rows", c_ssize_t),
        ("by_row", c_ssize_t),
        ("units", c_ssize_t),
        ("by_unit", c_ssize_t),
        ("depth", c_double),
        ("kind", c_int),
        ("sampled", c_int),
    )


def survey_of(values: Tensor, matrix: Tensor, depth: float, *, sampled: bool) -> Survey | None:
    """Plan to measure tensors like ``values``, of which ``matrix`` is a view or a sample; None: it cannot be.

    Args:
        values: Contiguous.
        matrix: [samples, units] of them, all of them or some.
        depth: As for ``units``.
        sampled: The matrix is a sample: measure sum, norm and extremes of all.
    """
    if not _pointer(values) or matrix.untyped_storage().data_ptr() != values.untyped_storage().data_ptr():
        return None
    (rows, units), (by_row, by_unit) = matrix.shape, matrix.stride()
    return Survey(
        n=values.numel(),
        offset=matrix.storage_offset() - values.storage_offset(),
        rows=rows,
        by_row=by_row,
        units=units,
        by_unit=by_unit,
        depth=depth,
        kind=_KINDS[values.dtype],
        sampled=sampled,
    )


def survey(values: Tensor, how: Survey, rows: tuple[int, int] | None) -> list[float] | None:
    """Measure a contiguous tensor as planned.

    Args:
        values: Shaped and laid out as planned.
        how: The plan.
        rows: Where ``active`` and ``sunk`` of ``units`` are to be written to; None for neither.

    Returns:
        The six numbers of ``units``; of a tensor that is sampled, the four of ``Moments`` too. None: ask stock
        ops.
    """
    if _functions is None or not (pointer := _pointer(values)):
        return None
    found = (c_double * 10)()
    finite = _functions.survey(pointer, byref(how), found, *(rows or (None, None)))
    return found[:] if finite else None


class Grid(ctypes.Structure):
    """Where the pre-activations of a rectifier lie, in tensors of one shape: ``kernels.c`` has the same."""

    _fields_ = (
        ("offset", c_ssize_t),
        ("outer", c_ssize_t),
        ("by_outer", c_ssize_t),
        ("units", c_ssize_t),
        ("by_unit", c_ssize_t),
        ("inner", c_ssize_t),
        ("by_inner", c_ssize_t),
        ("depth", c_double),
        ("least", c_double),
        ("kind", c_int),
        ("asks_sunk", c_int),
    )


def grid_of(values: Tensor, drawn: Tensor, *, depth: float, least: float, asks_sunk: bool) -> Grid | None:
    """Plan to count the units of tensors like ``values``; None: they cannot be read.

    Args:
        values: Contiguous.
        drawn: [outer, units, inner] of them, all or some.
        depth: As for ``units``.
        least: A unit is inactive that is positive in a smaller share of its observations.
        asks_sunk: Say which share of the units is sunk.
    """
    if not _pointer(values) or drawn.untyped_storage().data_ptr() != values.untyped_storage().data_ptr():
        return None
    (outer, units, inner), (by_outer, by_unit, by_inner) = drawn.shape, drawn.stride()
    return Grid(
        offset=drawn.storage_offset() - values.storage_offset(),
        outer=outer,
        by_outer=by_outer,
        units=units,
        by_unit=by_unit,
        inner=inner,
        by_inner=by_inner,
        depth=depth,
        least=least,
        kind=_KINDS[values.dtype],
        asks_sunk=asks_sunk,
    )


def rectifier(values: Tensor, grid: Grid) -> list[float] | None:
    """Shares of inactive, always active and sunk units (NaN: not asked), and the observations that count."""
    if _functions is None or not (pointer := _pointer(values)):
        return None
    found = (c_double * 4)()
    _functions.rectifier(pointer, byref(grid), found)
    return found[:]
