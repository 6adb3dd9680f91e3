"""Targets -> reports, one after another in this process or several at a time in others."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context
from pathlib import Path

from gradflow.checking.plan import TargetPlan
from gradflow.config import Config
from gradflow.errors import GradflowError, ModelError
from gradflow.failed_add import ResidualShapeError
from gradflow.findings import Finding
from gradflow.report import Report
from gradflow.trace_model import SeedMeasure, Trace

Progress = Callable[[str], None]
_FRAME = re.compile(r'^ *File "(.+)", line (\d+)', re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFailure:
    """Why a target could not be judged."""

    exit_code: int
    """2, 3 or 4, as in the contract."""
    message: str
    trace_text: str = ""
    """The user's traceback, or ours for a bug; empty where there is none."""
    finding: Finding | None = None
    """What a rule has to say about it, where one does."""
    place: str = ""
    """"models/net.py:31", the user's line that raised; "" where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRun:
    """What came of a target: a report, or a failure."""

    name: str
    report: Report | None = None
    failure: TargetFailure | None = None


def run_targets(plans: Sequence[TargetPlan], *, jobs: int = 1, progress: Progress) -> tuple[TargetRun, ...]:
    """Run every target; one that fails does not stop the others.

    Args:
        plans: What to run.
        jobs: How many processes; with one, everything happens in this one. The reports are the same.
        progress: Told in a few words what is going on.

    Returns:
        One a plan, in their order.
    """
    if min(jobs, len(plans)) > 1:
        return _in_processes(plans, min(jobs, len(plans)), progress)
    progress("importing torch")
    from gradflow.commands.torch_import import import_torch

    import_torch()
    return tuple(run_target(plan, _prefixed(progress, plan, plans)) for plan in plans)


def _prefixed(progress: Progress, plan: TargetPlan, plans: Sequence[TargetPlan]) -> Progress:
    return progress if len(plans) == 1 else lambda phrase: progress(f"{plan.name}: {phrase}")


def _in_processes(plans: Sequence[TargetPlan], jobs: int, progress: Progress) -> tuple[TargetRun, ...]:
    progress(f"{len(plans)} targets in {jobs} processes")
    # Spawned: a fork would copy the locks of the parent's threads as they happen to be.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_leave_interrupts) as pool:
        futures = [pool.submit(run_target, plan) for plan in plans]
        try:
            done = [_result(future) for future in futures]
        except KeyboardInterrupt:
            _stop(pool)
            raise
    return tuple(run or _alone(plan) for run, plan in zip(done, plans, strict=True))


def _leave_interrupts() -> None:
    """Of the Ctrl-C that reaches every process of a terminal, a worker would end one target and start the next."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stop(pool: ProcessPoolExecutor) -> None:
    """End the workers now: left alone they would first finish what they have, and what waits for them."""
    pool.shutdown(wait=False, cancel_futures=True)
    for process in active_children():
        process.terminate()


def _result(future: Future[TargetRun]) -> TargetRun | None:
    """The run; None where a process died, which takes what the others were at with it."""
    try:
        return future.result()
    except BrokenProcessPool:
        return None


def _alone(plan: TargetPlan) -> TargetRun:
    """Once more in a process of its own, so that it is known which target kills the one it runs in."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        run = _result(pool.submit(run_target, plan))
    if run is not None:
        return run
    message = (
        f"the process that ran {plan.target} died, from a crash in compiled code or for want of memory; "
        f"`gradflow inspect {plan.target}` shows more"
    )
    return TargetRun(name=plan.name, failure=TargetFailure(exit_code=ModelError.exit_code, message=message))


def run_target(plan: TargetPlan, progress: Progress | None = None) -> TargetRun:
    """Build, record and judge one target; whatever goes wrong is part of what is returned."""
    try:
        with _working_in(plan.folder):
            return TargetRun(name=plan.name, report=_report(plan, progress or _silent))
    except ResidualShapeError as error:
        return TargetRun(name=plan.name, failure=shapes_differ(error, plan.config))
    except GradflowError as error:
        text = error.trace_text if isinstance(error, ModelError) else ""
        return _failed(plan, error.exit_code, str(error), text)
    except Exception as error:
        message = (
            f"a bug in gradflow ({type(error).__name__}); please report its traceback with the model file"
        )
        return _failed(plan, GradflowError.exit_code, message, "".join(traceback.format_exception(error)))


def shapes_differ(error: ResidualShapeError, config: Config) -> TargetFailure:
    """A model that raised at a residual add, with what GF207 says about it where that rule may speak."""
    from gradflow.rules import select_rules
    from gradflow.rules.gf207_shortcut_shape import failed_add_finding

    finding = failed_add_finding(error.failed_add)
    spoken = {rule.code for rule in select_rules(config.select, config.ignore)}
    return TargetFailure(
        exit_code=error.exit_code,
        message=str(error),
        trace_text=error.trace_text,
        finding=finding if finding.rule in spoken else None,
        place=error.failed_add.place,
    )


def _failed(plan: TargetPlan, code: int, message: str, trace_text: str) -> TargetRun:
    place = _innermost(trace_text, Path(plan.folder)) if code == ModelError.exit_code else ""
    failure = TargetFailure(exit_code=code, message=message, trace_text=trace_text, place=place)
    return TargetRun(name=plan.name, failure=failure)


def _innermost(trace_text: str, folder: Path) -> str:
    """ "models/net.py:31", the last line of a traceback that lies below a folder; "" without one."""
    found = [(Path(path), line) for path, line in _FRAME.findall(trace_text)]
    below = [
        (path, line)
        for path, line in found
        if path.is_relative_to(folder) and "site-packages" not in path.parts
    ]
    return f"{below[-1][0].relative_to(folder).as_posix()}:{below[-1][1]}" if below else ""


def _silent(phrase: str) -> None:
    """A worker has no terminal of its own."""


@contextlib.contextmanager
def _working_in(folder: str) -> Iterator[None]:
    before = os.getcwd()  # noqa: PTH109 - a directory that is gone raises here, not later
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _report(plan: TargetPlan, progress: Progress) -> Report:
    from gradflow.analyzer import analyze

    trace = _record(plan, plan.seed, progress)
    if plan.seeds > 1:
        trace = replace(trace, seeds=_seeds(plan, trace, progress))
    return analyze(trace, plan.config)


def _seeds(plan: TargetPlan, first: Trace, progress: Progress) -> tuple[SeedMeasure, ...]:
    """The model built again with each seed, for what it starts with is most of the noise."""
    from gradflow.metric_gates import measure

    more = range(plan.seed + 1, plan.seed + plan.seeds)
    return (measure(first, plan.seed), *(measure(_record(plan, seed, progress), seed) for seed in more))


def _record(plan: TargetPlan, seed: int, progress: Progress) -> Trace:
    from gradflow.recording.execution import record
    from gradflow.recording.process_state import process_state_kept
    from gradflow.recording.shattered import with_correlation
    from gradflow.recording.target import TargetOptions, load_target

    options = TargetOptions(
        inputs=plan.inputs,
        loss=plan.loss,
        batch_size=plan.batch_size,
        device=plan.device,
        dtype=plan.dtype,
        seed=seed,
        checkpoint=plan.checkpoint,
        mode=plan.mode,
    )
    with process_state_kept():
        progress(f"building {plan.target}")
        target = load_target(plan.target, options)
        trace = record(
            target, seed=seed, steps=plan.steps, trained=plan.trained, mode=plan.mode, progress=progress
        )
        return with_correlation(target, trace, seed=seed, mode=plan.mode) if plan.shattered else trace
