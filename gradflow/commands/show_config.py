"""``gradflow config``: what is in force, and where each value came from."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradflow.commands import check_options, options
from gradflow.commands.check_options import given_settings
from gradflow.config_keys import Setting
from gradflow.errors import UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from gradflow.checking.plan import CheckPlan, TargetPlan

_FORMATS = ("table", "json")


def config(
    context: typer.Context,
    targets: check_options.Targets = None,
    inputs: options.Inputs = None,
    loss: options.Loss = None,
    batch_size: options.BatchSize = None,
    checkpoint: options.Checkpoint = None,
    trained: check_options.Trained = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: check_options.Seed = None,
    steps: check_options.Steps = None,
    train: options.Training = None,
    select: options.Select = None,
    ignore: options.Ignore = None,
    threshold: options.Thresholds = None,
    fail_on: check_options.FailOn = None,
    strict_ignores: check_options.StrictIgnores = None,
    baseline: check_options.Baseline = None,
    max_regression: check_options.MaxRegression = None,
    reference: check_options.Reference = None,
    seeds: check_options.Seeds = None,
    form: Annotated[str, typer.Option("--format", metavar="FORMAT", help="table or json.")] = "table",
) -> int:
    """Show the settings that check would run with, and where each came from.

    It takes the options of check. Nothing is run.
    """
    from gradflow.checking.plan import make_plan
    from gradflow.config_file import read_project
    from gradflow.reporters.screen import Screen, emit, rendered, wants_colour, width_of

    if form not in _FORMATS:
        raise UsageError(f"there is no format {form!r} here; --format takes {', '.join(_FORMATS)}")
    plan = make_plan(read_project(), targets or (), given_settings(context.params), may_be_empty=True)
    if form == "json":
        emit(json.dumps(_contents(plan), indent=1) + "\n", sys.stdout)
        return 0
    screen = Screen(width=width_of(sys.stdout), colour=wants_colour(sys.stdout))
    emit(rendered(list(_lines(plan, screen.width)), screen), sys.stdout)
    return 0


def _contents(plan: CheckPlan) -> dict[str, Any]:
    return {
        "file": None if plan.path is None else str(plan.path),
        "settings": _plain(plan.settings),
        "targets": [
            {
                "name": target.name,
                "settings": _plain(target.settings),
                "per-module-ignores": [
                    {"pattern": ignore.pattern, "code": ignore.code, "reason": ignore.reason}
                    for ignore in target.ignores
                ],
            }
            for target in plan.targets
        ],
    }


def _plain(settings: Sequence[Setting]) -> dict[str, dict[str, Any]]:
    return {setting.key: {"value": setting.value, "from": setting.origin} for setting in settings}


def _lines(plan: CheckPlan, width: int) -> Iterator[Text]:
    from rich.text import Text

    from gradflow.reporters.severity_style import HEADING
    from gradflow.reporters.text_lines import hanging

    found = str(plan.path) if plan.path is not None else "none with a [tool.gradflow]"
    yield from hanging(Text.assemble(("pyproject.toml", HEADING), "  "), found, width)
    own = {setting.key for target in plan.targets for setting in target.settings}
    yield from _table(
        [setting for setting in plan.settings if not plan.targets or setting.key not in own], width
    )
    for target in plan.targets:
        yield Text("")
        yield Text.assemble(("target ", ""), (target.name, HEADING))
        yield from _table(target.settings, width)
        yield from _ignored(target, width)


def _table(settings: Sequence[Setting], width: int) -> Iterator[Text]:
    from rich.text import Text

    from gradflow.config_keys import DEFAULT
    from gradflow.reporters.severity_style import HEADING, LABEL
    from gradflow.reporters.text_lines import hanging, pad

    for setting in settings:
        style = "" if setting.origin == DEFAULT else HEADING
        head = Text.assemble("  ", (pad(setting.key, 16), LABEL), (pad(setting.origin, 16), style))
        yield from hanging(head, value_text(setting), width)


def _ignored(target: TargetPlan, width: int) -> Iterator[Text]:
    from rich.text import Text

    from gradflow.reporters.severity_style import LABEL
    from gradflow.reporters.text_lines import hanging

    for ignore in target.ignores:
        head = Text.assemble("  ", ("ignored  ", LABEL), f"{ignore.code} in {ignore.pattern}  ")
        yield from hanging(head, ignore.reason, width)


def value_text(setting: Setting) -> str:
    """A value as it would be typed; "not set" where the program decides for itself."""
    value = setting.value
    if value is None or value == ():
        return "not set"
    if setting.key == "max-regression":
        return ", ".join(f"{metric}={100 * share:g}%" for metric, share in value)
    if setting.key == "thresholds":
        return ", ".join(f"{name}={limit:g}" for name, limit in value)
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(value) if isinstance(value, tuple) else str(value)
