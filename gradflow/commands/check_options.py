"""The options of ``check`` and ``config``; those that are not given stay None, so that the file may speak."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from gradflow.commands.threshold_option import thresholds_in
from gradflow.config_keys import Value, codes_in, near_miss, percentage
from gradflow.errors import UsageError
from gradflow.findings import Severity

_TARGET, _RUN, _RULES, _OUTPUT = "Target", "Run", "Rules", "Output"
_ACCEPTED = "Accepted findings and limits"

Targets: TypeAlias = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TARGET]...",
        help="Names of targets in pyproject.toml, or targets as inspect takes them. Without any: all targets "
        "of pyproject.toml.",
        show_default=False,
    ),
]
Trained: TypeAlias = Annotated[
    bool | None,
    typer.Option("--trained/--untrained", help="Judge the weights as trained.", rich_help_panel=_TARGET),
]
Shattered: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--shattered/--no-shattered",
        help="Also compare the gradients at the input and beside it (GF106).",
        rich_help_panel=_TARGET,
    ),
]
Seed: TypeAlias = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=2**32 - 1,
        metavar="N",
        help="Of the weights, the inputs and dropout.",
        rich_help_panel=_RUN,
    ),
]
Steps: TypeAlias = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Run N steps and judge the medians.", rich_help_panel=_RUN),
]
Seeds: TypeAlias = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Build and record with N seeds, for --max-regression and for a trace.json to compare with.",
        rich_help_panel=_ACCEPTED,
    ),
]
Jobs: TypeAlias = Annotated[
    int, typer.Option("--jobs", "-j", min=1, metavar="N", help="Processes.", rich_help_panel=_RUN)
]
FailOn: TypeAlias = Annotated[
    Severity | None,
    typer.Option(
        case_sensitive=False,
        help="Exit with 1 for a finding this bad or worse; error without it.",
        rich_help_panel=_RULES,
    ),
]
StrictIgnores: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--strict-ignores/--no-strict-ignores",
        help="Exit with 1 for a per-module ignore that matches nothing.",
        rich_help_panel=_RULES,
    ),
]
Baseline: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Findings in it do not fail.", rich_help_panel=_ACCEPTED),
]
WriteBaseline: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--write-baseline",
        help="Accept what is found now: write it to the baseline, or to gradflow-baseline.json.",
        rich_help_panel=_ACCEPTED,
    ),
]
MaxRegression: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="METRIC=SHARE",
        help="Fail where J, signal or drop got worse than in --reference by more: J=10%.",
        rich_help_panel=_ACCEPTED,
    ),
]
Reference: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="TRACE", help="The trace.json that --max-regression holds against.", rich_help_panel=_ACCEPTED
    ),
]
Format: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="table, json, csv, markdown, sarif, junit, github or gitlab. Without it: github in a GitHub "
        "workflow, else table.",
        rich_help_panel=_OUTPUT,
    ),
]
Csv: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Also write the CSV files and trace.json there; of several targets, each in a folder of its own.",
        rich_help_panel=_OUTPUT,
    ),
]
Also: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FORMAT=FILE",
        help="Write this form to a file as well: sarif=gradflow.sarif. Repeatable.",
        rich_help_panel=_OUTPUT,
    ),
]


def given_settings(parameters: Mapping[str, Any]) -> dict[str, Value]:
    """The settings that the command line gives, keyed as in the file.

    Args:
        parameters: The command's, by the names of its arguments; None and empty ones were not given.

    Raises:
        UsageError: A limit is not understood.
    """
    given: dict[str, Value] = {
        name.replace("_", "-"): value
        for name, value in parameters.items()
        if name in _PLAIN and value is not None
    }
    if parameters.get("inputs"):
        given["inputs"] = tuple(parameters["inputs"])
    for name in ("select", "ignore"):
        if parameters.get(name):
            given[name] = tuple(code for text in parameters[name] for code in codes_in(text))
    for name in ("checkpoint", "reference", "baseline"):
        if parameters.get(name) is not None:
            given[name] = str(parameters[name])
    if parameters.get("fail_on") is not None:
        given["fail-on"] = Severity(parameters["fail_on"]).value
    if parameters.get("train") is not None:
        given["mode"] = "train" if parameters["train"] else "eval"
    if parameters.get("threshold"):
        given["thresholds"] = thresholds_in(parameters["threshold"])
    if parameters.get("max_regression"):
        given["max-regression"] = tuple(_limit(text) for text in parameters["max_regression"])
    return given


_PLAIN = frozenset(
    {
        "loss",
        "batch_size",
        "device",
        "dtype",
        "seed",
        "steps",
        "seeds",
        "trained",
        "shattered",
        "strict_ignores",
    }
)


def _limit(text: str) -> tuple[str, float]:
    from gradflow.metric_gates import METRICS

    name, _, share = text.partition("=")
    if name not in METRICS:
        raise UsageError(
            f"--max-regression {text}: there is no number {name!r} to gate{near_miss(name, [*METRICS])}"
        )
    try:
        return name, percentage(share)
    except ValueError as error:
        raise UsageError(f"--max-regression {text}: write the limit as a percentage, {name}=10%") from error
