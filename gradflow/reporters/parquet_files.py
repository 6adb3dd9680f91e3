"""The report's tables as Parquet: the rows of the CSV files, with their types."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from gradflow import trace_file
from gradflow.ablation_rows import ablation_rows
from gradflow.atomic_files import write_folder
from gradflow.columns import (
    ABLATION_COLUMNS,
    FINDING_COLUMNS,
    LAYER_COLUMNS,
    PARAMETER_COLUMNS,
    RESIDUAL_COLUMNS,
    Column,
    Kind,
)
from gradflow.errors import UsageError
from gradflow.report import Report
from gradflow.trace_file import Row

if TYPE_CHECKING:
    import pandas as pd

SUFFIX = ".parquet"

_Rows: TypeAlias = Callable[[Report], list[Row]]
_TABLES: Mapping[str, tuple[_Rows, Sequence[Column]]] = {
    "layers": (lambda report: trace_file.layer_rows(report.trace), LAYER_COLUMNS),
    "residuals": (lambda report: trace_file.residual_rows(report.trace), RESIDUAL_COLUMNS),
    "ablation": (lambda report: ablation_rows(report.trace), ABLATION_COLUMNS),
    "parameters": (lambda report: trace_file.parameter_rows(report.trace), PARAMETER_COLUMNS),
    "findings": (lambda report: trace_file.finding_rows(report.findings), FINDING_COLUMNS),
}


def check_installed() -> None:
    """Raise where Parquet could not be written; cheap, so that it can run before a long recording.

    Raises:
        UsageError: pyarrow is not installed.
    """
    if find_spec("pyarrow") is None:
        raise UsageError(
            "Parquet is written by pyarrow, which is not installed: "
            "pip install 'torch-gradflow[parquet]', or write CSV"
        )


def table_of(path: str | Path) -> str:
    """Which table a file name asks for: "residuals" for residuals.parquet, layers for any other."""
    stem = Path(path).stem
    return stem if stem in _TABLES else "layers"


def render(report: Report, table: str = "layers") -> bytes:
    """One table as the content of a Parquet file. Text is never null; what was not measured is.

    Raises:
        UsageError: pyarrow is not installed.
    """
    from gradflow.frames import frame

    check_installed()
    rows, columns = _TABLES[table]
    content = io.BytesIO()
    _storable(frame(rows(report), columns), columns).to_parquet(content, engine="pyarrow", index=False)
    return content.getvalue()


def write(report: Report, directory: str | Path) -> None:
    """Write every table into a folder, together or not at all; residuals and ablation only where there are any.

    Raises:
        UsageError: pyarrow is not installed.
        TraceFileError: The folder cannot be made or written to.
    """
    absent = set() if report.trace.residuals else {"residuals"}
    absent |= set() if report.trace.ablation else {"ablation"}
    tables = [name for name in _TABLES if name not in absent]
    write_folder(directory, {f"{name}{SUFFIX}": render(report, name) for name in tables})


def _storable(table: pd.DataFrame, columns: Sequence[Column]) -> pd.DataFrame:
    """Text as UTF-8 can hold it: a lone surrogate becomes its escape, as in the CSV files."""
    for name in (column.name for column in columns if column.kind is Kind.TEXT):
        table[name] = [text.encode("utf-8", "backslashreplace").decode("utf-8") for text in table[name]]
    return table
