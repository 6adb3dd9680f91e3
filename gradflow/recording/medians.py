"""Several steps -> one: every number becomes its median over the steps that measured it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from gradflow.recording.records import StepRecord
from gradflow.trace_model import (
    ActivationRecord,
    AttentionRecord,
    BatchNormRecord,
    Coverage,
    LayerRecord,
    ParameterRecord,
    ResidualRecord,
    TensorStatistics,
    Trunk,
    TrunkPoint,
)

RecordT = TypeVar(
    "RecordT",
    LayerRecord,
    ParameterRecord,
    ActivationRecord,
    ResidualRecord,
    BatchNormRecord,
    AttentionRecord,
)
CoveredT = TypeVar("CoveredT", LayerRecord, ParameterRecord)

STATISTICS = tuple(field.name for field in fields(TensorStatistics))
LAYER_NUMBERS = ("gradient_norm", "gradient_nonfinite")
POINT_NUMBERS = (*LAYER_NUMBERS, "token_signal", "token_common_mode")
TRUNK_NUMBERS = ("token_geometry",)
PARAMETER_NUMBERS = (
    "norm",
    "gradient_norm",
    "gradient_nonfinite",
    "elasticity",
    "gradient_ratio",
    "value_nonfinite",
)
SITE_NUMBERS = (
    "skip_norm",
    "branch_norm",
    "rho",
    "cosine",
    "block_influence",
    "gradient_norm",
    "source_gradient_norm",
    "gradient_ratio",
    "branch_scale",
    "skip_scale",
    "std",
    "source_std",
    "angular_distance",
    "source_variance",
    "variance",
    "skip_gradient_norm",
    "branch_gradient_norm",
    "gradient_cosine",
    "branch_gain",
    "path_share",
)
ACTIVATION_NUMBERS = ("inactive", "sunk", "always_active", "dormant", "saturated", "stuck")
BATCH_NORM_NUMBERS = ("low_variance", "mean_shift", "deviation_ratio")
WORST = frozenset({"nonfinite", "gradient_nonfinite", "value_nonfinite"})
"""Counts of NaN and Inf are not averaged away: the largest stands."""


def median_step(steps: Sequence[StepRecord]) -> StepRecord:
    """Join rows by name, call and output; a row that only some steps have is kept."""
    if len(steps) == 1:
        return steps[0]
    losses = [step.loss for step in steps if step.loss is not None]
    return StepRecord(
        layers=_renumbered(_joined([step.layers for step in steps], _layer_key, _median_layer)),
        parameters=_joined([step.parameters for step in steps], lambda row: row.name, _median_parameter),
        trunk=_median_trunk([step.trunk for step in steps]),
        residuals=_joined([step.residuals for step in steps], site_key, _median_site),
        activations=_joined([step.activations for step in steps], _activation_key, _median_activation),
        loss=statistics.median(losses) if losses else None,
        side_trunks=_median_side_trunks([step.side_trunks for step in steps]),
        batch_norms=_joined([step.batch_norms for step in steps], _call_key, _median_batch_norm),
        attentions=_joined([step.attentions for step in steps], _call_key, _median_attention),
        notes=tuple(dict.fromkeys(note for step in steps for note in step.notes)),
    )


def _median_attention(rows: Sequence[AttentionRecord]) -> AttentionRecord:
    heads = zip(*(row.entropies for row in rows), strict=False)
    return replace(
        rows[0],
        entropies=tuple(statistics.median(head) for head in heads),
        largest_logit=max(row.largest_logit for row in rows),
    )


def _call_key(row: BatchNormRecord | AttentionRecord) -> Hashable:
    return (row.name, row.call)


def _median_batch_norm(rows: Sequence[BatchNormRecord]) -> BatchNormRecord:
    return replace(rows[0], **_medians(rows, BATCH_NORM_NUMBERS))


def _activation_key(row: ActivationRecord) -> Hashable:
    return (row.name, row.call, row.index, row.op)


def site_key(row: ResidualRecord) -> Hashable:
    """What is the same for a site in every step."""
    return (row.name, row.call, row.index, row.kind)


def _median_site(rows: Sequence[ResidualRecord]) -> ResidualRecord:
    return replace(rows[0], **_medians(rows, SITE_NUMBERS))


def _layer_key(row: LayerRecord) -> Hashable:
    return (row.name, row.call, row.output)


def _joined(
    tables: Sequence[Sequence[RecordT]],
    key: Callable[[RecordT], Hashable],
    merge: Callable[[Sequence[RecordT]], RecordT],
) -> tuple[RecordT, ...]:
    groups: dict[Hashable, list[RecordT]] = {}
    for table in tables:
        for row in table:
            groups.setdefault(key(row), []).append(row)
    return tuple(merge(group) for group in groups.values())


def _renumbered(rows: Sequence[LayerRecord]) -> tuple[LayerRecord, ...]:
    """Rows never called stay last."""
    ordered = sorted(rows, key=lambda row: row.coverage is Coverage.NEVER_CALLED)
    return tuple(replace(row, order=order) for order, row in enumerate(ordered))


def _most_covered(rows: Sequence[CoveredT]) -> CoveredT:
    """A step that measured the row speaks for it."""
    return min(rows, key=lambda row: row.coverage is not Coverage.MEASURED)


def _median_layer(rows: Sequence[LayerRecord]) -> LayerRecord:
    activations = [row.activation for row in rows if row.activation is not None]
    return replace(
        _most_covered(rows),
        activation=_median_statistics(activations),
        **_medians(rows, LAYER_NUMBERS),
    )


def _median_activation(rows: Sequence[ActivationRecord]) -> ActivationRecord:
    return replace(rows[0], **_medians(rows, ACTIVATION_NUMBERS))


def _median_parameter(rows: Sequence[ParameterRecord]) -> ParameterRecord:
    return replace(_most_covered(rows), **_medians(rows, PARAMETER_NUMBERS))


def _median_statistics(found: Sequence[TensorStatistics]) -> TensorStatistics | None:
    return TensorStatistics(**_medians(found, STATISTICS)) if found else None


def _median_trunk(trunks: Sequence[Trunk]) -> Trunk:
    """Medians along the trunk of the first step; steps that took another path are left out."""
    first = trunks[0]
    names = [point.name for point in first.points]
    alike = [trunk for trunk in trunks if [point.name for point in trunk.points] == names]
    points = tuple(_median_point(points) for points in zip(*(trunk.points for trunk in alike), strict=True))
    return replace(first, points=points, **_medians(alike, TRUNK_NUMBERS))


def _median_side_trunks(steps: Sequence[Sequence[Trunk]]) -> tuple[Trunk, ...]:
    """Medians of each side trunk of the first step, over the steps that have it."""
    found = []
    for first in steps[0]:
        names = [point.name for point in first.points]
        alike = [t for step in steps for t in step if [point.name for point in t.points] == names]
        found.append(_median_trunk(alike))
    return tuple(found)


def _median_point(points: Sequence[TrunkPoint]) -> TrunkPoint:
    activations = [point.activation for point in points if point.activation is not None]
    return replace(points[0], activation=_median_statistics(activations), **_medians(points, POINT_NUMBERS))


def _medians(rows: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: _median(name, [getattr(row, name) for row in rows]) for name in names}


def _median(name: str, values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    if not measured:
        return None
    if name in WORST or name == "sample":
        return max(measured)
    return statistics.median(measured)
