"""``gradflow anatomy``: a model, or a saved trace of one -> its residual blocks and what each is worth."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradflow.commands import options
from gradflow.commands.delivery import deliver, delivery, failures_delivered, judged_by
from gradflow.commands.progress import progress_line
from gradflow.commands.target_loading import loaded
from gradflow.errors import UsageError

if TYPE_CHECKING:
    from gradflow.trace_model import Trace

_TARGET_HELP = "A target as for inspect, or a trace.json that --csv DIR wrote."
_OF_A_MODEL = (
    *("inputs", "loss", "batch_size", "checkpoint", "trained", "device", "dtype", "seed", "steps", "train"),
    *("ablate", "ablate_top", "paths"),
)
"""Options that say how to run; a saved trace has been run."""
_NOTHING_ABLATED = (
    "nothing was ablated: no identity, projection or scaled site has a branch that could be left out"
)


def anatomy(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="TARGET", help=_TARGET_HELP, show_default=False)],
    inputs: options.Inputs = None,
    loss: options.Loss = None,
    batch_size: options.BatchSize = None,
    checkpoint: options.Checkpoint = None,
    trained: options.Trained = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    steps: options.Steps = 1,
    train: options.Training = None,
    ablate: options.Ablate = None,
    ablate_top: options.AblateTop = None,
    paths: options.Paths = False,
    select: options.Select = None,
    ignore: options.Ignore = None,
    threshold: options.Thresholds = None,
    fail_on: options.FailOn = None,
    form: options.AnatomyFormat = "table",
    output: options.Output = None,
    csv: options.Csv = None,
    csv_bom: options.CsvBom = False,
    show_all: options.ShowAll = False,
) -> int:
    """Show a model as its residual blocks: what each adds, carries of the gradient, and is worth.

    The exit code is 0 whatever is found, unless --fail-on is given.
    """
    from gradflow.analyzer import analyze
    from gradflow.reporters.anatomy_forms import anatomy_reporters

    place = delivery(context, form, output, csv, show_all, csv_bom=csv_bom, forms=anatomy_reporters)
    config = judged_by(select, ignore, fail_on, threshold)
    _check_ablation(ablate, ablate_top)
    if target.endswith(".json"):
        trace = _saved(context, target)
    else:
        with failures_delivered(target, place, config):
            trace = _recorded(context.params)
        if ablate and trace.ablation is None:
            print(f"gradflow: {_NOTHING_ABLATED}", file=sys.stderr)
    report = analyze(trace, config)
    deliver(report, place)
    return 1 if report.fails(config.fail_on) else 0


def _recorded(given: Mapping[str, Any]) -> Trace:
    """Load the target and run it as the command's arguments say."""
    with progress_line() as show:
        target, wanted = loaded(given, show)
        from gradflow.recording.ablation import AblationRequest
        from gradflow.recording.execution import record
        from gradflow.recording.path_passes import PathRequest

        order = given["ablate"]
        ablation = AblationRequest(
            order=order or "each", most=given["ablate_top"], announce=_announce, count=show.count
        )
        return record(
            target,
            seed=wanted.seed,
            steps=given["steps"],
            trained=given["trained"] or wanted.checkpoint is not None,
            mode=wanted.mode,
            progress=show,
            ablation=ablation if order else None,
            paths=PathRequest() if given["paths"] else None,
        )


def _check_ablation(ablate: str | None, top: int | None) -> None:
    if ablate not in (None, "each", "greedy"):
        raise UsageError(f"--ablate {ablate!r}: it takes each (which --ablate alone means) or greedy")
    if top is not None and ablate != "greedy":
        raise UsageError("--ablate-top stops the greedy order, which is not asked for: add --ablate greedy")


def _saved(context: typer.Context, target: str) -> Trace:
    """Read a saved trace; what only a model can do is refused.

    Raises:
        UsageError: An option says how to run it.
        TraceFileError: It cannot be read.
    """
    from gradflow import trace_file

    given = [name for name in _OF_A_MODEL if _was_given(context, name)]
    if given:
        named = ", ".join("--" + {"inputs": "input"}.get(name, name).replace("_", "-") for name in given)
        raise UsageError(
            f"{target} is a saved trace, which holds no model to run: leave out {named}, or give the model"
        )
    return trace_file.load(Path(target))


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _announce(phrase: str) -> None:
    """Say what a long ablation is going to cost before it runs."""
    if phrase.startswith("greedy"):
        print(f"gradflow: {phrase}", file=sys.stderr, flush=True)
