"""Frozen values by the hundred.

A frozen dataclass sets each field through ``object.__setattr__``: a record of twenty fields takes six times as long to
make as one that may still be changed.
"""

from __future__ import annotations

from copy import copy
from dataclasses import fields, make_dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def drafting(kind: type[T]) -> type[T]:
    """A class that is called like a frozen one with slots, and makes its values: written first, then frozen.

    What it makes are values of ``kind`` itself. Where Python does not let a value change its class, this is ``kind``.
    """

    def freeze(self: Any) -> None:
        self.__class__ = kind

    draft = make_dataclass(
        kind.__name__,
        [(field.name, Any, copy(field)) for field in fields(kind)],  # type: ignore[arg-type]
        namespace={"__post_init__": freeze},
        slots=True,
        kw_only=True,
        eq=False,
        repr=False,
    )
    try:
        freeze(object.__new__(draft))
    except TypeError:
        return kind
    return draft
