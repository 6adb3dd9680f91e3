"""Frozen values <-> what JSON can hold, without loss.

JSON has no NaN and no infinity, so these floats become the strings "NaN", "Infinity" and "-Infinity"; the
field's declared type tells them from text on the way back.
"""

from __future__ import annotations

import math
import types
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

Value = TypeVar("Value")


def spell(number: float) -> float | str:
    """A finite number unchanged, or "NaN", "Infinity", "-Infinity"."""
    if math.isfinite(number):
        return number
    if math.isnan(number):
        return "NaN"
    return "Infinity" if number > 0 else "-Infinity"


def to_plain(value: Any) -> Any:
    """A dataclass, tuple, mapping or scalar as dicts, lists and scalars that JSON can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, StrEnum):
        return value.value
    return spell(value) if isinstance(value, float) else value


def from_plain(kind: type[Value], plain: Any) -> Value:
    """The value of type ``kind`` that :func:`to_plain` made ``plain`` from.

    Keys that ``kind`` does not know are left out (a later version has more); absent ones take their default.

    Raises:
        KeyError: A field without a default is absent.
        TypeError, ValueError: A value does not fit its field.
    """
    return cast(Value, _decode(kind, plain))


def _decode(kind: Any, plain: Any) -> Any:
    if isinstance(kind, types.UnionType):
        return None if plain is None else _decode(_without_none(kind), plain)
    if get_origin(kind) is tuple:
        return _decode_tuple(get_args(kind), plain)
    if is_dataclass(kind):
        return _decode_dataclass(kind, plain)
    if issubclass(kind, StrEnum):
        return kind(plain)
    if kind is float and isinstance(plain, int | float | str) and not isinstance(plain, bool):
        return float(plain)
    if type(plain) is not kind:
        raise TypeError(f"{plain!r} where a {kind.__name__} belongs")
    return plain


def _decode_tuple(kinds: tuple[Any, ...], plain: Any) -> tuple[Any, ...]:
    if not isinstance(plain, list):
        raise TypeError(f"{plain!r} where a list belongs")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_decode(kinds[0], item) for item in plain)
    return tuple(_decode(kind, item) for kind, item in zip(kinds, plain, strict=True))


def _decode_dataclass(kind: Any, plain: Any) -> Any:
    if not isinstance(plain, dict):
        raise TypeError(f"{plain!r} where a {kind.__name__} belongs")
    return kind(**{name: _decode(hint, plain[name]) for name, hint in _hints(kind).items() if name in plain})


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _without_none(kind: types.UnionType) -> Any:
    (only,) = [member for member in get_args(kind) if member is not types.NoneType]
    return only
