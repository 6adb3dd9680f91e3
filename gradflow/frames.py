"""Rows -> a pandas DataFrame whose types do not depend on what happened to be measured."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from gradflow.columns import Column, Kind
from gradflow.trace_file import Row

_DTYPES = {
    Kind.TEXT: "object",
    Kind.INTEGER: "Int64",
    Kind.NUMBER: "float64",
    Kind.BOOLEAN: "boolean",
}


def frame(rows: Sequence[Row], columns: Sequence[Column]) -> pd.DataFrame:
    """A DataFrame with exactly these columns; not measured is NaN (numbers), NA (integers, booleans), ""."""
    return pd.DataFrame({column.name: _series(rows, column) for column in columns})


def _series(rows: Sequence[Row], column: Column) -> pd.Series:
    absent = "" if column.kind is Kind.TEXT else None
    cells = [absent if row[column.name] is None else row[column.name] for row in rows]
    return pd.Series(cells, dtype=_DTYPES[column.kind], name=column.name)
