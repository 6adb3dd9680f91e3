"""Trace <-> a versioned JSON file, and the rows every table is made from.

A row is a plain dict, one key a column of :mod:`gradflow.columns`, in that order; a cell is a string, an
integer, a float, a bool, or ``None`` for *not measured*.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from gradflow.atomic_files import write_text
from gradflow.errors import TraceFileError
from gradflow.findings import Finding
from gradflow.plain_values import from_plain, to_plain
from gradflow.trace_model import (
    SCHEMA_VERSION,
    GraphCut,
    LayerRecord,
    OverwrittenSkip,
    ParameterRecord,
    ResidualRecord,
    TensorStatistics,
    Trace,
)

Cell: TypeAlias = str | int | float | bool | None
Row: TypeAlias = dict[str, Cell]

_NOTHING_MEASURED = TensorStatistics()


def save(trace: Trace, path: str | Path) -> None:
    """Write a trace; the file appears whole or not at all.

    Raises:
        TraceFileError: The file cannot be written there.
    """
    write_text(path, dumps(trace))


def load(path: str | Path) -> Trace:
    """Read a trace that :func:`save` wrote.

    Raises:
        TraceFileError: There is no such file, or it is not a trace this version understands.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise TraceFileError(
            f"cannot read {path}: {reason}; `gradflow inspect TARGET --csv DIR` writes DIR/trace.json"
        ) from error
    return loads(text, name=str(path))


def dumps(trace: Trace) -> str:
    """A trace as JSON text; NaN and infinities become the strings "NaN", "Infinity", "-Infinity"."""
    plain = to_plain(trace)
    ordered = {"schema": plain.pop("schema"), **plain}
    return json.dumps(ordered, allow_nan=False, indent=1) + "\n"


def loads(text: str, *, name: str = "the trace") -> Trace:
    """JSON text as a trace; the exact inverse of :func:`dumps`.

    Args:
        text: What :func:`dumps` returned.
        name: What to call the text in an error.

    Raises:
        TraceFileError: It is not JSON, not a trace, or of another schema version.
    """
    try:
        plain = json.loads(text)
    except json.JSONDecodeError as error:
        raise TraceFileError(f"{name} is not JSON ({error}); was it cut short? Record it again") from error
    _check_schema(plain, name)
    try:
        return from_plain(Trace, plain)
    except (KeyError, TypeError, ValueError) as error:
        raise TraceFileError(f"{name} is a damaged trace ({error}); record it again") from error


def _check_schema(plain: Any, name: str) -> None:
    if isinstance(plain, dict) and "findings" in plain:
        raise TraceFileError(
            f"{name} is a report, not a trace; "
            "`gradflow inspect TARGET --csv DIR` writes the trace as DIR/trace.json"
        )
    if not isinstance(plain, dict) or "schema" not in plain or "trunk" not in plain:
        raise TraceFileError(f"{name} is not a gradflow trace; give the trace.json that --csv DIR writes")
    if plain["schema"] != SCHEMA_VERSION:
        raise TraceFileError(
            f"{name} has schema version {plain['schema']} and this gradflow reads {SCHEMA_VERSION}; "
            "record it again, or read it with the gradflow named under run.gradflow_version"
        )


def shape_text(shape: tuple[int, ...], dtype: str, *, times: str = "x") -> str:
    """(8, 3, 32, 32) -> "8x3x32x32"; "scalar" for a 0-d tensor, "" where there is no tensor."""
    if shape:
        return times.join(str(size) for size in shape)
    return "scalar" if dtype else ""


def layer_rows(trace: Trace) -> list[Row]:
    """One row a layer record, in execution order; columns: :data:`gradflow.columns.LAYER_COLUMNS`."""
    return [_layer_row(layer) for layer in trace.layers]


def parameter_rows(trace: Trace) -> list[Row]:
    """One row a parameter; columns: :data:`gradflow.columns.PARAMETER_COLUMNS`."""
    return [_parameter_row(parameter) for parameter in trace.parameters]


def residual_rows(trace: Trace) -> list[Row]:
    """One row a residual site; columns: :data:`gradflow.columns.RESIDUAL_COLUMNS`."""
    return [_residual_row(residual) for residual in trace.residuals]


def finding_rows(findings: Iterable[Finding]) -> list[Row]:
    """One row a finding; columns: :data:`gradflow.columns.FINDING_COLUMNS`."""
    return [
        {
            "rule": finding.rule,
            "slug": finding.slug,
            "severity": finding.severity.value,
            "location": str(finding.location),
            "value": finding.value,
            "threshold": finding.threshold,
            "message": finding.message,
            "hint": finding.hint,
            "consequence_of": finding.consequence_of,
        }
        for finding in findings
    ]


