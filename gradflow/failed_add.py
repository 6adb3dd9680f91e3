"""A residual add that failed for its shapes: what is known of it, in plain values, and the error that carries it."""

from __future__ import annotations

from dataclasses import dataclass

from gradflow.errors import ModelError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeChange:
    """One layer or op that gave a dimension the size at which skip and branch disagree."""

    name: str
    """Fully qualified name of the layer, or of the module whose forward runs the op."""
    op: str
    """"conv2d", "linear", "max_pool2d", "__getitem__" ..."""
    sizes: tuple[tuple[int, int, int], ...]
    """Dimension of the add, size before, size after; empty where the number of dimensions changed."""
    on_shortcut: bool = False
    """It stands on the skip, not in the branch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedAdd:
    """Why ``x + F(x)`` could not be added, and what would let it."""

    name: str
    """Fully qualified name of the module whose forward adds; "" for the root."""
    source: str
    """"model.py:31" of the add, or ""."""
    place: str
    """"models/net.py:31", relative to the working folder where it lies below it; "" where there is no file."""
    skip_shape: Shape
    branch_shape: Shape
    changes: tuple[ShapeChange, ...]
    """Who made the shapes differ, in execution order; empty where nobody could be found."""
    projection: str
    """Code of the module that turns what the skip starts from into the branch's shape; "" where none can."""
    instead: str
    """What to do where no projection can mend it; "" where one can."""
    has_shortcut: bool = False
    """Something stands on the skip already: the projection goes in its place."""


class ResidualShapeError(ModelError):
    """The model raised at a residual add whose operands cannot be added.

    Attributes:
        failed_add: What is known of it.
    """

    def __init__(self, message: str, failed_add: FailedAdd, *, trace_text: str = "") -> None:
        super().__init__(message, trace_text=trace_text)
        self.failed_add = failed_add


def sentence(failed: FailedAdd) -> str:
    """Which block, both shapes, and who changed them; no period at the end."""
    at = f" ({failed.source})" if failed.source else ""
    said = (
        f"The skip of {failed.name or 'the model'}{at} is {_words(failed.skip_shape)} and its branch "
        f"{_words(failed.branch_shape)}, which cannot be added"
    )
    changes = " and ".join(_change(change) for change in failed.changes)
    return f"{said}: {changes}" if changes else said


def advice(failed: FailedAdd) -> str:
    """What would mend it, as code where a projection can; an imperative, no period at the end."""
    if not failed.projection:
        return failed.instead
    if failed.has_shortcut:
        return f"Make the shortcut fit: self.shortcut = {failed.projection}"
    return f"Give the skip a projection: self.shortcut = {failed.projection}, and add self.shortcut(x)"


def _words(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "a scalar"


def _change(change: ShapeChange) -> str:
    who = f"{change.name or 'the model'} ({change.op.strip('_')})"
    side = " on the shortcut" if change.on_shortcut else ""
    if not change.sizes:
        return f"{who}{side} changes the number of dimensions"
    by_sizes: dict[tuple[int, int], list[str]] = {}
    for dimension, before, after in change.sizes:
        by_sizes.setdefault((before, after), []).append(str(dimension))
    parts = [
        f"dimension{'s' if len(dims) > 1 else ''} {' and '.join(dims)} from {before} to {after}"
        for (before, after), dims in by_sizes.items()
    ]
    return f"{who}{side} takes {', '.join(parts)}"
