"""The options that several commands share, each spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from gradflow.findings import Severity

_TARGET, _RUN, _RULES, _OUTPUT = "Target", "Run", "Rules", "Output"

Target: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="path/to/model.py, path/to/model.py:NAME or package.module:NAME. NAME is a module, a class, "
        "or a function that returns one.",
        show_default=False,
    ),
]
Inputs: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SPEC",
        help="An input, repeatable: 8x3x32x32, or ids=4x128:int64:0..999. Without it: what the file offers, "
        "else inferred.",
        rich_help_panel=_TARGET,
    ),
]
Loss: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="LOSS",
        help="cross-entropy, mse, sum or probe. Without it: the file's loss(), the output's .loss, "
        "else probe.",
        rich_help_panel=_TARGET,
    ),
]
BatchSize: TypeAlias = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Samples in a batch.", rich_help_panel=_TARGET)
]
Checkpoint: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Load these weights first; implies --trained.", rich_help_panel=_TARGET
    ),
]
Trained: TypeAlias = Annotated[
    bool,
    typer.Option("--trained", help="The weights come from training: judge them so.", rich_help_panel=_TARGET),
]
Device: TypeAlias = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, mps.", rich_help_panel=_RUN)
]
Dtype: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="DTYPE", help="float32, float64, bfloat16, float16.", rich_help_panel=_RUN),
]
Seed: TypeAlias = Annotated[
    int,
    typer.Option(
        min=0,
        max=2**32 - 1,
        metavar="N",
        help="Of the weights, the inputs and dropout.",
        rich_help_panel=_RUN,
    ),
]
Steps: TypeAlias = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="Run N steps and show the medians.", rich_help_panel=_RUN),
]
Training: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--train/--eval", help="Put the model in this mode first; as found without it.", rich_help_panel=_RUN
    ),
]
Ablate: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="[each|greedy]",
        help="Also run the model without each branch, one forward each; greedy: and leave the least harmful out "
        "for good, again and again (L²/2 forwards).",
        rich_help_panel=_RUN,
    ),
]
AblateTop: TypeAlias = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Stop the greedy order after N removals.", rich_help_panel=_RUN),
]
Paths: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--paths",
        help="Also take the gradient apart, exactly, by how many branches it came through.",
        rich_help_panel=_RUN,
    ),
]
Select: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(metavar="CODES", help="Rules that may speak: GF101, GF1,GF3.", rich_help_panel=_RULES),
]
Ignore: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(metavar="CODES", help="Rules that may not; wins over --select.", rich_help_panel=_RULES),
]
Thresholds: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--threshold",
        metavar="NAME=NUMBER",
        help="Move a rule's limit, repeatable: GF101.gain.error=1e-6. gradflow explain GF101 lists them.",
        rich_help_panel=_RULES,
    ),
]
FailOn: TypeAlias = Annotated[
    Severity | None,
    typer.Option(
        case_sensitive=False, help="Exit with 1 for a finding this bad or worse.", rich_help_panel=_RULES
    ),
]
TryFixes: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--try-fixes",
        help="Apply candidate repairs in memory, measure again, and rank them by what they did.",
        rich_help_panel=_RUN,
    ),
]
Shattered: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--shattered",
        help="Also compare the gradients at the input and beside it (GF106).",
        rich_help_panel=_RUN,
    ),
]
Format: TypeAlias = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="table, json, csv, markdown, sarif, junit, github or gitlab.",
        rich_help_panel=_OUTPUT,
    ),
]
AnatomyFormat: TypeAlias = Annotated[
    str,
    typer.Option("--format", metavar="FORMAT", help="table, json, csv or markdown.", rich_help_panel=_OUTPUT),
]
Output: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write the report there instead of standard output; layers.parquet writes that table as Parquet.",
        rich_help_panel=_OUTPUT,
    ),
]
Csv: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Also write every table there as CSV (layers.csv, residuals.csv …), and trace.json.",
        rich_help_panel=_OUTPUT,
    ),
]
CsvBom: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--csv-bom",
        help="Lead the files of --csv with a byte-order mark, for spreadsheets that need one.",
        rich_help_panel=_OUTPUT,
    ),
]
ShowAll: TypeAlias = Annotated[
    bool, typer.Option("--all", help="Every layer, nothing folded.", rich_help_panel=_OUTPUT)
]
