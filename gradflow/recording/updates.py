"""One true step of the optimizer, on a model that is put back: what an update does to each parameter.

The optimizer works on copies of its state and of its groups; the originals are never touched. What it does to the
parameters the snapshot undoes.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gradflow.recording.leaves import tensor_leaves
from gradflow.recording.records import StepRecord
from gradflow.recording.seeding import seed_everything
from gradflow.recording.steps import Job, blamed_on
from gradflow.recording.target import Batch
from gradflow.recording.tensor_stats import l2_norm, real_values
from gradflow.trace_model import ParameterRecord

WARM_UP = 10
"""So many steps come first, where as many were asked for: the first ones of Adam are as large as its rate."""
_OWN = frozenset({"state", "param_groups", "defaults"})
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Updates:
    """What a step of the optimizer did."""

    numbers: Mapping[str, tuple[float | None, float | None, float | None]] = field(default_factory=dict)
    """Update ratio, share lost and gradient over eps, by the parameter's name."""
    steps: int | None = None
    """How many steps the optimizer had taken before; None where none was run."""
    note: str = ""
    """Why none was run although an optimizer is known."""


def with_updates(
    job: Job, median: StepRecord, batches: tuple[Batch, ...], seed: int, steps: int
) -> tuple[StepRecord, Updates]:
    """Add to a step's parameters what the optimizer does to them; without an optimizer they stay as they are.

    Args:
        job: The target, ready to run.
        median: The recorded steps as one.
        batches: Used in turn.
        seed: Of the first step.
        steps: How many were asked for; from ``WARM_UP`` on so many steps of the optimizer come before the one
            that is measured.
    """
    if job.target.optimizer is None:
        return median, Updates()
    updates = measure_updates(job, batches, seed, WARM_UP if steps >= WARM_UP else 0)
    parameters = tuple(_with_numbers(row, updates) for row in median.parameters)
    return replace(median, parameters=parameters), updates


def _with_numbers(row: ParameterRecord, updates: Updates) -> ParameterRecord:
    if row.name not in updates.numbers:
        return row
    ratio, lost, to_eps = updates.numbers[row.name]
    return replace(row, update_ratio=ratio, update_lost=lost, gradient_to_eps=to_eps)


def measure_updates(job: Job, batches: tuple[Batch, ...], seed: int, warm_up: int) -> Updates:
    """Run some steps of the optimizer and measure the last; model and optimizer are put back."""
    optimizer = job.target.optimizer
    reason = _why_not(job)
    if optimizer is None or reason:
        return Updates(note=reason)
    try:
        with _set_aside(optimizer, job):
            taken = _steps_taken(optimizer) + warm_up
            before: dict[int, Tensor] = {}
            for step in range(warm_up + 1):
                _train_step(job, batches[step % len(batches)], seed + step)
                if step == warm_up:
                    before = {id(p): p.detach().clone() for p in _updated(optimizer)}
                try:
                    optimizer.step()
                except Exception as error:
                    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                    return Updates(note=f"the optimizer's step failed ({reason}): updates not checked")
            return Updates(numbers=_numbers(job, optimizer, before), steps=taken)
    finally:
        job.snapshot.restore()


def _why_not(job: Job) -> str:
    """Why this optimizer's step is not run; "" where it is."""
    optimizer = job.target.optimizer
    if optimizer is None or not job.optimized:
        return ""
    own = {name: value for name, value in vars(optimizer).items() if name not in _OWN}
    held = [name for name, value in own.items() if tensor_leaves(value)]
    if held:
        return f"the optimizer keeps tensors outside its state ({held[0]}): updates not checked"
    return ""


@contextmanager
def _set_aside(optimizer: Any, job: Job) -> Iterator[None]:
    """Let the optimizer work on copies, and on the parameters of this model only."""
    attributes = dict(vars(optimizer))
    ours = {id(item.parameter) for item in job.layout.parameters}
    state: Any = defaultdict(dict)
    state.update({p: copy.deepcopy(held) for p, held in optimizer.state.items() if id(p) in ours})
    optimizer.state = state
    optimizer.param_groups = [
        {**group, "params": [p for p in group["params"] if id(p) in ours]} for group in optimizer.param_groups
    ]
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        if hooks in attributes:
            setattr(optimizer, hooks, OrderedDict())
    try:
        yield
    finally:
        vars(optimizer).clear()
        vars(optimizer).update(attributes)


def _steps_taken(optimizer: Any) -> int:
    """The most that any parameter's state has counted; 0 where none is counted."""
    counts = [held["step"] for held in optimizer.state.values() if "step" in held]
    return int(max((float(count) for count in counts), default=0.0))


def _updated(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _train_step(job: Job, batch: Batch, seed: int) -> None:
    """Forward and backward, with nothing recorded."""
    job.snapshot.clear_gradients()
    seed_everything(seed)
    with torch.inference_mode(False), torch.enable_grad():
        with blamed_on(job.module, "forward"):
            outputs = job.target.forward(job.module, batch)
        with blamed_on(job.module, "loss"):
            loss = job.target.loss.compute(outputs, batch)
        if loss.requires_grad:
            with blamed_on(job.module, "backward"):
                loss.backward()  # type: ignore[no-untyped-call]


def _numbers(
    job: Job, optimizer: Any, before: Mapping[int, Tensor]
) -> dict[str, tuple[float | None, float | None, float | None]]:
    names = {id(item.parameter): item.names[0] for item in job.layout.parameters}
    found = {}
    with torch.no_grad():
        for group in optimizer.param_groups:
            if float(group.get("lr", 1.0)) == 0:
                continue
            eps = float(group["eps"]) if "betas" in group and group.get("eps") else None
            for parameter in group["params"]:
                if id(parameter) in before and parameter.layout is torch.strided:
                    found[names[id(parameter)]] = _of_parameter(parameter, before[id(parameter)], eps)
    return found


def _of_parameter(
    parameter: Tensor, before: Tensor, eps: float | None
) -> tuple[float | None, float | None, float | None]:
    """U = ||W' - W|| / ||W||; the share of elements that should move and do not; RMS(g) / eps."""
    gradient = parameter.grad
    old, new = real_values(before), real_values(parameter)
    norm = l2_norm(old).item()
    ratio = l2_norm(new.float() - old.float()).item() / norm if norm else None
    if gradient is None or gradient.layout is not torch.strided:
        return ratio, None, None
    asked = real_values(gradient) != 0
    count = int(torch.count_nonzero(asked).item())
    lost = None
    if count and parameter.dtype in _HALVES:
        lost = torch.count_nonzero(asked & (old == new)).item() / count
    to_eps = None
    if count and eps is not None:
        to_eps = l2_norm(real_values(gradient)).item() / math.sqrt(count) / eps
    return ratio, lost, to_eps
