"""The columns of every table gradflow writes: one list for CSV, JSON, DataFrames and ``docs/csv.md``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a cell holds when it is not empty."""

    TEXT = "text"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its name, what it holds, and its unit."""

    name: str
    kind: Kind
    unit: str
    """"" for text and for plain counts of nothing; "share" for 0..1."""


def _text(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name, Kind.TEXT, "") for name in names)


def _integer(unit: str, *names: str) -> tuple[Column, ...]:
    return tuple(Column(name, Kind.INTEGER, unit) for name in names)


def _number(unit: str, *names: str) -> tuple[Column, ...]:
    return tuple(Column(name, Kind.NUMBER, unit) for name in names)


_ACTIVATION = "activation"
_LOSS_PER_ACTIVATION = "loss / activation"
_PARAMETER = "parameter"
_LOSS_PER_PARAMETER = "loss / parameter"

LAYER_COLUMNS: tuple[Column, ...] = (
    *_integer("position", "order"),
    *_text("name"),
    *_integer("position", "call"),
    *_text("output", "type", "shape", "dtype", "coverage"),
    *_number(_ACTIVATION, "activation_mean", "activation_std", "activation_rms", "activation_absmax"),
    *_number("share", "activation_zero_fraction"),
    *_integer("elements", "activation_nonfinite"),
    *_number(_ACTIVATION, "signal"),
    *_number("share", "common_mode"),
    *_number(_LOSS_PER_ACTIVATION, "gradient_norm"),
    *_integer("elements", "gradient_nonfinite", "sample"),
    *_text("note"),
)

RESIDUAL_COLUMNS: tuple[Column, ...] = (
    *_integer("position", "order"),
    *_text("name"),
    *_integer("position", "index", "call"),
    *_text("kind", "source", "shape"),
    *_number(_ACTIVATION, "skip_norm", "branch_norm"),
    *_number("ratio", "rho", "cosine", "block_influence"),
    *_number(_LOSS_PER_ACTIVATION, "gradient_norm", "source_gradient_norm"),
    *_number("ratio", "branch_scale"),
    *_integer("branches", "branches"),
    *_integer("position", "parent"),
    *_integer("weight layers", "span"),
    *_number("ratio", "gradient_ratio"),
    *_number(_ACTIVATION, "std", "source_std"),
    *_number("ratio", "skip_scale"),
    Column("in_place", Kind.BOOLEAN, ""),
    *_text("branch_ops", "shortcut_ops", "branch_parameters", "opened_by"),
    Column("broadcast", Kind.BOOLEAN, ""),
    *_text("like", "overwritten_op", "overwritten_name", "overwritten_source"),
    Column("overwritten_rebound", Kind.BOOLEAN, ""),
    *_number("share", "angular_distance"),
    *_number("activation²", "source_variance", "variance"),
    *_number(_LOSS_PER_ACTIVATION, "skip_gradient_norm", "branch_gradient_norm"),
    *_number("ratio", "gradient_cosine", "branch_gain"),
    *_number("share", "path_share"),
    *_text("split_note"),
    *_integer("position", "previous"),
    *_text("norm_placement", "activation_after", "added_by"),
    Column("resets_stream", Kind.BOOLEAN, ""),
    *_text("shortcut", "branch_factors"),
    *_number("ratio", "overwritten_change", "overwritten_distance"),
)

ABLATION_COLUMNS: tuple[Column, ...] = (
    *_integer("position", "order"),
    *_text("name"),
    *_integer("position", "index", "call"),
    *_text("kind"),
    *_integer("samples", "samples"),
    *_number("loss", "loss_change", "loss_change_low", "loss_change_high"),
    *_number("ratio", "relative_change", "output_change"),
    *_text("verdict"),
    *_integer("position", "removal"),
    *_number("loss", "removal_loss_change"),
    *_number("ratio", "removal_output_change"),
    *_text("note"),
)

PARAMETER_COLUMNS: tuple[Column, ...] = (
    *_text("name", "aliases", "module", "shape", "dtype", "coverage"),
    *_number(_PARAMETER, "norm"),
    *_number(_LOSS_PER_PARAMETER, "gradient_norm"),
    *_integer("elements", "gradient_nonfinite"),
    *_number("loss", "elasticity"),
    *_number("loss / parameter²", "gradient_ratio"),
    *_integer("elements", "value_nonfinite"),
    *_text("module_type"),
    Column("requires_grad", Kind.BOOLEAN, ""),
    Column("in_optimizer", Kind.BOOLEAN, ""),
    *_text("cut_op", "cut_module", "cut_where", "cut_source"),
    *_number("ratio", "update_ratio"),
    *_number("share", "update_lost"),
    *_number("ratio", "gradient_to_eps"),
    *_number("share", "underflow"),
)

FINDING_COLUMNS: tuple[Column, ...] = (
    *_text("rule", "slug", "severity", "location"),
    *_number("of the rule", "value", "threshold"),
    *_text("message", "hint", "consequence_of"),
)
