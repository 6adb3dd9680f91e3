"""Two folders of tables -> what moved between them, and by how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gradflow.columns import Column, Kind
from gradflow.row_alignment import AlignedBy, AlignedPair, RowIdentity, align
from gradflow.table_folder import TABLES, TableFolder
from gradflow.trace_file import Cell, Row

SAME = 1.001
"""Up to this factor a number counts as unchanged: less than a run on another machine differs by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One number of one row, before and after."""

    column: str
    a: float | None
    b: float | None
    ratio: float | None
    """b / a; None where one was not measured, 1 where both are zero or both NaN, Inf for a zero that grew."""

    @property
    def factor(self) -> float:
        """How far it moved, whichever way: 1 for not at all, Inf for what appeared, vanished, broke or turned."""
        if self.a is None and self.b is None:
            return 1.0
        if self.ratio is None or not math.isfinite(self.ratio) or self.ratio <= 0:
            return math.inf
        return max(self.ratio, 1 / self.ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowDiff:
    """A row of either table with its partner."""

    label_a: str
    """"" where the row is only in b."""
    label_b: str
    by: AlignedBy
    facts: tuple[tuple[str, Cell, Cell], ...]
    """What else is shown: column, before, after."""
    changes: tuple[Change, ...]
    """One a number column; empty for a row without a partner."""
    moved: Change | None
    """The number that moved most; None where none moved beyond :data:`SAME`."""

    @property
    def factor(self) -> float:
        """How far the row moved: that of ``moved``, Inf where its coverage changed, 1 for not at all."""
        return math.inf if self.changed else self.moved.factor if self.moved else 1.0

    @property
    def changed(self) -> tuple[tuple[str, Cell, Cell], ...]:
        """Of the facts, those that make a row another one: its coverage, its kind, its severity."""
        if self.by in (AlignedBy.ONLY_A, AlignedBy.ONLY_B):
            return ()
        return tuple(fact for fact in self.facts if fact[0] in _TELLING and fact[1] != fact[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class TableDiff:
    """One table of both folders."""

    name: str
    rows: tuple[RowDiff, ...]
    """What moved most first; then the rows of one folder alone, then what did not move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderDiff:
    """All tables of two folders."""

    a: str
    b: str
    tables: tuple[TableDiff, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """How the rows of one table are known and shown."""

    key: tuple[str, ...]
    make: tuple[str, ...]
    label: Callable[[Row], str]
    facts: tuple[str, ...]
    same_make: bool = False


_TELLING = {"coverage", "kind", "severity"}
_SIGNED = {"activation_mean", "cosine", "gradient_cosine"}
"""They cross zero by chance, so their ratio says nothing about how far they moved."""


def _layer_label(row: Row) -> str:
    call = f" call {row['call']}" if row["call"] else ""
    output = f" [{row['output']}]" if row["output"] else ""
    return f"{row['name'] or '(model)'}{call}{output}"


def _site_label(row: Row) -> str:
    call = f" call {row['call']}" if row["call"] else ""
    return f"{row['name'] or '(model)'}[{row['index'] or 0}]{call}"


_SHAPES: Mapping[str, _Shape] = {
    "layers": _Shape(
        key=("name", "call", "output"),
        make=("type",),
        label=_layer_label,
        facts=("type", "shape", "coverage"),
    ),
    "residuals": _Shape(
        key=("name", "index", "call"), make=("kind",), label=_site_label, facts=("kind", "source", "shape")
    ),
    "parameters": _Shape(
        key=("name",),
        make=("module_type", "shape"),
        label=lambda row: str(row["name"]),
        facts=("shape", "coverage"),
    ),
    "findings": _Shape(
        key=("rule", "location"),
        make=("rule",),
        label=lambda row: f"{row['rule']} {row['slug']} at {row['location'] or '(model)'}",
        facts=("severity", "message"),
        same_make=True,
    ),
}


def diff_folders(a: TableFolder, b: TableFolder) -> FolderDiff:
    """Align the rows of each table and say what moved.

    Args:
        a: The folder before.
        b: The folder after.
    """
    tables = tuple(_table(name, a.tables[name], b.tables[name]) for name in TABLES)
    return FolderDiff(a=a.path, b=b.path, tables=tables)


def number_columns(table: str) -> tuple[Column, ...]:
    """The columns that get a ratio."""
    return tuple(column for column in TABLES[table] if column.kind is Kind.NUMBER)


def fact_columns(table: str) -> tuple[str, ...]:
    """The columns that are shown beside them."""
    return _SHAPES[table].facts


def _table(name: str, a: Sequence[Row], b: Sequence[Row]) -> TableDiff:
    shape = _SHAPES[name]
    pairs = align(
        [_identity(row, shape) for row in a], [_identity(row, shape) for row in b], same_make=shape.same_make
    )
    rows = [_row(pair, a, b, name) for pair in pairs]
    return TableDiff(name=name, rows=tuple(sorted(rows, key=_rank)))


def _identity(row: Row, shape: _Shape) -> RowIdentity:
    make: Hashable = tuple(row[column] for column in shape.make)
    return RowIdentity(name=tuple(row[column] for column in shape.key), make=make)


def _rank(row: RowDiff) -> tuple[int, float]:
    if row.by in (AlignedBy.ONLY_A, AlignedBy.ONLY_B):
        return 1, 0.0
    return (0, -row.factor) if row.factor > SAME else (2, 0.0)


def _row(pair: AlignedPair, a: Sequence[Row], b: Sequence[Row], table: str) -> RowDiff:
    shape = _SHAPES[table]
    before, after = None if pair.a is None else a[pair.a], None if pair.b is None else b[pair.b]
    changes = () if before is None or after is None else tuple(_changes(before, after, table))
    judged = [change for change in changes if change.column not in _SIGNED and change.factor > SAME]
    return RowDiff(
        label_a="" if before is None else shape.label(before),
        label_b="" if after is None else shape.label(after),
        by=pair.by,
        facts=tuple((fact, _cell(before, fact), _cell(after, fact)) for fact in shape.facts),
        changes=changes,
        moved=max(judged, key=lambda change: change.factor, default=None),
    )


def _cell(row: Row | None, column: str) -> Cell:
    return None if row is None else row[column]


def _changes(before: Row, after: Row, table: str) -> Iterator[Change]:
    for column in number_columns(table):
        a, b = _number(before[column.name]), _number(after[column.name])
        yield Change(column=column.name, a=a, b=b, ratio=ratio(a, b))


def _number(cell: Cell) -> float | None:
    return None if cell is None else float(cell)


def ratio(a: float | None, b: float | None) -> float | None:
    """b / a; None where one was not measured, 1 for equal ones, a signed Inf for a zero that grew."""
    if a is None or b is None:
        return None
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 1.0
    if a == 0:
        return math.copysign(math.inf, b) if not math.isnan(b) else math.nan
    return b / a