def _layer_row(layer: LayerRecord) -> Row:
    activation = layer.activation or _NOTHING_MEASURED
    return {
        "order": layer.order,
        "name": layer.name,
        "call": layer.call,
        "output": layer.output,
        "type": layer.type,
        "shape": shape_text(layer.shape, layer.dtype),
        "dtype": layer.dtype,
        "coverage": layer.coverage.value,
        "activation_mean": activation.mean,
        "activation_std": activation.std,
        "activation_rms": activation.rms,
        "activation_absmax": activation.absmax,
        "activation_zero_fraction": activation.zero_fraction,
        "activation_nonfinite": activation.nonfinite,
        "signal": activation.signal,
        "common_mode": activation.common_mode,
        "gradient_norm": layer.gradient_norm,
        "gradient_nonfinite": layer.gradient_nonfinite,
        "sample": activation.sample,
        "note": layer.note,
    }


def _parameter_row(parameter: ParameterRecord) -> Row:
    cut = parameter.cut or GraphCut(op="", module="", where="", source="")
    return {
        "name": parameter.name,
        "aliases": ";".join(parameter.aliases),
        "module": parameter.module,
        "shape": shape_text(parameter.shape, parameter.dtype),
        "dtype": parameter.dtype,
        "coverage": parameter.coverage.value,
        "norm": parameter.norm,
        "gradient_norm": parameter.gradient_norm,
        "gradient_nonfinite": parameter.gradient_nonfinite,
        "elasticity": parameter.elasticity,
        "gradient_ratio": parameter.gradient_ratio,
        "value_nonfinite": parameter.value_nonfinite,
        "module_type": parameter.module_type,
        "requires_grad": parameter.requires_grad,
        "in_optimizer": parameter.in_optimizer,
        "cut_op": cut.op,
        "cut_module": cut.module,
        "cut_where": cut.where,
        "cut_source": cut.source,
        "update_ratio": parameter.update_ratio,
        "update_lost": parameter.update_lost,
        "gradient_to_eps": parameter.gradient_to_eps,
        "underflow": parameter.underflow,
    }


def _residual_row(residual: ResidualRecord) -> Row:
    return {
        "order": residual.order,
        "name": residual.name,
        "index": residual.index,
        "call": residual.call,
        "kind": residual.kind,
        "source": residual.source,
        "shape": shape_text(residual.shape, "float"),
        "skip_norm": residual.skip_norm,
        "branch_norm": residual.branch_norm,
        "rho": residual.rho,
        "cosine": residual.cosine,
        "block_influence": residual.block_influence,
        "gradient_norm": residual.gradient_norm,
        "source_gradient_norm": residual.source_gradient_norm,
        "branch_scale": residual.branch_scale,
        "branches": residual.branches,
        "parent": residual.parent,
        "span": residual.span,
        "gradient_ratio": residual.gradient_ratio,
        "std": residual.std,
        "source_std": residual.source_std,
        "skip_scale": residual.skip_scale,
        "in_place": residual.in_place,
        "branch_ops": ";".join(residual.branch_ops),
        "shortcut_ops": ";".join(residual.shortcut_ops),
        "branch_parameters": ";".join(residual.branch_parameters),
        "opened_by": ";".join(residual.opened_by),
        "broadcast": residual.broadcast,
        "like": residual.like,
        **_overwritten_cells(residual.overwritten),
        "angular_distance": residual.angular_distance,
        "source_variance": residual.source_variance,
        "variance": residual.variance,
        "skip_gradient_norm": residual.skip_gradient_norm,
        "branch_gradient_norm": residual.branch_gradient_norm,
        "gradient_cosine": residual.gradient_cosine,
        "branch_gain": residual.branch_gain,
        "path_share": residual.path_share,
        "split_note": residual.split_note,
        "previous": residual.previous,
        "norm_placement": residual.norm_placement,
        "activation_after": residual.activation_after,
        "added_by": residual.added_by,
        "resets_stream": residual.resets_stream,
        "shortcut": ";".join(residual.shortcut),
        "branch_factors": ";".join(residual.branch_factors),
        "overwritten_change": None if residual.overwritten is None else residual.overwritten.change,
        "overwritten_distance": None if residual.overwritten is None else residual.overwritten.distance,
    }


def _overwritten_cells(overwritten: OverwrittenSkip | None) -> Row:
    if overwritten is None:
        cells: Row = {"op": "", "name": "", "source": "", "rebound": None}
    else:
        cells = {
            "op": overwritten.op,
            "name": overwritten.name,
            "source": overwritten.source,
            "rebound": overwritten.rebound,
        }
    return {f"overwritten_{key}": cell for key, cell in cells.items()}
