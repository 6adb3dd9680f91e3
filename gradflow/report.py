"""The answer: a recording, what the rules say about it, and the ways to take it away."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gradflow.config import Config
from gradflow.findings import Finding, Severity
from gradflow.repair_outcomes import RepairOutcome
from gradflow.trace_model import Trace
from gradflow.trunk_profile import TrunkProfile, profile

if TYPE_CHECKING:
    import pandas as pd

    from gradflow.stream_profile import StreamProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One recording with its findings; ``print(report)`` shows it as ``gradflow inspect`` does.

    pandas and the reporters are imported by the methods that need them, never with this module.
    """

    trace: Trace
    findings: tuple[Finding, ...]
    """Worst first, a consequence after its cause."""
    profile: TrunkProfile
    config: Config = field(default_factory=Config)
    """What it was judged by."""
    repairs: tuple[RepairOutcome, ...] = ()
    """Repairs that were tried, the best first; empty where none were asked for."""
    name: str = ""
    """Of the target in pyproject.toml; empty for one that has none."""

    @property
    def label(self) -> str:
        """What a reader of several reports knows this one by: the name, else the target as it was given."""
        return self.name or self.trace.run.target

    @property
    def side_profiles(self) -> tuple[tuple[str, TrunkProfile], ...]:
        """Path and profile of each trunk beside the main one: ("input_ids → loss", TrunkProfile(...))."""
        return tuple((trunk.path, profile(trunk)) for trunk in self.trace.side_trunks)

    @property
    def worst(self) -> Severity | None:
        """The highest severity among the findings; None without findings."""
        return max((finding.severity for finding in self.findings), key=lambda s: s.rank, default=None)

    def fails(self, threshold: Severity | None) -> bool:
        """Whether a finding that no baseline knows is at or above ``threshold``; never for None."""
        return threshold is not None and any(
            finding.severity.rank >= threshold.rank for finding in self.findings if not finding.known
        )

    @property
    def layers(self) -> pd.DataFrame:
        """One row a floating output and call of a layer; columns and units in ``docs/csv.md``."""
        from gradflow.columns import LAYER_COLUMNS
        from gradflow.frames import frame
        from gradflow.trace_file import layer_rows

        return frame(layer_rows(self.trace), LAYER_COLUMNS)

    @property
    def residuals(self) -> pd.DataFrame:
        """One row a residual site; columns and units in ``docs/csv.md``."""
        from gradflow.columns import RESIDUAL_COLUMNS
        from gradflow.frames import frame
        from gradflow.trace_file import residual_rows

        return frame(residual_rows(self.trace), RESIDUAL_COLUMNS)

    @property
    def parameters(self) -> pd.DataFrame:
        """One row a parameter, tied ones once; columns and units in ``docs/csv.md``."""
        from gradflow.columns import PARAMETER_COLUMNS
        from gradflow.frames import frame
        from gradflow.trace_file import parameter_rows

        return frame(parameter_rows(self.trace), PARAMETER_COLUMNS)

    @property
    def ablation(self) -> pd.DataFrame:
        """One row a branch that was left out, empty without ``ablate``; columns and units in ``docs/csv.md``."""
        from gradflow.ablation_rows import ablation_rows
        from gradflow.columns import ABLATION_COLUMNS
        from gradflow.frames import frame

        return frame(ablation_rows(self.trace), ABLATION_COLUMNS)

    @property
    def streams(self) -> tuple[StreamProfile, ...]:
        """Every residual stream, the longest first: growth, ranking, effective depth, path lengths."""
        from gradflow.stream_profile import stream_profiles

        return stream_profiles(self.trace)

    @property
    def stream(self) -> StreamProfile | None:
        """The longest residual stream; None for a model without a residual site."""
        return next(iter(self.streams), None)

    def anatomy(self, width: int = 80, *, show_all: bool = False) -> str:
        """The model as its residual blocks, as ``gradflow anatomy`` shows it.

        Args:
            width: Columns of the text, 60 at least.
            show_all: Every block on a line of its own, every stream and every ablated branch.
        """
        from gradflow.reporters import anatomy
        from gradflow.reporters.screen import NARROWEST, Screen

        return anatomy.render(self, Screen(width=max(width, NARROWEST), show_all=show_all)).rstrip("\n")

    def to_csv(self, directory: str | Path, *, byte_order_mark: bool = False) -> None:
        """Write layers.csv, parameters.csv, findings.csv, trace.json, and what else there is a table for.

        residuals.csv where the model has residual sites, ablation.csv where their branches were left out.

        Args:
            directory: A folder; made if it is missing. The files appear together or not at all.
            byte_order_mark: Lead each table with one, for spreadsheets that need it to read UTF-8.

        Raises:
            TraceFileError: The folder cannot be made or written to.
        """
        from gradflow.reporters import csv_files

        csv_files.write(self, directory, byte_order_mark=byte_order_mark)

    def to_parquet(self, directory: str | Path) -> None:
        """Write the tables that :meth:`to_csv` writes, as Parquet.

        Args:
            directory: A folder; made if it is missing. The files appear together or not at all.

        Raises:
            UsageError: pyarrow is not installed.
            TraceFileError: The folder cannot be made or written to.
        """
        from gradflow.reporters import parquet_files

        parquet_files.write(self, directory)

    def to_json(self, path: str | Path) -> None:
        """Write the whole report as one JSON object (``schema``, ``run``, ``profile`` and flat arrays).

        Raises:
            TraceFileError: The file cannot be written.
        """
        from gradflow.atomic_files import write_text
        from gradflow.reporters import json_file

        write_text(path, json_file.render(self))

    def __str__(self) -> str:
        from gradflow.reporters import terminal
        from gradflow.reporters.screen import Screen

        return terminal.render(self, Screen(width=80)).rstrip("\n")
