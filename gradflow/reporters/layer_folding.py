"""Layer rows of repeated blocks as one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradflow.findings import Severity
from gradflow.reporters.folding import Fold, Foldable, Marks, fold, unfold
from gradflow.trace_model import LayerRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layer records that are shown as one row."""

    label: str
    """"blocks.0–11.attn", "lstm[0]", "cell ×100"."""
    members: tuple[LayerRecord, ...]
    """In execution order, never empty."""
    mark: Severity | None
    """Of the finding that is about all of them."""


def fold_layers(layers: Sequence[LayerRecord], marks: Marks) -> list[LayerGroup]:
    """Group records, in the order of each group's first record.

    Siblings fold when they are numbered without a gap and hold the same types, shapes, coverage and marks, and
    break at the same places; so do the calls of one module.
    """
    return _groups(fold(_foldable(layers, marks)), layers, marks)


def unfolded(layers: Sequence[LayerRecord], marks: Marks) -> list[LayerGroup]:
    """A group for each record."""
    return _groups(unfold(_foldable(layers, marks)), layers, marks)


def _foldable(layers: Sequence[LayerRecord], marks: Marks) -> list[Foldable]:
    return [
        Foldable(
            name=layer.name,
            part=layer.output,
            call=layer.call,
            alike=(layer.type, layer.shape, layer.coverage, _broken(layer), marks.get(layer.order)),
        )
        for layer in layers
    ]


def _broken(layer: LayerRecord) -> tuple[bool, bool]:
    """Whether its activation and its gradient hold a NaN or Inf: one that does would hide all that do not."""
    return bool(layer.activation and layer.activation.nonfinite), bool(layer.gradient_nonfinite)


def _groups(folds: Sequence[Fold], layers: Sequence[LayerRecord], marks: Marks) -> list[LayerGroup]:
    return [
        LayerGroup(
            label=found.label,
            members=tuple(layers[at] for at in found.members),
            mark=marks.get(layers[found.members[0]].order),
        )
        for found in folds
    ]
