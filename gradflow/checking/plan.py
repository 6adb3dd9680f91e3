"""What a check is to do: three layers of settings made into one frozen plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gradflow.checking.module_ignores import ModuleIgnore
from gradflow.config import Config
from gradflow.config_file import FileTarget, ProjectConfig
from gradflow.config_keys import COMMAND_LINE, FILE, KEYS, Layer, Setting, Value, merged
from gradflow.errors import UsageError
from gradflow.findings import Severity
from gradflow.metric_gates import GATE_SEEDS

_OF_ONE_TARGET = ("inputs", "checkpoint", "reference")


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetPlan:
    """One target, and everything that decides what is said of it."""

    name: str
    """Its name in pyproject.toml, or the target as it was given."""
    target: str
    folder: str
    """Working folder of the run: paths are relative to it."""
    inputs: tuple[str, ...] = ()
    loss: str | None = None
    batch_size: int | None = None
    device: str | None = None
    dtype: str | None = None
    seed: int = 0
    steps: int = 1
    seeds: int = 1
    """How many times it is built and recorded, for the gates."""
    checkpoint: str | None = None
    trained: bool = False
    shattered: bool = False
    mode: str | None = None
    config: Config
    ignores: tuple[ModuleIgnore, ...] = ()
    limits: tuple[tuple[str, float], ...] = ()
    reference: str | None = None
    settings: tuple[Setting, ...] = ()
    """What the above was made from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckPlan:
    """All targets of a check, and what holds for all of them."""

    targets: tuple[TargetPlan, ...]
    whole: bool
    """These are all targets of pyproject.toml."""
    configured: tuple[str, ...]
    """Names of the targets of pyproject.toml."""
    strict_ignores: bool
    baseline: Path | None
    """None where no baseline was asked for."""
    settings: tuple[Setting, ...]
    """Those that hold for all targets."""
    path: Path | None
    """The pyproject.toml that was read."""


def make_plan(
    project: ProjectConfig, names: Sequence[str], given: Mapping[str, Value], *, may_be_empty: bool = False
) -> CheckPlan:
    """Settle which targets to check, and how.

    Args:
        project: What pyproject.toml says.
        names: Targets of the command line: configured names or targets; empty for all configured ones.
        given: Settings of the command line, keyed as in the file.
        may_be_empty: No target at all is no error.

    Raises:
        UsageError: A rule does not exist, there is no target, or an option fits one target only and there are several.
    """
    known = {target.name: target for target in project.targets}
    if not names and not known and not may_be_empty:
        raise UsageError(_nothing_to_check(project))
    wanted = list(dict.fromkeys(names or known))
    _refuse_shared(given, wanted)
    targets = tuple(_planned(project, known.get(name), name, given) for name in wanted)
    keys = [key for key in KEYS if key.project]
    settings = merged(
        keys, [Layer(origin=FILE, values=project.values), Layer(origin=COMMAND_LINE, values=given)]
    )
    values = {setting.key: setting.value for setting in settings}
    return CheckPlan(
        targets=targets,
        whole=bool(known) and set(wanted) >= set(known),
        configured=tuple(known),
        strict_ignores=values["strict-ignores"],
        baseline=_baseline(project, given),
        settings=settings,
        path=project.path,
    )


def _nothing_to_check(project: ProjectConfig) -> str:
    hint = (
        'name one (gradflow check model.py), or add [tool.gradflow.targets.NAME] with target = "model.py" to'
    )
    place = str(project.path) if project.path is not None else "pyproject.toml"
    return f"there is no target to check: {hint} {place}"


def _refuse_shared(given: Mapping[str, Value], wanted: Sequence[str]) -> None:
    shared = [name for name in _OF_ONE_TARGET if name in given]
    if shared and len(wanted) > 1:
        option = "--input" if shared[0] == "inputs" else f"--{shared[0]}"
        raise UsageError(
            f"{option} is for one target, and there are {len(wanted)} ({', '.join(wanted)}): name the one, or put "
            f"{shared[0]} into its table in pyproject.toml"
        )


def _baseline(project: ProjectConfig, given: Mapping[str, Value]) -> Path | None:
    if "baseline" in given:
        return Path(given["baseline"])
    return project.folder / project.values["baseline"] if "baseline" in project.values else None


def _planned(
    project: ProjectConfig, configured: FileTarget | None, name: str, given: Mapping[str, Value]
) -> TargetPlan:
    own: dict[str, Value] = dict(configured.values) if configured is not None else {}
    layers = [
        Layer(origin=FILE, values={**project.values, **own}),
        Layer(origin=COMMAND_LINE, values={**given, **({} if configured is not None else {"target": name})}),
    ]
    settings = merged([key for key in KEYS if key.target], layers)
    # Paths of the command line are relative to where it was typed, those of the file to the file.
    folder = project.folder if configured is not None else Path.cwd()
    typed = {key: str(Path(given[key]).resolve()) for key in ("checkpoint", "reference") if key in given}
    values: dict[str, Any] = {setting.key: setting.value for setting in settings} | typed
    _check_gate(name, values)
    return TargetPlan(
        name=name,
        target=values["target"],
        folder=str(folder),
        inputs=values["inputs"],
        loss=values["loss"],
        batch_size=values["batch-size"],
        device=values["device"],
        dtype=values["dtype"],
        seed=values["seed"],
        steps=values["steps"],
        seeds=values["seeds"] or (GATE_SEEDS if values["max-regression"] else 1),
        checkpoint=values["checkpoint"],
        shattered=values["shattered"],
        trained=values["trained"] or values["checkpoint"] is not None,
        mode=values["mode"],
        config=_config(values),
        ignores=(*(configured.ignores if configured is not None else ()), *project.ignores),
        limits=values["max-regression"],
        reference=values["reference"],
        settings=settings,
    )


def _check_gate(name: str, values: Mapping[str, Value]) -> None:
    """A gate that could never fail is not let through."""
    if values["max-regression"] and values["reference"] is None:
        raise UsageError(
            f"target {name!r} has a max-regression and nothing to hold against: give reference (--reference), a "
            "trace.json that --csv wrote"
        )
    if values["reference"] is not None and not values["max-regression"]:
        raise UsageError(
            f'target {name!r} has a reference and no limit: give max-regression ({{ J = "10%" }})'
        )


def _config(values: Mapping[str, Value]) -> Config:
    from gradflow.rules import select_rules

    select_rules(values["select"], values["ignore"])
    return Config(
        select=values["select"],
        ignore=values["ignore"],
        fail_on=Severity(values["fail-on"]),
        thresholds=values["thresholds"],
    )


def near_target(name: str, plan: CheckPlan) -> str:
    """What to add to an error about a target that may be the name of a configured one, misspelt."""
    near = get_close_matches(name, plan.configured, n=1)
    return f"; did you mean the target {near[0]!r} of {plan.path}?" if near and name not in near else ""
